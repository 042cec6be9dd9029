"""What becomes of the entries of ZIM files of many makers: each is counted once, used or with the reason."""

import json
from collections import Counter

import pytest
from libzim.reader import Archive
from old_zim import metadata, write_old_zim
from reading import Read, check_contract
from zim_world import WIKIPEDIA, drawing, picture, write_world, write_zim

from gog_edge.indexing.build import build_pack
from gog_edge.indexing.sources.base import SharedFile, Skipped
from gog_edge.indexing.sources.zim import ZimSource

TEXT = "<p>Text.</p>"


def read(folder, *entries, redirects=(), **options):
    """Return what is read of a ZIM file with the entries (path, content[, media type[, title]])."""
    filled = [(path, (rest[1:] or [path])[0], content, (rest or ["text/html"])[0]) for path, content, *rest in entries]
    return check_contract(ZimSource(write_zim(folder / "made.zim", filled, redirects, **options)))


def text_of(found, key):
    return [text for _, text in found.articles[key].paragraphs]


# --- every entry is counted ---------------------------------------------------------------------


def counts_of(archive, number_of_entries):
    """Return libzim's own counts: entries by media type, and redirects."""
    entries = [archive._get_entry_by_id(number) for number in range(number_of_entries)]
    return Counter("redirect" if entry.is_redirect else entry.get_item().mimetype for entry in entries)


def test_items_used_and_skipped_equal_the_items_that_libzim_counts(tmp_path):
    path = write_world(tmp_path / "world.zim", 60)
    archive, source = Archive(path), ZimSource(path)
    stored = dict(part.split("=") for part in source.metadata()["Counter"].split(";"))
    kinds = counts_of(archive, archive.entry_count)
    assert {kind: int(count) for kind, count in stored.items()} | {"redirect": 21} == kinds
    found = check_contract(source)
    assert found.present == {"entry": archive.entry_count} and kinds.total() == archive.entry_count
    files = Counter(found.files().values())
    images = sum(count for kind, count in kinds.items() if kind.startswith("image/"))
    assert files.total() == images + kinds["text/css"] and files["file is a style sheet"] == 1
    assert files[""] == len({image.attribution for image in found.images if "_assets_" in image.attribution})
    assert files["image is shown in no article"] > 50
    pages = sum(skipped.kind == "entry" and "redirect" not in skipped.reason for skipped in found.of(Skipped))
    assert len(found.articles) + pages == kinds["text/html"]


def test_the_report_of_a_pack_adds_up(tmp_path):
    path = write_world(tmp_path / "world.zim", 60)
    build_pack(ZimSource(path), tmp_path / "pack", name="x", encoder=None, workers=1)
    report = json.loads((tmp_path / "pack/reports/000001.json").read_text())
    ((kind, present, used),) = [(item["kind"], item["present"], item["used"]) for item in report["items"]]
    skipped = sum(row["count"] for row in report["skipped"] if row["kind"] == kind)
    assert kind == "entry" and present == Archive(path).entry_count == used + skipped
    found = Read(ZimSource(path))
    reasons = Counter(found.files().values())
    by_reason = {row["reason"]: row["count"] for row in report["skipped"] if row["kind"] == kind}
    assert all(by_reason[reason] == count for reason, count in reasons.items() if reason)
    assert used == len(found.articles) + len(found.redirects) + reasons[""]


def test_a_file_of_several_articles_counts_once(tmp_path):
    image, icon = '<img src="a.png" alt="x">', '<img src="a.png" width="16">'
    found = read(tmp_path, ("A", TEXT + icon), ("B", TEXT + image), ("C", TEXT + image), ("D", TEXT + icon),
                 ("a.png", picture(1, "PNG"), "image/png"))  # fmt: skip
    assert found.files() == {"a.png": ""} and len(found.images) == 2
    assert found.skipped == {"image is an icon": 2}


def test_other_files_are_counted_by_what_they_are(tmp_path):
    kinds = {
        "application/pdf": "file is a PDF document", "application/epub+zip": "file is an EPUB book",
        "video/webm": "file is a video", "audio/ogg": "file is a sound", "text/plain": "file is plain text",
        "text/css": "file is a style sheet", "application/javascript": "file is a script",
        "text/javascript; charset=utf-8": "file is a script", "font/woff2": "file is a font",
        "application/font-woff": "file is a font", "application/json": "file is data",
        "application/wasm": "file is of another type", "image/png": "image is shown in no article",
    }  # fmt: skip
    files = [(f"f{number:02d}", b"content", kind) for number, kind in enumerate(kinds)]
    found = read(tmp_path, ("A", TEXT), *files)
    assert found.files() == {f"f{number:02d}": reason for number, reason in enumerate(kinds.values())}


def test_pages_that_cannot_be_used_are_counted(tmp_path):
    found = read(tmp_path, ("A", TEXT), ("Empty", "<html></html>"), ("Deep", "<div>" * 5000),
                 ("Large", "<p>x</p>" * 1_200_000), ("Lost", '<link href="download_error_placeholder.css">'))
    assert found.skipped == {"article has no text": 1, "article is nested too deeply": 1, "article is too large": 1,
                             "article was not downloaded": 1}
    assert {skipped.kind for skipped in found.of(Skipped)} == {"entry"}


def test_redirects_are_counted_by_where_they_lead(tmp_path):
    page = ("A/Here", "Here", TEXT.encode(), "text/html")
    path = write_old_zim(
        tmp_path / "old.zim", [page, ("A/Empty", "Empty", b"<p></p>", "text/html"), ("I/a.css", "", b"x", "text/css")],
        [("A/R1", "Once", "A/Here"), ("A/R2", "Twice", "A/R1"), ("A/Loop1", "L1", "A/Loop2"),
         ("A/Loop2", "L2", "A/Loop1"), ("A/Self", "Self", "A/Self"), ("A/Style", "Style", "I/a.css"),
         ("A/To_empty", "To empty", "A/Empty"), ("A/Other_name", "", "A/Here"), ("A/Sign", "→", "A/Here")])
    assert Archive(path).check()
    found = check_contract(ZimSource(path))
    assert found.redirects == {"Once": "A/Here", "Twice": "A/Here", "To empty": "A/Empty", "Other name": "A/Here"}
    assert found.skipped == {"redirect does not end": 3, "redirect to a file that is not an article": 1,
                             "name of a redirect has no word": 1, "article has no text": 1}
    build_pack(ZimSource(path), tmp_path / "pack", name="x", encoder=None, workers=1)
    report = json.loads((tmp_path / "pack/reports/000001.json").read_text())
    assert report["items"] == [{"kind": "entry", "present": 12, "used": 4}]
    rows = {row["reason"]: row["count"] for row in report["skipped"] if row["kind"] == "entry"}
    assert rows["redirect to a missing article"] == 1 and sum(rows.values()) == 8


# --- media types and charsets -------------------------------------------------------------------


def test_xhtml_pages_are_read_as_xml(tmp_path):
    page = ('<?xml version="1.0" encoding="UTF-8"?><html xmlns="http://www.w3.org/1999/xhtml"><head><title/>'
            '<script src="a.js"/></head><body><p>One<br/>two <a id="x"/>three &amp; <![CDATA[1 < 2]]>.</p><div/>'
            '<p>Four.</p><img src="a.png" alt="Seen"/><!-- <p/> --></body></html>')
    found = read(tmp_path, ("A", page, "application/xhtml+xml"), ("B", page, "Application/XHTML+XML; charset=utf-8"),
                 ("a.png", picture(1, "PNG"), "image/png"))  # fmt: skip
    assert text_of(found, "A") == text_of(found, "B") == ["One\ntwo three & 1 < 2.", "Four."]
    assert [image.caption for image in found.images] == ["Seen", "Seen"]


def test_parameters_of_the_media_type_do_not_matter(tmp_path):
    kinds = ("text/html;charset=UTF-8", "text/html; charset=utf-8", "TEXT/HTML", "text/html;raw=true")
    found = read(tmp_path, *((f"p{number}", TEXT, kind) for number, kind in enumerate(kinds)))
    assert len(found.articles) == len(kinds)


def test_pages_without_a_media_type_are_recognised(tmp_path):
    found = read(tmp_path, ("A", "<!DOCTYPE html><html><body><p>Text.</p></body></html>", "application/octet-stream"),
                 ("B", b"\0\1\2", "application/octet-stream"))
    assert set(found.articles) == {"A"} and found.files() == {"B": "file is of another type"}


def test_redirects_to_pages_without_a_media_type_are_read(tmp_path):
    page = '<!DOCTYPE html><html><body><p>Text.</p><img src="B"></body></html>'
    found = read(tmp_path, ("A", page, "application/octet-stream"), ("B", page, ""), ("C", b"\0\1", ""),
                 redirects=[("R", "To A", "A"), ("S", "To B", "B"), ("T", "To C", "C")])
    assert found.redirects == {"To A": "A", "To B": "B"}
    assert found.skipped["redirect to a file that is not an article"] == 1 and found.files() == {
        "C": "file is of another type"}


CHARSETS = {
    "windows-1251": "Река течёт через город.", "koi8-r": "Река течёт через город.", "iso-8859-1": "Où est l’été ? 5 €",
    "shift_jis": "川は市を流れる。", "euc-jp": "川は市を流れる。", "gb2312": "河流穿过城市。", "big5": "河流穿過城市。",
    "euc-kr": "강은 도시를 흐른다.", "iso-2022-jp": "川は市を流れる。", "utf-16": "Fluß", "tis-620": "แม่น้ำ",
    "windows-1256": "نهر في المدينة",
}  # fmt: skip
_WRITTEN_AS = {"iso-8859-1": "windows-1252", "utf-16": "utf-16-le"}


@pytest.mark.parametrize(
    ("charset", "text", "where"),
    [(charset, text, where) for charset, text in CHARSETS.items() for where in ("media type", "meta", "http-equiv")
     if charset != "utf-16" or where == "media type"])  # fmt: skip
def test_pages_in_other_charsets_are_decoded(tmp_path, charset, text, where):
    head = {"media type": "", "meta": f'<meta charset="{charset}">',
            "http-equiv": f'<meta http-equiv="Content-Type" content="text/html; charset={charset}">'}[where]
    kind = f"text/html; charset={charset}" if where == "media type" else "text/html"
    data = f"<html><head>{head}</head><body><p>{text}</p></body></html>".encode(_WRITTEN_AS.get(charset, charset))
    assert text_of(read(tmp_path, ("A", data, kind)), "A") == [text]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("\ufeff<p>é</p>".encode(), "é"),
        ("\ufeff<p>é</p>".encode("utf-16-le"), "é"),
        ('<meta charset="iso-8859-1"><p>déjà</p>'.encode(), "déjà"),  # converted, but it still names the old charset
        ("<p>déjà vu</p>".encode("windows-1252"), "déjà vu"),
        ("<p>Река течёт".encode() + b"\xff</p>", "Река течёт\ufffd"),
        (b'<meta charset="nonsense"><p>caf\xe9</p>', "café"),
        (b'<meta charset="base64"><p>caf\xe9</p>', "café"),
        (b'<meta charset="utf-16"><p>caf\xc3\xa9</p>', "café"),
    ],
)
def test_the_charset_is_found_without_a_right_name(tmp_path, data, text):
    assert text_of(read(tmp_path, ("A", data)), "A") == [text]


# --- images -------------------------------------------------------------------------------------

PNG = picture(1, "PNG")


@pytest.mark.parametrize(
    ("page", "address", "stored"),
    [
        ("A", "i/a.png", "i/a.png"),
        ("A", "./i/a.png", "i/a.png"),
        ("deep/er/A", "../../i/a.png", "i/a.png"),
        ("A", "../../i/a.png", "i/a.png"),  # browsers stop at the root
        ("A", "/i/a.png", "i/a.png"),
        ("A", "i/a%20b%C3%A9.png", "i/a bé.png"),
        ("A", "i/a bé.png", "i/a bé.png"),
        ("A", "i/a%3Fsize%3D2.png", "i/a?size=2.png"),
        ("A", "i/a.php?id=2&amp;w=3", "i/a.php?id=2&w=3"),
        ("A", "i/a.png?v=3", "i/a.png"),
        ("A", "i/a.png#top", "i/a.png"),
        ("A", "i/a%20b.png", "i/a%20b.png"),
        ("A", " i/a.png\n", "i/a.png"),
        ("A", "i\\a.png", "i/a.png"),
        ("A", "File:a.png", "File:a.png"),
    ],
)
def test_addresses_are_resolved_as_in_a_browser(tmp_path, page, address, stored):
    found = read(tmp_path, (page, f'{TEXT}<img src="{address}" alt="x">'), (stored, PNG, "image/png"))
    assert [image.attribution for image in found.images] == [f"Wikipedia, {stored}"] and not found.skipped
    assert found.files() == {stored: ""}


@pytest.mark.parametrize(
    ("base", "address", "stored"),
    [("../", "a.png", "a.png"), ("/i/", "a.png", "i/a.png"), ("i/x.html", "a.png", "deep/i/a.png"),
     ("https://example.org/i/", "a.png", "example.org/i/a.png")],
)
def test_the_base_address_of_a_page_is_used(tmp_path, base, address, stored):
    page = f'<head><base href="{base}"></head><body>{TEXT}<img src="{address}" alt="x"></body>'
    found = read(tmp_path, ("deep/A", page), (stored, PNG, "image/png"))
    assert len(found.images) == 1 and found.files() == {stored: ""}


@pytest.mark.parametrize("address", ["http://[bad/a.png", "http://example.org/a.png", "//x/a.png", "none.png", "%",
                                     "A"])  # fmt: skip
def test_what_is_not_in_the_file_is_said(tmp_path, address):
    found = read(tmp_path, ("A", f'{TEXT}<img src="{address}">'))
    assert found.skipped == {"image is not in the snapshot": 1} and not found.images


@pytest.mark.parametrize(
    ("html", "used"),
    [
        ('<img srcset="s.png 1x, m.png 2x">', "m.png"),
        ('<img src="s.png" srcset="m.png 1.5x, l.png 2x">', "l.png"),
        ('<img src="s.png" srcset="m.png 1.5x, none.png 2x">', "m.png"),
        ('<img srcset="m.png 200w,l.png 400w, s.png 100w" sizes="50vw">', "l.png"),
        ('<picture><source srcset="l.png 2x"><img src="s.png"></picture>', "l.png"),
        ('<picture><source type="image/x-unknown" srcset="bad.bin 2x"><img src="s.png"></picture>', "s.png"),
        ('<picture><source data-srcset="m.png"><img alt="x"></picture>', "m.png"),
        ('<img src="none.png" data-src="s.png">', "s.png"),
        ('<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=" data-src="s.png">', "s.png"),
        ('<img data-lazy-src="s.png">', "s.png"),
        ('<img data-original="s.png" src="">', "s.png"),
        ('<noscript><img src="s.png"></noscript>', "s.png"),
        ('<img class="lazy" data-src="s.png"><noscript><img src="s.png"></noscript>', "s.png"),
        ('<video poster="s.png"><source src="v.webm">Your browser plays no video.</video>', "s.png"),
        ('<object type="image/png" data="s.png">Your browser shows no objects.</object>', "s.png"),
        ('<img src="name">', "s.png"),
    ],
)
def test_the_best_candidate_of_an_image_is_read(tmp_path, html, used):
    files = [(f"{name}.png", picture(number, "PNG"), "image/png") for number, name in enumerate("sml")]
    found = read(tmp_path, ("A", f"{TEXT}<div>{html}</div>"), *files, ("bad.bin", b"\0", "image/x-unknown"),
                 redirects=[("name", "Name", "s.png")])
    assert [image.attribution for image in found.images] == [f"Wikipedia, {used}"]
    assert text_of(found, "A") == ["Text."]
    assert found.files()[used] == "" and list(found.files().values()).count("") == 1


@pytest.mark.parametrize(("kind", "data"), [("webp", picture(1)), ("gif", picture(1, "GIF", mode="P")),
                                            ("jpeg", picture(1, "JPEG")), ("svg+xml", drawing(1)),
                                            ("avif", picture(1, "AVIF"))])  # fmt: skip
def test_images_of_every_format_are_read(tmp_path, kind, data):
    found = read(tmp_path, ("A", f'{TEXT}<img src="a" alt="x">'), ("a", data, f"image/{kind}"))
    assert len(found.images) == 1 and found.files() == {"a": ""}


def test_an_image_without_its_media_type_is_used_and_counted_once(tmp_path):
    found = read(tmp_path, ("A", f'{TEXT}<img src="a" alt="x">'), ("a", PNG, "application/octet-stream"))
    assert len(found.images) == 1 and found.files() == {"a": ""}


# --- older files, other makers ------------------------------------------------------------------


def test_namespaces_of_old_files_are_read(tmp_path):
    page = (b'<html><head><title>Ignored</title></head><body><h1>Berlin</h1><p>A city.</p><img src="../I/m/a%20b.png">'
            b'<img src="/I/m/c.png"></body></html>')
    images = [("I/m/a b.png", "", PNG, "image/png"), ("I/m/c.png", "", picture(2, "PNG"), "image/png")]
    path = write_old_zim(
        tmp_path / "old.zim",
        [("A/Berlin.html", "", page, "text/html"), ("A/AC/DC", "AC/DC", b'<p>A band.</p><img src="../../I/m/a b.png">',
         "text/html"), ("-/style.css", "", b"", "text/css"), ("X/fulltext", "", b"", "application/octet-stream"),
         *images, *metadata(Name=b"wikipedia_de", Date=b"2015-03-01", Creator=b"Wikipedia")],
        [("-/favicon", "", "I/m/a b.png")])  # fmt: skip
    assert Archive(path).check() and not Archive(path).has_new_namespace_scheme
    found = check_contract(ZimSource(path))
    assert {key: article.title for key, article in found.articles.items()} == {"A/Berlin.html": "Berlin",
                                                                              "A/AC/DC": "AC/DC"}
    assert found.files() == {"-/style.css": "file is a style sheet", "I/m/a b.png": "", "I/m/c.png": ""}
    assert found.skipped == {"redirect to a file that is not an article": 1,
                             "entry is metadata or an index of the ZIM file": 4}
    assert {article.licence for article in found.articles.values()} == {"CC BY-SA 3.0"}


@pytest.mark.parametrize(
    ("values", "name", "date", "licence"),
    [
        ({"Title": b"\xff\xfeMus\xc3\xa9e", "Date": b"\xff\xff", "Name": b"\xff"}, "Musée", "2021-05-06", "unknown"),
        ({"Name": b"kiwix.wikipedia_en_all", "Date": b"20230701"}, "kiwix.wikipedia_en_all", "2023-07-01",
         "CC BY-SA 4.0"),
        ({"Name": b"x\0y\n z", "Date": b"2014/02/03", "Creator": b"Wikipedia"}, "xy z", "2014-02-03", "CC BY-SA 3.0"),
        ({"Date": b"9999-99-99", "License": b"CC0\0"}, "museum_2021-05-06", "2021-05-06", "CC0"),
        ({}, "museum_2021-05-06", "2021-05-06", "unknown"),
    ],
)
def test_metadata_may_be_missing_or_bad(tmp_path, values, name, date, licence):
    page = ("A/Here", "Here", TEXT.encode(), "text/html")
    source = ZimSource(write_old_zim(tmp_path / "museum_2021-05-06.zim", [page, *metadata(**values)]))
    snapshot = source.snapshot()
    assert (snapshot.name, snapshot.date, snapshot.licence) == (name, date, licence)
    source.metadata()


SITE = {"Scraper": "warc2zim 2.1.0, zimit 2.1.1", "Title": "A site", "Date": "2026-01-01"}


@pytest.mark.parametrize("folder", ["", "A/"])
def test_web_archives_are_read(tmp_path, folder):
    page = ('<html><head><title>About us</title></head><body><header><nav>Home</nav></header><main><h1>About</h1>'
            '<p>We are here.</p><img src="/i/a.png?w=2" alt="One"><img src="https://cdn.example.net/b.png" alt="Two">'
            '<img src="../i/c.png" alt="Three"></main></body></html>')
    viewer = "<html><body><p>This page needs a service worker.</p></body></html>"
    statics = "_zim_static/" if not folder else "A/"
    found = read(
        tmp_path, (f"{folder}example.org/about/", page, "text/html", ""), (f"{statics}index.html", viewer),
        (f"{statics}404.html", viewer), (f"{statics}load.js", "x", "application/javascript"),
        (f"{statics}sw.js", "x", "application/javascript"), (f"{folder}example.org/index.html", TEXT),
        (f"{folder}example.org/i/a.png?w=2", PNG, "image/png"), (f"{folder}cdn.example.net/b.png", picture(2, "PNG"),
        "image/png"), (f"{folder}example.org/i/c.png", picture(3, "PNG"), "image/png"),
        ("H/example.org/about/", "HTTP/1.1 200 OK", "application/warc-headers"),
        metadata=SITE if not folder else {"Title": "A site"})  # fmt: skip
    assert set(found.articles) == {f"{folder}example.org/about/", f"{folder}example.org/index.html"}
    assert found.articles[f"{folder}example.org/about/"].title == "About"
    assert [image.caption for image in found.images] == ["One", "Two", "Three"]
    assert found.skipped == {"page belongs to the viewer of the archive": 2}
    assert found.files()["H/example.org/about/"] == "file is headers of a web archive"


def test_pages_of_other_archives_are_no_viewer(tmp_path):
    found = read(tmp_path, ("index.html", TEXT), ("404.html", TEXT), ("sw.js", "x", "application/javascript"))
    assert set(found.articles) == {"index.html", "404.html"}


@pytest.mark.parametrize(
    ("path", "title", "html", "expected"),
    [
        ("A", "Given", "<head><title>Head</title></head><h1>Top</h1>", "Given"),
        ("questions/1/how-to", "", "<head><title>Head</title></head><h1>How to do it</h1>", "How to do it"),
        ("b.html", "", "<head><title>Head</title></head>", "Head"),
        ("Two_words.html", "", "", "Two words"),
    ],
)
def test_titles_come_from_the_entry_the_page_or_the_path(tmp_path, path, title, html, expected):
    found = read(tmp_path, (path, html + TEXT, "text/html", title))
    assert found.articles[path].title == expected


def test_another_size_of_an_image_is_counted(tmp_path):
    found = read(tmp_path, ("A", f'{TEXT}<img src="s.png" srcset="l.png 2x" alt="x">'), ("s.png", PNG, "image/png"),
                 ("l.png", picture(2, "PNG"), "image/png"), metadata=WIKIPEDIA)
    assert found.files() == {"s.png": "another size of the image is in the pack", "l.png": ""}
    assert [shared.article for shared in found.of(SharedFile) if shared.item == "s.png"] == ["A", ""]


def test_an_article_that_the_pack_refuses_is_counted_with_its_images(tmp_path):
    entries = [("A", "Here", TEXT, "text/html"), ("B", "→", f'{TEXT}<img src="a.png">', "text/html"),
               ("a.png", "", PNG, "image/png")]
    path = write_zim(tmp_path / "made.zim", entries, [("R", "Sign", "B")])
    build_pack(ZimSource(path), tmp_path / "pack", name="x", encoder=None, workers=1)
    report = json.loads((tmp_path / "pack/reports/000001.json").read_text())
    assert report["items"] == [{"kind": "entry", "present": 4, "used": 1}]
    rows = {row["reason"]: row["count"] for row in report["skipped"] if row["kind"] == "entry"}
    assert rows == {"title has no word": 2, "redirect to a missing article": 1}
