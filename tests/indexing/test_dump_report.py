"""What `pack build` says about dumps in five scripts: pages used plus pages skipped by reason are the pages present."""

import bz2
import json
from collections import Counter
from xml.sax.saxutils import escape

import pytest
from typer.testing import CliRunner

from gog_edge.cli import app
from gog_edge.indexing.build import build_pack
from gog_edge.indexing.sources.open import open_source
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.text.tokens import name_key

# By language: local names of the namespaces of files and templates, keyword of redirects, title, text, what is shown.
WIKIS = {
    "de": ("Datei", "Vorlage", "WEITERLEITUNG", "Große Elbe", "Der Fluss ist {{nowrap|5 km}} lang.",
    "Der Fluss ist 5 km lang."),
    "ru": ("Файл", "Шаблон", "ПЕРЕНАПРАВЛЕНИЕ", "Волга", "Река длиной {{число|3530}} км.", "Река длиной 3530 км."),
    "ja": ("ファイル", "Template", "転送", "信濃川", "{{読み仮名|信濃川|しなのがわ}}は川である。",
    "信濃川（しなのがわ）は川である。"),
    "ar": ("ملف", "قالب", "تحويل", "نهر النيل", "طول النهر {{formatnum:6650}} كم.", "طول النهر 6650 كم."),
    "hi": ("चित्र", "साँचा", "अनुप्रेषित", "गंगा", "नदी {{lang|hi|गंगा}} है।", "नदी गंगा है।"),
}  # fmt: skip


def write_wiki(path, language):
    """Write 600 articles, redirects of all kinds and pages that cannot be used; return how many of each."""
    files, templates, redirect, title, text, _ = WIKIS[language]
    pages = [(f"{title} {number}", 0, f"{text}\n\n[[{files}:A.jpg|thumb|x]]") for number in range(600)]
    pages += [(f"{title} alt {number}", 0, f"#{redirect} [[{title} {number}#x]]") for number in range(50)]
    pages += [(f"{title} alt alt", 0, f"#{redirect} [[{title} alt 7]]"),
    (f"{title} lost", 0, f"#{redirect} [[Nowhere]]"),
              (f"{title} loop", 0, f"#{redirect} [[{title} loop]]"),
              (f"{title} tpl", 0, f"#{redirect} [[{templates}:X]]"),
              (f"{templates}:X", 10, "x"), (f"{files}:A.jpg", 6, "y"), (f"{title} empty", 0, "{{box|a=b}}"),
              ("", 0, "z")]  # fmt: skip
    body = "".join(
        f"<page><title>{escape(name)}</title><ns>{space}</ns><id>1</id><revision><id>1</id>"
        f'<text xml:space="preserve">{escape(content)}</text></revision></page>\n'
        for name, space, content in pages
    )
    head = (f'<mediawiki version="0.11" xml:lang="{language}"><siteinfo><dbname>{language}wiki</dbname>'
            f'<base>https://{language}.wikipedia.org/wiki/X</base><namespaces><namespace key="0" />'
            f'<namespace key="6">{files}</namespace><namespace key="10">{templates}</namespace></namespaces>'
            "</siteinfo>\n")  # fmt: skip
    path.write_bytes(bz2.compress((head + body + "<page><title>broken</page></mediawiki>").encode()))
    return {"present": len(pages) + 1, "used": 600 + 51, "skipped": {
        "redirect to a missing article": 1, "redirect to itself": 1, "redirect to another namespace": 1,
        f"page is in the namespace {templates}": 1, f"page is in the namespace {files}": 1, "article has no text": 1,
        "page has no title": 1, "page is not XML": 1}}  # fmt: skip


@pytest.mark.parametrize("language", WIKIS)
def test_pages_used_plus_pages_skipped_are_the_pages_present(tmp_path, language):
    expected = write_wiki(tmp_path / f"{language}wiki-20260601-pages-articles.xml.bz2", language)
    source = open_source(tmp_path / f"{language}wiki-20260601-pages-articles.xml.bz2")
    build_pack(source, tmp_path / "pack", name=language, encoder=None, workers=1)
    done = CliRunner().invoke(app, ["pack", "info", str(tmp_path / "pack"), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    (pages,) = report["items"]
    skipped = Counter({one["reason"]: one["count"] for one in report["skipped"]})
    assert pages["present"] == expected["present"] == pages["used"] + pages["skipped"]
    assert pages["used"] == expected["used"] and skipped == expected["skipped"]
    *_, title, _, shown = WIKIS[language]
    pack = Pack.open(tmp_path / "pack", None)
    try:
        found = pack.store.article_by_key(f"{title} 7")
        names = {name: {match.article for match in pack.store.find_names([name_key(name)])}
                 for name in (f"{title} alt 7", f"{title} alt alt")}  # fmt: skip
        # A redirect to a redirect is followed.
        assert names == {f"{title} alt 7": {found}, f"{title} alt alt": {found}}
        (lead,) = pack.store.lead_paragraphs([found]).values()
        assert pack.store.paragraphs([lead])[lead].text == shown
    finally:
        pack.close()
