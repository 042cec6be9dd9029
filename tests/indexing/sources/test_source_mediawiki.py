"""MediaWiki XML dumps, and the wikitext in them."""

import bz2
import gzip
from html import escape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import Read, check_contract

from gog_edge.errors import SourceError
from gog_edge.indexing.sources import files
from gog_edge.indexing.sources.mediawiki import MediaWikiSource, parse_wikitext
from gog_edge.indexing.sources.text import MAX_CHARACTERS

SITE = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">
  <siteinfo><sitename>Wikipedia</sitename><dbname>dewiki</dbname><base>https://{}/wiki/Start</base>
    <namespaces><namespace key="-2" case="first-letter">Medium</namespace><namespace key="0" case="first-letter" />
      <namespace key="6" case="first-letter">Datei</namespace>
      <namespace key="14" case="first-letter">Kategorie</namespace>
    </namespaces></siteinfo>
"""
TEXT = """{{Infobox Ort|name=X|bild=[[Datei:Y.jpg]]}}
'''Ort {0}''' ist ein ''Ort'' an der [[Elbe|schönen Elbe]].<ref>Buch, S. {0}.</ref> Siehe [[Haus]].

[[Datei:Bild.jpg|thumb|Ein [[Bild]] von hier]]
== Geschichte ==
Der Ort wurde&nbsp;{0} gegründet.
=== Frühe Zeit ===
* Erstens
* Zweitens <!-- nicht -->
{{| class="wikitable"
| a || b
|}}
== References ==
<references />
* no
== Lage ==
Im Norden.
[[Kategorie:Ort]]
"""


def page(number, text=None, **fields):
    text = escape(TEXT.format(number) if text is None else text, quote=False)
    values = {"title": f"Ort {number}", "ns": 0, "redirect": ""} | fields
    return (f"  <page>\n    <title>{values['title']}</title>\n    <ns>{values['ns']}</ns>\n    <id>{number}</id>"
            f"{values['redirect']}\n    <revision><text bytes=\"9\" xml:space=\"preserve\">{text}</text>"
            "</revision>\n  </page>\n")  # fmt: skip


def write_dump(path, pages, site="de.wikipedia.org", end="</mediawiki>\n"):
    data = (SITE.format(site) + "".join(pages) + end).encode()
    # Level 1 has blocks of 100 kB, so that a truncated file yields some.
    packed = {".bz2": bz2.compress(data, 1), ".gz": gzip.compress(data, 1)}
    path.write_bytes(packed.get(path.suffix, data))
    return path


@pytest.mark.parametrize("suffix", [".xml", ".xml.bz2", ".xml.gz"])
def test_articles_are_read_with_their_sections(tmp_path, suffix):
    pages = [page(number) for number in range(700)]
    pages[5:5] = [page(9001, ns=1), page(9002, redirect='<redirect title="Ort 3" />', title="Alter Ort &amp; mehr")]
    path = write_dump(tmp_path / f"dewiki-20240901-pages-articles{suffix}", pages)
    source = MediaWikiSource(path)
    snapshot = source.snapshot()
    assert (snapshot.name, snapshot.date, snapshot.licence) == ("dewiki", "2024-09-01", "CC BY-SA 4.0")
    read = check_contract(source)
    assert len(read.articles) == 700 and len(read.chunks) == 3 and not read.skipped and not read.images
    assert read.redirects == {"Alter Ort & mehr": "Ort 3"}
    assert read.articles["Ort 7"].paragraphs == (
        ("", "Ort 7 ist ein Ort an der schönen Elbe. Siehe Haus."),
        ("Geschichte", "Der Ort wurde 7 gegründet."),
        ("Geschichte / Frühe Zeit", "Erstens\nZweitens"),
        ("Lage", "Im Norden."),
    )


def test_the_licence_of_other_wikis_is_given_by_the_user(tmp_path):
    path = write_dump(tmp_path / "a.xml", [page(1)], site="wiki.museum.example")
    assert MediaWikiSource(path, "CC0").snapshot().licence == "CC0"
    assert MediaWikiSource(path).snapshot().licence == "unknown"


def test_unusable_pages_are_skipped(tmp_path):
    bomb = '<!DOCTYPE page [<!ENTITY a "aaaa">]>'
    pages = [page(1), page(2, text=""), page(3, title=""), page(4, text="{{only a template}}"),
             page(5, text="x" * 5_000_000), "<page><title>x</page>\n", "<page><title>&a;</title></page>\n",
             f"<page>{bomb}<title>&a;</title></page>\n"]
    read = Read(MediaWikiSource(write_dump(tmp_path / "a.xml", pages)))
    assert set(read.articles) == {"Ort 1"}
    assert read.skipped == {
        "article has no text": 2, "page has no title": 1, "page is not XML": 3, "article is too large": 1}


def test_a_page_without_end_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("gog_edge.indexing.sources.mediawiki.MAX_PIECE_BYTES", 10**6)
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
    assert len(list(source.parse(next(chunks)))) == files.CHUNK_PIECES
    with pytest.raises(SourceError, match="truncated"):
        list(chunks)


@pytest.mark.parametrize("text", ["", "<mediawiki>", "<?xml version='1.0'?><html></html>", "<siteinfo><a></siteinfo>"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "a.xml"
    path.write_text(text)
    with pytest.raises(SourceError, match="does not begin with the header of a MediaWiki dump"):
        MediaWikiSource(path).snapshot()


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("[[A|b]]s and [[:Category:C]]", "bs and Category:C"), ("[https://x.example Site] [https://x.example]", "Site"),
        ("a<br>b", "a\nb"), ("<nowiki>[[x]]</nowiki>", "[[x]]"), ("x<sup>2</sup> &amp; &eacute;", "x2 & é"),
        ("a<math>x^2</math>b<gallery>\nA.jpg|c\n</gallery>", "ab"), ("# one\n## two", "one\ntwo"), ("__NOTOC__ a", "a"),
        ("{| \n| open table\nText.", "Text."), ("[[Image:A.jpg|thumb|x [[y]] z]]a", "a"), ("'''''a''''' ''b''", "a b"),
        ("Москва {{lang|ru|x}} 東京", "Москва 東京"), ("<div class='x'>\nin <span>it</span></div>", "in it"),
        ("a {{{arg|b}}} c", "a c"), ("a<!-- b -->c", "ac"),
    ],
)  # fmt: skip
def test_markup_becomes_the_visible_text(wikitext, text):
    assert "\n".join(shown for _, shown in parse_wikitext(wikitext)) == text


PIECES = st.sampled_from(
    ["{{", "}}", "[[", "]]", "|", "{|", "|}", "''", "'''", "== a ==\n", "===", "<ref>", "</ref>", "<!--", "-->", "\n",
     "* ", "<nowiki>", "</nowiki>", "File:", "[http://x ", "]", "<br>", "<b>", "</b>", "&amp;", "&#xD800;", "&#0;",
     "&nosuch;",
     "{{{", "}}}", "<table>", "<td>", "=", ":", "__TOC__"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES | st.text(max_size=15), max_size=40))
def test_any_wikitext_is_parsed(pieces):
    for section, text in parse_wikitext("".join(pieces)):
        assert text and text == text.strip() and len(text) <= MAX_CHARACTERS
        (section + text).encode()
