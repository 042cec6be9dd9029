"""MediaWiki XML dumps: which pages become articles and redirects, and how the others are counted."""

import bz2
import gzip
import lzma
from html import escape
from pathlib import Path

import pytest
from reading import Read, check_contract

from gog_edge.errors import SourceError
from gog_edge.indexing.sources import files
from gog_edge.indexing.sources.mediawiki import MediaWikiSource
from gog_edge.indexing.sources.open import detect_kind, open_source

CASES = Path(__file__).parents[2] / "data" / "dumps"
SITE = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">
  <siteinfo><sitename>Wikipedia</sitename><dbname>dewiki</dbname><base>https://{}/wiki/Start</base>
    <namespaces><namespace key="-2" case="first-letter">Medium</namespace><namespace key="0" case="first-letter" />
      <namespace key="1" case="first-letter">Diskussion</namespace>
      <namespace key="4" case="first-letter">Wikipedia</namespace>
      <namespace key="6" case="first-letter">Datei</namespace>
      <namespace key="10" case="first-letter">Vorlage</namespace>
      <namespace key="14" case="first-letter">Kategorie</namespace>
    </namespaces></siteinfo>
"""
TEXT = """{{{{Infobox Ort|name=X|bild=[[Datei:Y.jpg]]}}}}
'''Ort {0}''' ist ein ''Ort'' an der [[Elbe|schönen Elbe]].<ref>Buch, S. {0}.</ref> Siehe [[Haus]].

[[Datei:Bild.jpg|thumb|Ein [[Bild]] von hier]]
== Geschichte ==
Der Ort wurde&nbsp;{0} gegründet.
=== Frühe Zeit ===
Es gab drei Häuser:
* Erstens
* Zweitens <!-- nicht -->
{{| class="wikitable"
| a || b
|}}
== Einzelnachweise ==
<references />
* no
== Lage ==
Im Norden.
[[Kategorie:Ort]]
"""


def page(number, text=None, **fields):
    text = escape(TEXT.format(number) if text is None else text, quote=False)
    values = {"title": f"Ort {number}", "ns": 0, "redirect": "", "model": ""} | fields
    return (f"  <page>\n    <title>{values['title']}</title>\n    <ns>{values['ns']}</ns>\n    <id>{number}</id>"
            f"{values['redirect']}\n    <revision>{values['model']}<text bytes=\"9\" xml:space=\"preserve\">{text}"
            "</text></revision>\n  </page>\n")  # fmt: skip


def revision(ident, timestamp, text, attributes=""):
    return (f"<revision><id>{ident}</id><timestamp>{timestamp}</timestamp><contributor><id>999</id></contributor>"
            f"<text {attributes}>{text}</text></revision>")  # fmt: skip


def history(title, *revisions):
    return f"<page><title>{title}</title><ns>0</ns><id>1</id>{''.join(revisions)}</page>\n"


def write_dump(path, pages, site="de.wikipedia.org", end="</mediawiki>\n", encoding="utf-8"):
    data = (SITE.format(site) + "".join(pages) + end).encode(encoding)
    # Level 1 has blocks of 100 kB, so that a truncated file yields some.
    packed = {".bz2": bz2.compress(data, 1), ".gz": gzip.compress(data, 1), ".xz": lzma.compress(data, preset=0)}
    path.write_bytes(packed.get(path.suffix, data))
    return path


def read(tmp_path, *pages, **options):
    source = MediaWikiSource(write_dump(tmp_path / "a.xml", pages, **options))
    found = Read(source)
    found.check_balance()
    assert found.present == {"page": sum(text.count("<page>") for text in pages)}
    return found


# --- cases that failed in use -----------------------------------------------------------------


def paragraphs_of(case):
    found = Read(open_source(CASES / f"{case}.xml"))
    found.check_balance()
    texts = {title: [text for _, text in article.paragraphs] for title, article in found.articles.items()}
    return texts, found.redirects


def test_aliases_of_namespaces_that_the_dump_does_not_list_are_known():
    assert paragraphs_of("bild-alias") == ({"Turm": ["Der Turm steht am See.", "Der Hof ist klein."]}, {})


def test_paragraphs_that_begin_with_an_exclamation_mark_or_a_brace_are_kept():
    assert paragraphs_of("exclamation")[0] == {"!Kora": [
        "!Kora is a language with click sounds.", "It has few speakers.", "!!! is the name of a band.",
        "{curly} begins this one."]}  # fmt: skip


def test_the_newest_revision_is_taken():
    assert paragraphs_of("history")[0] == {"Lake Pine": ["The lake is 5 km long, as surveyed in 2020."]}


def test_links_to_other_languages_and_switches_are_dropped():
    assert paragraphs_of("interlang")[0] == {"Lake": ["A lake."]}


def test_a_redirect_without_its_element_is_a_redirect():
    assert paragraphs_of("old-redirect") == ({"River": ["A long river flows here."]}, {"Old name": "River"})


def test_templates_with_numbers_are_rendered():
    assert paragraphs_of("template-numbers")[0] == {"River": [
        "The river is 120 km (75 mi) long and rises at 1°N 2°E. Its name is Rivière."]}  # fmt: skip


def test_one_language_variant_is_shown():
    assert paragraphs_of("zh-variants")[0] == {"塔": ["这座塔位于联邦州的北部，塔高五十米。"]}
    traditional = Read(open_source(CASES / "zh-variants.xml", language="zh-hant"))
    assert traditional.articles["塔"].paragraphs == (("", "这座塔位于邦的北部，塔高五十米。"),)


# --- pages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".xml", ".xml.bz2", ".xml.gz", ".xml.xz"])
def test_articles_are_read_with_their_sections(tmp_path, suffix):
    pages = [page(number) for number in range(700)]
    pages[5:5] = [page(9001, ns=1), page(9002, redirect='<redirect title="Ort 3" />', title="Alter Ort &amp; mehr")]
    path = write_dump(tmp_path / f"dewiki-20240901-pages-articles{suffix}", pages)
    assert detect_kind(path) == "mediawiki"
    source = MediaWikiSource(path)
    snapshot = source.snapshot()
    assert (snapshot.name, snapshot.date, snapshot.licence) == ("dewiki", "2024-09-01", "CC BY-SA 4.0")
    read = check_contract(source)
    assert len(read.articles) == 700 and len(read.chunks) == 3 and not read.images
    assert read.skipped == {"page is in the namespace Diskussion": 1}
    assert read.redirects == {"Alter Ort & mehr": "Ort 3"}
    assert read.articles["Ort 7"].paragraphs == (
        ("", "Ort 7 ist ein Ort an der schönen Elbe. Siehe Haus."),
        ("Geschichte", "Der Ort wurde 7 gegründet."),
        ("Geschichte / Frühe Zeit", "Es gab drei Häuser:"),
        ("Geschichte / Frühe Zeit", "Erstens\nZweitens"),
        ("Lage", "Im Norden."),
    )


def test_several_streams_in_one_file_are_read(tmp_path):
    path = write_dump(tmp_path / "plain.xml", [page(1), page(2)])
    data, packed = path.read_bytes(), tmp_path / "multistream.xml.bz2"
    packed.write_bytes(b"".join(bz2.compress(data[at : at + 500]) for at in range(0, len(data), 500)))
    assert set(Read(MediaWikiSource(packed)).articles) == {"Ort 1", "Ort 2"}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_are_understood(tmp_path, encoding):
    path = write_dump(tmp_path / "a.xml", [page(1, "Größe: 漢字.")], encoding=encoding)
    assert detect_kind(path) == "mediawiki"
    assert Read(MediaWikiSource(path)).articles["Ort 1"].paragraphs == (("", "Größe: 漢字."),)


def test_the_licence_of_other_wikis_is_given_by_the_user(tmp_path):
    path = write_dump(tmp_path / "a.xml", [page(1)], site="wiki.museum.example")
    assert MediaWikiSource(path, "CC0").snapshot().licence == "CC0"
    assert MediaWikiSource(path).snapshot().licence == "unknown"


def test_pages_that_are_not_used_are_counted_by_reason(tmp_path):
    bomb = '<!DOCTYPE page [<!ENTITY a "aaaa">]>'
    found = read(
        tmp_path, page(1), page(2, text=""), page(3, title=""), page(4, text="{{only a template}}"),
        page(5, text="x" * 5_000_000), "<page><title>x</page>\n", "<page><title>&a;</title></page>\n",
        f"<page>{bomb}<title>&a;</title></page>\n", page(6, ns=10), page(7, ns=10), page(8, ns=828),
        page(9, model="<model>css</model>"), page(10, model="<model>wikitext</model>"),
        page(11, model="<model>Scribunto</model>"), "<page><title>No revision</title><ns>0</ns></page>",
        "<page><title>Stub</title><ns>0</ns><revision><text bytes='77' id='5' /></revision></page>",
        "<page><title>Empty</title><ns>0</ns><revision><text bytes='0' /></revision></page>",
        "<page><title>Gone</title><ns>0</ns><revision><text deleted='deleted' /></revision></page>",
    )  # fmt: skip
    assert set(found.articles) == {"Ort 1", "Ort 10"}
    assert found.skipped == {
        "article has no text": 3, "page has no title": 1, "page is not XML": 3, "article is too large": 1,
        "page is in the namespace Vorlage": 2, "page is in the namespace 828": 1, "content model is css": 1,
        "content model is Scribunto": 1, "page has no revision": 1, "text is not in the dump": 1, "text is deleted": 1,
    }  # fmt: skip


def test_namespaces_of_old_dumps_are_read_from_the_titles(tmp_path):
    old = [text.replace("<ns>0</ns>",
    "") for text in (page(1), page(2, title="Vorlage:Ort"), page(3, title="Re: Zero"))]
    found = read(tmp_path, *old)
    assert set(found.articles) == {"Ort 1", "Re: Zero"} and found.skipped == {"page is in the namespace Vorlage": 1}


def test_a_page_without_an_end_or_a_beginning_is_counted(tmp_path):
    whole, broken = page(1), page(2)
    found = read(tmp_path, broken.replace("</page>", ""), whole, page(3))
    assert set(found.articles) == {"Ort 1", "Ort 3"} and found.skipped == {"page is not XML": 1}
    source = MediaWikiSource(write_dump(tmp_path / "b.xml", [whole, broken.replace("<page>", ""), page(3)]))
    assert Read(source).skipped == {"page is not XML": 1}


def test_a_page_that_never_ends_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("gog_edge.indexing.sources.mediawiki.dump.MAX_PIECE_BYTES", 10**6)
    monkeypatch.setattr(files, "CHUNK_BYTES", 2**30)
    pages = [page(1), page(2, text="word " * 900_000), page(3)]
    read = Read(MediaWikiSource(write_dump(tmp_path / "a.xml", pages)))
    assert set(read.articles) == {"Ort 1", "Ort 3"} and read.skipped == {"page is not XML": 1}


@pytest.mark.parametrize("suffix", [".xml", ".xml.bz2"])
def test_a_truncated_dump_yields_its_pages_before_the_error(tmp_path, suffix):
    path = write_dump(tmp_path / f"a{suffix}", [page(number) for number in range(1000)])
    path.write_bytes(path.read_bytes()[:-500])
    source = MediaWikiSource(path)
    source.snapshot()
    chunks = source.chunks()
    assert len([record for record in source.parse(next(chunks)) if hasattr(record, "paragraphs")]) == files.CHUNK_PIECES
    with pytest.raises(SourceError, match="truncated"):
        list(chunks)


@pytest.mark.parametrize("text", ["", "<mediawiki>", "<?xml version='1.0'?><html></html>", "<siteinfo><a></siteinfo>"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "a.xml"
    path.write_text(text)
    with pytest.raises(SourceError, match="does not begin with the header of a MediaWiki dump"):
        MediaWikiSource(path).snapshot()


@pytest.mark.parametrize(("magic", "name"), [(b"7z\xbc\xaf\x27\x1c", "7z"), (b"\x28\xb5\x2f\xfd", "Zstandard")])
def test_archives_that_are_not_read_are_refused_with_advice(tmp_path, magic, name):
    path = tmp_path / "dewiki-20240901-pages-meta-history.xml.7z"
    path.write_bytes(magic + b"\0" * 100)
    with pytest.raises(SourceError, match=rf"7z': it is a {name} file, which is not read: unpack it, or get a \.bz2"):
        open_source(path)


# --- revisions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "revisions",
    [
        (revision(1, "2010-01-01T00:00:00Z", "old"), revision(2, "2020-01-01T00:00:00Z", "new")),
        (revision(2, "2020-01-01T00:00:00Z", "new"), revision(1, "2010-01-01T00:00:00Z", "old")),
        (revision(9, "2020-01-01T00:00:00Z", "old"), revision(10, "2020-01-01T00:00:00Z", "new")),  # same second
        (revision(10, "2019-01-01T00:00:00Z", "old"), revision(9, "2020-01-01T00:00:00Z", "new")),  # imported later
        (revision(1, "2010-01-01T00:00:00Z", "old"), revision(2, "2020-01-01T00:00:00Z", "new"),
         revision(3, "2021-01-01T00:00:00Z", "", 'deleted="deleted"')),
    ],
    ids=["in order", "newest first", "same time", "ids out of order", "deleted text"],
)  # fmt: skip
def test_the_newest_revision_with_text_is_taken(tmp_path, revisions):
    assert read(tmp_path, history("A", *revisions)).articles["A"].paragraphs == (("", "new"),)


def test_a_history_of_many_megabytes_is_read_within_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr("gog_edge.indexing.sources.mediawiki.dump._COMPACT_BYTES", 2**20)
    monkeypatch.setattr("gog_edge.indexing.sources.mediawiki.dump.MAX_PIECE_BYTES", 3 * 2**20)
    old = [revision(number, f"2010-01-{1 + number % 28:02d}T00:00:00Z", "word " * 20_000) for number in range(100)]
    old.insert(50, revision(999, "2020-01-01T00:00:00Z", "The newest."))
    found = read(tmp_path, history("Long", *old), page(2))
    assert found.articles["Long"].paragraphs == (("", "The newest."),) and "Ort 2" in found.articles


# --- redirects --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "#REDIRECT [[River]]", "#redirect: [[River]]", " \n#Redirect[[river]]", "#WEITERLEITUNG [[River#Source]]",
        "#REDIRECTION [[River|the river]]", "#REDIRECCIÓN [[River]]", "#перенаправление [[River]]",
        "#ПЕРЕНАПР [[River]]",
        "#転送 [[River]]", "＃リダイレクト[[River]]", "#重定向 [[River]]", "#تحويل [[River]]", "#תחויל [[River]]",
        "#הפניה [[River]]",
        "#넘겨주기 [[River]]", "#अनुप्रेषित [[River]]", "#YÖNLENDİRME [[River]]", "#ΑΝΑΚΑΤΕΥΘΥΝΣΗ [[River]]",
        "#เปลี่ยนทาง [[River]]",
        "#REDIRECT [[River]]\n{{R from move}}\n[[Category:Old names]]", "#REDIRECT [[:River]]", "#REDIRECT [[River_]]",
        "#REDIRECT [[%52iver]]", "<!-- moved -->#REDIRECT [[River]]", "#UNKNOWNWORD [[River]]", "#đổi [[River]]",
    ],
)  # fmt: skip
def test_redirects_are_recognised_in_every_language(tmp_path, text):
    found = read(tmp_path, page(1, text, title="Old"), page(2, "A river.", title="River"))
    assert found.redirects == {"Old": "River"} and set(found.articles) == {"River"}


@pytest.mark.parametrize("text", ["#REDIRECT", "#REDIRECT [[]]", "#Weiterleitung: [[ ]]\n"])
def test_redirects_without_a_target_are_counted(tmp_path, text):
    assert read(tmp_path, page(1, text, title="A")).skipped == {"redirect has no target": 1}


@pytest.mark.parametrize("text", ["# First [[River]] is long.\n# Second",
"#redirects are [[River]] things that stay.", "No # [[River]]"])
def test_lists_are_no_redirects(tmp_path, text):
    found = read(tmp_path, page(1, text, title="A"))
    assert set(found.articles) == {"A"} and not found.redirects


@pytest.mark.parametrize(
    ("target", "reason"),
    [("Vorlage:Ort", "another namespace"), ("Category:Ort", "another namespace"),
    ("Wikipedia:Ort", "another namespace"),
     ("en:Place", "another wiki"), ("wikt:Ort", "another wiki"), ("A", "itself"), ("a#Teil", "itself")],
)  # fmt: skip
def test_redirects_that_lead_to_no_article_are_counted(tmp_path, target, reason):
    element = f'<redirect title="{target}" />'
    for text in (page(1, f"#WEITERLEITUNG [[{target}]]", title="A"), page(1, "x", title="A", redirect=element)):
        assert read(tmp_path, text).skipped == {f"redirect to {reason}": 1}


def test_titles_with_colons_are_articles(tmp_path):
    found = read(tmp_path, page(1, "#REDIRECT [[Re: Zero]]", title="Zero"), page(2, "Text.", title="Re: Zero"))
    assert found.redirects == {"Zero": "Re: Zero"}
