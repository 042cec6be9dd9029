"""Folders of pictures with a table, with text files, or with nothing but file names."""

import codecs
import importlib.util
import io
import json
import os
import struct
import sys
import time
import unicodedata

import numpy as np
import pytest
from PIL import Image
from reading import Read, check_contract
from zim_world import drawing, picture

from gog_edge.errors import SourceError
from gog_edge.indexing.sources.base import Skipped
from gog_edge.indexing.sources.folder import CHUNK_FILES, FolderSource
from gog_edge.indexing.sources.folder.listing import list_files
from gog_edge.retrieval.text.tokens import name_key


def write_pictures(folder, names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP", ".tif": "TIFF"}.get(path.suffix.lower())
        path.write_bytes(picture(number, kind, 90, 70) if kind else drawing(number))


def test_titles_and_captions_come_from_a_table(tmp_path):
    write_pictures(tmp_path, ["a.jpg", "Room 1/b.png"])
    (tmp_path / "list.csv").write_text(
        'File,TITLE,Caption,text,License,Attribution\na.jpg,"Vase, blue",A vase,"It is old.\n\nIt is blue.",CC0,Ann\n'
        "Room 1\\b.png,Bowl,,,,\n", encoding="utf-8")
    read = check_contract(FolderSource(tmp_path, licence="ours"))
    vase, bowl = read.articles["a.jpg"], read.articles["Room 1/b.png"]
    assert (vase.title, vase.licence) == ("Vase, blue", "CC0")
    assert vase.paragraphs == (("", "It is old."), ("", "It is blue."))
    assert (bowl.title, bowl.licence, bowl.paragraphs) == ("Bowl", "ours", (("Room 1", "Bowl"),))
    (shown,) = read.images_of("a.jpg")
    assert (shown.caption, shown.licence, shown.attribution, shown.lead) == ("A vase", "CC0", "Ann", True)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_tables_with_any_delimiter_and_encoding_are_read(tmp_path, delimiter, encoding):
    write_pictures(tmp_path, ["a.jpg"])
    text = delimiter.join(("title", "file")) + "\r\n" + delimiter.join(("Café", "a.jpg")) + "\r\n"
    (tmp_path / "list.csv").write_bytes(text.encode(encoding))
    assert Read(FolderSource(tmp_path)).articles["a.jpg"].title == "Café"


def test_a_text_file_of_the_same_name_is_the_article(tmp_path):
    write_pictures(tmp_path, ["vase.jpg", "hall/bowl.PNG"])
    (tmp_path / "vase.txt").write_bytes(codecs.BOM_UTF8 + "Ваза\nПервая строка.\n\nВторая.".encode())
    (tmp_path / "hall" / "bowl.md").write_text("# A bowl\n", encoding="utf-8")
    read = Read(FolderSource(tmp_path))
    assert read.articles["vase.jpg"].title == "Ваза"
    assert read.articles["vase.jpg"].paragraphs == (("", "Первая строка."), ("", "Вторая."))
    assert read.articles["hall/bowl.PNG"].paragraphs == (("hall", "A bowl"),)
    assert [image.caption for image in read.images] == ["A bowl", "Ваза"]


def test_without_a_text_the_file_name_is_the_title(tmp_path):
    write_pictures(tmp_path, ["East wing/Case 2/blue_vase-1.tif", "b.svg", "c.webp"])
    read = Read(FolderSource(tmp_path))
    article = read.articles["East wing/Case 2/blue_vase-1.tif"]
    assert (article.title, article.paragraphs) == ("blue vase-1", (("East wing / Case 2", "blue vase-1"),))
    assert len(read.images) == 3


def test_large_folders_are_split_into_chunks(tmp_path):
    write_pictures(tmp_path, [f"{number % 3}/p{number:03d}.png" for number in range(CHUNK_FILES * 2 + 10)])
    read = check_contract(FolderSource(tmp_path))
    assert [chunk.size for chunk in read.chunks] == [CHUNK_FILES, CHUNK_FILES, 10]


def test_unusable_files_are_skipped(tmp_path):
    write_pictures(tmp_path, ["a.jpg", "small.png"])
    (tmp_path / "small.png").write_bytes(picture(1, "PNG", 12, 12))
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xffno")
    (tmp_path / ".hidden.jpg").write_bytes(b"")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    rows = ("file\ttitle", "gone.jpg\tGone", "../a.jpg\tOut", "/etc/passwd\tOut", "\tNone", "a.jpg\tHere")
    (tmp_path / "list.tsv").write_text("\n".join(rows))
    read = check_contract(FolderSource(tmp_path))
    assert set(read.articles) == {"a.jpg", "small.png"}  # small pictures of a collection are not icons
    assert read.skipped == {
        "image does not decode": 1, "hidden or system file": 1, "file is not a picture": 1,
        "file in the table is missing": 1, "name in the table leads outside of the folder": 2,
        "row of the table names no file": 1,
    }  # fmt: skip
    assert read.present == {"file": 6, "table row": 5} and read.used == {"file": 3, "table row": 1}


def test_file_names_in_another_encoding_are_read(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(picture(1, "PNG"))
    FolderSource(tmp_path).snapshot()
    (article,) = Read(FolderSource(tmp_path)).articles.values()
    assert article.key == "café.png" and article.title == "café"


def test_the_snapshot_hash_covers_texts_and_pictures(tmp_path):
    write_pictures(tmp_path, ["a.jpg"])
    first = FolderSource(tmp_path).snapshot()
    assert first.name == tmp_path.name and first == FolderSource(tmp_path).snapshot()
    (tmp_path / "a.txt").write_text("A vase")
    second = FolderSource(tmp_path).snapshot()
    write_pictures(tmp_path, ["b.jpg"])
    assert len({first.sha256, second.sha256, FolderSource(tmp_path).snapshot().sha256}) == 3


def test_folders_without_pictures_are_refused(tmp_path):
    (tmp_path / "list.csv").write_text("file,title\na.jpg,A\n")
    with pytest.raises(SourceError, match="contains no picture"):
        FolderSource(tmp_path).snapshot()


# --- tables that are hard to read: one line of the report each ----------------------------------


def table_of(folder, text, name="list.csv", encoding="utf-8"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(text.encode(encoding))
    return check_contract(FolderSource(folder))


def test_a_table_without_a_column_of_files_is_named_with_its_columns(tmp_path):
    write_pictures(tmp_path, ["a.jpg"])
    read = table_of(tmp_path, "Werk,Titel,Text\nx1,Blue vase,A vase.\nx2,Bowl,\n")
    (notice,) = read.notices
    assert "list.csv" in notice and "'Werk', 'Titel', 'Text'" in notice and "--column file=NAME" in notice
    assert read.skipped == {"table has no column that names a picture": 3}  # the file and its two rows
    assert read.articles["a.jpg"].title == "a" and read.used == {"file": 1}


def test_a_column_of_any_name_whose_cells_name_pictures_is_used(tmp_path):
    write_pictures(tmp_path, ["a.jpg", "b.jpg"])
    read = table_of(tmp_path, "Werk,Titel,Weight\na.jpg,Blue vase,3\nb,Bowl,4\n")
    assert [article.title for article in read.articles.values()] == ["Blue vase", "Bowl"]
    assert any("'Werk' is taken as the file name" in notice for notice in read.notices)
    assert any("not used: 'Weight'" in notice for notice in read.notices)


def test_a_column_is_given_by_the_user(tmp_path):
    write_pictures(tmp_path, ["17.jpg"])
    (tmp_path / "list.csv").write_text("Nr alt;Was;Mehr\n17;Vase;Blau.\n")
    given = (("file", "nr alt"), ("title", "Was"), ("text", "Mehr"))
    source = FolderSource(tmp_path, columns=given)
    source.snapshot()
    read = check_contract(source)
    assert read.articles["17.jpg"].title == "Vase" and read.articles["17.jpg"].paragraphs == (("", "Blau."),)
    with pytest.raises(SourceError, match="no table.*'Farbe'.*'Nr alt', 'Was', 'Mehr'"):
        FolderSource(tmp_path, columns=(("text", "Farbe"),)).snapshot()


def test_a_table_without_a_header_is_said(tmp_path):
    write_pictures(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    read = table_of(tmp_path, "a.jpg,Vase\nb.jpg,Bowl\nc.jpg,Cup\n")
    assert any("has no header" in notice for notice in read.notices)


def test_names_are_matched_by_nfc_and_without_case_and_the_nearest_one_is_suggested(tmp_path):
    write_pictures(tmp_path, [unicodedata.normalize("NFD", "Café.jpg"), "IMG_1.JPG", "Vase.jpg"])
    read = table_of(tmp_path, "file,title,licence\nCafé.jpg,The café,CC0\nimg_1.jpg,One,CC BY\nVaze.jpg,Vase,CC0\n")
    assert {(key, one.title, one.licence) for key, one in read.articles.items()} == {
        ("Café.jpg", "The café", "CC0"), ("IMG_1.JPG", "One", "CC BY"), ("Vase.jpg", "Vase", "unknown")}
    (skipped,) = read.of(Skipped)
    assert skipped.reason == "file in the table is missing"
    assert skipped.item == "list.csv, row 4: 'Vaze.jpg'; the nearest file is 'Vase.jpg'"


def test_rows_of_files_that_are_not_read_say_so(tmp_path):
    write_pictures(tmp_path, ["a.jpg"])
    for name in ("b.cr2", "c.pdf", ".d.jpg", "broken.jpg"):
        (tmp_path / name).write_bytes(b"x")
    rows = "".join(f"{name},T,X\n" for name in ("a.jpg", "b.CR2", "c.pdf", ".d.jpg", "broken.jpg", "e.jpg"))
    read = table_of(tmp_path, f"file,title,text\n{rows}")
    assert read.skipped["row of a picture that is not used"] == 4 and read.skipped["file in the table is missing"] == 1


def test_a_name_that_fits_several_files_names_them(tmp_path):
    write_pictures(tmp_path, ["1/a.jpg", "2/a.jpg"])
    read = table_of(tmp_path, "file,title\na.jpg,Which\n")
    (row,) = [one for one in read.of(Skipped) if one.kind == "table row"]
    assert row.reason == "name in the table fits several files" and "'1/a.jpg', '2/a.jpg'" in row.item
    assert read.skipped["table names no picture of the folder"] == 1


def test_a_table_in_a_subfolder_names_files_beside_it(tmp_path):
    write_pictures(tmp_path, ["a.jpg", "East/a.jpg", "East/b.jpg"])
    read = table_of(tmp_path, "file,title\na.jpg,East A\nEast/b.jpg,East B\n", "East/list.csv")
    assert {key: one.title for key, one in read.articles.items()} == {
        "a.jpg": "a", "East/a.jpg": "East A", "East/b.jpg": "East B"}


def test_two_rows_for_one_file_with_different_titles_are_two_articles(tmp_path):
    write_pictures(tmp_path, ["a.jpg"])
    read = table_of(tmp_path, "file,title,text,licence\na.jpg,Front,First text.,CC0\na.jpg,Back,Second text.,CC BY\n")
    assert [(one.title, one.paragraphs[0][1], one.licence) for one in read.articles.values()] == [
        ("Front", "First text.", "CC0"), ("Back", "Second text.", "CC BY")]
    assert [(image.licence, image.articles) for image in read.images] == [("CC0", ("a.jpg",)), ("CC BY", ("a.jpg#2",))]
    assert any("a.jpg (list.csv, row 2, list.csv, row 3)" in notice for notice in read.notices)


def test_rows_that_do_not_contradict_each_other_are_one_article(tmp_path):
    write_pictures(tmp_path, ["a.jpg"])
    (tmp_path / "1 texts.csv").write_text("file,title,text\na.jpg,Vase,One.\na.jpg,,Two.\na.jpg,Vase,One.\n")
    read = table_of(tmp_path, "Datei;Lizenz;Urheber\na.jpg;CC0;Ann\n", "2 rights.csv")
    (article,) = read.articles.values()
    assert (article.title, article.licence) == ("Vase", "CC0")
    assert article.paragraphs == (("", "One."), ("", "Two."))
    assert read.images[0].attribution == "Ann" and read.used == {"file": 3, "table row": 4} and not read.notices


def test_tables_that_contradict_each_other_are_said(tmp_path):
    write_pictures(tmp_path, ["a.jpg"])
    (tmp_path / "1.csv").write_text("file,title,licence\na.jpg,Vase,CC0\n")
    read = table_of(tmp_path, "file,title,licence\na.jpg,Vase,CC BY\n", "2.csv")
    assert [one.licence for one in read.articles.values()] == ["CC0", "CC BY"]
    assert any("1.csv, row 2, 2.csv, row 2" in notice for notice in read.notices)


def test_a_placeholder_that_every_row_names_takes_linear_time(tmp_path):
    write_pictures(tmp_path, ["a.jpg"])
    (tmp_path / "list.csv").write_text("file,title\n" + "".join(f"a.jpg,Vase {n % 10_000}\n" for n in range(20_000)))
    source = FolderSource(tmp_path)
    began = time.monotonic()
    entry = source._catalogue.entries["a.jpg"]
    assert time.monotonic() - began < 20  # each row compared with all others: minutes
    assert len(entry.articles) == 10_000 and len(entry.rows) == 20_000
    assert len(source._catalogue.notices[-1]) < 1000


def test_a_text_file_beside_a_row_is_kept(tmp_path):
    write_pictures(tmp_path, ["a.jpg", "b.jpg"])
    (tmp_path / "a.TXT").write_text("Another title\nMore text.")
    (tmp_path / "b.jpg.txt").write_text("Bowl\nOf clay.")
    (tmp_path / "c.txt").write_text("Nobody's")
    read = table_of(tmp_path, "file,title,text\na.jpg,Vase,A vase.\n")
    assert read.articles["a.jpg"].paragraphs == (("", "A vase."), ("", "Another title"), ("", "More text."))
    assert read.articles["b.jpg"].title == "Bowl"
    assert read.skipped == {"text belongs to no picture": 1} and read.present["file"] == 6


def test_long_text_files_are_truncated_between_characters_and_said(tmp_path):
    write_pictures(tmp_path, ["a.jpg"])
    (tmp_path / "a.txt").write_bytes(b"T\n" + "Größe ".encode() * 800_000)
    read = Read(FolderSource(tmp_path))
    assert "Ã" not in "".join(text for _, text in read.articles["a.jpg"].paragraphs)
    assert any("longer than 4 MiB" in notice for notice in read.notices)


def test_titles_without_a_word_are_replaced_by_the_file_name(tmp_path):
    write_pictures(tmp_path, ["a.jpg", "___.jpg", "!.png"])
    read = table_of(tmp_path, "file,title\na.jpg,***\n")
    assert all(name_key(article.title) for article in read.articles.values())
    assert read.articles["a.jpg"].title == "a" and len(read.articles) == 3


def test_very_long_titles_are_shortened_and_kept_as_text(tmp_path):
    write_pictures(tmp_path, ["a.jpg"])
    long = "A very long title " * 40
    read = table_of(tmp_path, f"file,title\na.jpg,{long}\n")
    article = read.articles["a.jpg"]
    assert len(article.title) <= 200 and article.title.endswith("…") and article.paragraphs[0][1] == long.strip()


# --- files --------------------------------------------------------------------------------------


def test_every_file_is_used_or_has_a_reason(tmp_path):
    write_pictures(tmp_path, ["a.jpg", "in/b.png"])
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(picture(9, "PNG"))
    for name, target in (("inside.jpg", "a.jpg"), ("outside.png", outside / "secret.png"), ("gone.jpg", "nothing.jpg"),
                         ("folder.jpg", outside), ("loop.jpg", "loop.jpg")):
        (tmp_path / name).symlink_to(target)
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, data in (("empty.jpg", b""), (".DS_Store", b"x"), ("Thumbs.db", b"x"), ("in/._b.png", b"x"), ("raw.CR2",
                                                                                                            b"II*\0x"),
                       ("work.xcf", b"gimp xcf"), ("list.xlsx", b"PK"), ("doc.pdf", b"%PDF"), ("scan", picture(3,
                                                                                                               "JPEG")),
                       ("photo.jpg.bak", picture(4, "PNG")), (".hidden/c.jpg", b"x")):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    read = check_contract(FolderSource(tmp_path))
    assert set(read.articles) == {"a.jpg", "in/b.png", "inside.jpg", "scan", "photo.jpg.bak"}
    assert read.skipped == {
        "link to a folder, or out of the folder": 2, "link leads to a missing file": 2, "not a regular file": 1,
        "file is empty": 1, "hidden or system file": 4, "camera raw file is not read; export it as JPEG or TIFF": 1,
        "picture is in a format that is not read; export it as PNG, JPEG or TIFF": 1,
        "spreadsheet is not read; save it as CSV": 1, "file is not a picture": 1,
    }  # fmt: skip
    assert read.present == {"file": 19, "table row": 0} and read.used["file"] == 5


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [("jfif", "JPEG"), ("jpe", "JPEG"), ("JPG", "JPEG"), ("avif", "AVIF"), ("jp2", "JPEG2000"), ("tif", "TIFF"),
     ("tga", "TGA"),
     ("pcx", "PCX"), ("ppm", "PPM"), ("ico", "ICO"), ("qoi", "QOI"), ("dib", "DIB"), ("sgi", "SGI"), ("gif", "GIF"),
     ("dds", "DDS")],
)  # fmt: skip
def test_formats_that_pillow_reads(tmp_path, suffix, kind):
    image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    image.save(tmp_path / f"a.{suffix}", kind)
    (shown,) = check_contract(FolderSource(tmp_path)).images
    pixels = np.asarray(Image.open(io.BytesIO(shown.data)).convert("RGB"), float)
    assert np.abs(pixels - np.asarray(image, float)).mean() < 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000", "QOI"])
def test_pictures_without_a_suffix_are_recognised(tmp_path, kind):
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "scan", kind)
    assert list_files(tmp_path).pictures == ("scan",)


def test_photoshop_files_are_read_without_their_layers(tmp_path):
    colour = np.full((3, 40, 50), [[[200]], [[30]], [[90]]], np.uint8)
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 40, 50, 8, 3)
    (tmp_path / "a.psd").write_bytes(header + bytes(12) + bytes(2) + colour.tobytes())
    (shown,) = check_contract(FolderSource(tmp_path)).images
    pixels = np.asarray(Image.open(io.BytesIO(shown.data)).convert("RGB"), float)
    assert pixels.shape == (40, 50, 3) and np.abs(pixels - [200, 30, 90]).max() < 8


@pytest.mark.parametrize(("suffix", "module", "kind"), [("heic", "pillow_heif", "HEIF"),
                                                        ("jxl", "pillow_jxl", "JXL")])  # fmt: skip
def test_formats_of_the_extra(tmp_path, suffix, module, kind):
    library = pytest.importorskip(module)
    if kind == "HEIF":
        library.register_heif_opener()
    image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    image.save(tmp_path / f"a.{suffix}", kind)
    (shown,) = check_contract(FolderSource(tmp_path)).images
    pixels = np.asarray(Image.open(io.BytesIO(shown.data)).convert("RGB"), float)
    assert np.abs(pixels - np.asarray(image, float)).mean() < 6


def test_without_the_extra_the_reason_says_what_to_install(tmp_path, monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name,
                        *rest: None if name.startswith("pillow_") else known(name))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + b"\0" * 64)
    read = Read(FolderSource(tmp_path))
    assert read.skipped == {"HEIC is not read; pip install 'gog_edge[formats]'": 1}


def test_every_page_of_a_tiff_file_is_an_image(tmp_path):
    pages = [Image.new("RGB", (64, 48), colour) for colour in ("red", "lime", "blue")]
    pages[0].save(tmp_path / "scan.tif", save_all=True, append_images=pages[1:], compression="tiff_lzw")
    read = table_of(tmp_path, "file,title,licence\nscan.tif,Letter,CC0\n")
    assert [(image.caption, image.lead, image.licence) for image in read.images] == [
        ("Letter", True, "CC0"), ("Letter, page 2", False, "CC0"), ("Letter, page 3", False, "CC0")]
    colours = [np.asarray(Image.open(io.BytesIO(image.data)).convert("RGB"))[9, 9].argmax() for image in read.images]
    assert colours == [0, 1, 2] and read.used["file"] == 2


def test_pages_of_a_tiff_file_have_sizes_of_their_own(tmp_path):
    pages = [Image.new("RGB", size, "red") for size in ((30, 20), (400, 300), (100, 250))]
    pages[0].save(tmp_path / "scan.tif", save_all=True, append_images=pages[1:], compression="tiff_lzw")
    read = check_contract(FolderSource(tmp_path))
    assert [Image.open(io.BytesIO(one.data)).size for one in read.images] == [(30, 20), (320, 240), (100, 250)]
    assert not read.skipped


def test_previews_in_a_tiff_file_are_not_pages(tmp_path):
    page, preview = Image.new("RGB", (64, 48), "red"), Image.new("RGB", (16, 12), "red")
    preview.encoderinfo = {"tiffinfo": {254: 1}}
    page.save(tmp_path / "scan.tif", save_all=True, append_images=[preview])
    assert len(Read(FolderSource(tmp_path)).images) == 1


def test_a_picture_of_too_many_pixels_says_so(tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    write_pictures(tmp_path, ["a.jpg"])
    assert Read(FolderSource(tmp_path)).skipped == {"image exceeds the limits of size": 1}


# --- exports of museums -------------------------------------------------------------------------


def test_rows_of_tate_as_published(tmp_path):
    """tategallery/collection: artwork_data.csv, whose pictures are called after the thumbnails' addresses."""
    write_pictures(tmp_path, ["A00001_8.jpg", "a00002.jpg"])
    read = table_of(tmp_path, (
        "id,accession_number,artist,artistRole,artistId,title,dateText,medium,creditLine,year,acquisitionYear,dimensions,"
        "width,height,depth,units,inscription,thumbnailCopyright,thumbnailUrl,url\n"
        '1035,A00001,"Blake, Robert",artist,38,A Figure Bowing before a Seated Old Man with his Arm Outstretched in '
        'Benediction. Verso: Indecipherable Sketch,date not known,"Watercolour, ink, chalk and graphite on paper. '
        'Verso: graphite on paper",Presented by Mrs John Richmond 1922,,1922,support: 394 x 419 mm,394,419,,mm,,,'
        "http://www.tate.org.uk/art/artwork-images/A/A00/A00001_8.jpg,http://www.tate.org.uk/art/artworks/blake-a00001\n"
        '1036,A00002,"Blake, Robert",artist,38,"Two Drawings of Frightened Figures, Probably for \'The Approach of '
        'Doom\'",date not known,Graphite on paper,Presented by Mrs John Richmond 1922,,1922,support: 311 x 213 mm,311,'
        "213,,mm,,,,\n"
        "1037,A00003,x,artist,38,The Preaching of Warning,?1785,Graphite,,,,,,,,,,,,\n"))  # fmt: skip
    first, second = read.articles["A00001_8.jpg"], read.articles["a00002.jpg"]
    assert first.title.startswith("A Figure Bowing") and second.title.startswith("Two Drawings")
    assert "Medium: Graphite on paper" in second.paragraphs[0][1] and "Artist: Blake, Robert" in second.paragraphs[0][1]
    assert read.images[0].attribution == "Presented by Mrs John Richmond 1922; Blake, Robert"
    assert read.skipped == {"object in the table has no picture in the folder": 1}


def test_objects_of_apis_as_published(tmp_path):
    write_pictures(tmp_path, ["1958.39_web.jpg", "DP800938.jpg", "SK-A-1505.jpg"])
    cleveland = {"info": {"total": 2}, "data": [
        {"id": 135299, "accession_number": "1958.39", "share_license_status": "CC0", "title": "Portrait", "description":
         "<p>A <em>fine</em> portrait.</p>", "creators": [{"description": "John Singleton Copley (American)",
                                                           "role": "artist"}],
         "images": {"web": {"url": "https://openaccess-cdn.clevelandart.org/1958.39/1958.39_web.jpg",
                            "width": "893"}}}]}
    met = {"objectID": 436535, "isPublicDomain": True,
           "primaryImage": "https://images.metmuseum.org/CRDImages/ep/DP800938.jpg",
           "title": "Wheat Field", "artistDisplayName": "Vincent van Gogh", "medium": "Oil on canvas",
           "creditLine": "Purchase",
           "rightsAndReproduction": "", "tags": None, "constituents": [{"name": "Vincent van Gogh"}]}  # fmt: skip
    rijks = {"count": 1, "artObjects": [{"objectNumber": "SK-A-1505", "title": "A Windmill",
                                         "principalOrFirstMaker": "Gabriël",
                                         "webImage": {"guid": "x", "url": "https://lh3.googleusercontent.com/abc=s0"}}]}
    for name, value in (("cleveland", cleveland), ("met", met), ("rijks", rijks)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    read = check_contract(FolderSource(tmp_path))
    portrait, field, mill = (read.articles[name] for name in ("1958.39_web.jpg", "DP800938.jpg", "SK-A-1505.jpg"))
    assert (portrait.title, portrait.licence) == ("Portrait", "CC0") and portrait.paragraphs[0][1] == "A fine portrait."
    assert (field.title, field.licence) == ("Wheat Field", "public domain")
    assert "Medium: Oil on canvas" in field.paragraphs[0][1]
    assert mill.title == "A Windmill"
    assert {image.attribution for image in read.images} == {
        "John Singleton Copley (American)", "Purchase; Vincent van Gogh", "Gabriël"}
    assert not read.skipped and read.used == {"file": 6, "table row": 3}


def test_a_json_object_beside_its_picture(tmp_path):
    write_pictures(tmp_path, ["vase.jpg", "cup.jpg"])
    (tmp_path / "vase.json").write_text(json.dumps({"title": "Vase", "license": "CC0", "description": "Old."}))
    (tmp_path / "cup.jpg.json").write_text(json.dumps({"name": "Cup"}))
    (tmp_path / "settings.json").write_text(json.dumps({"theme": "dark"}))
    read = check_contract(FolderSource(tmp_path))
    assert (read.articles["vase.jpg"].title, read.articles["vase.jpg"].licence) == ("Vase", "CC0")
    assert read.articles["cup.jpg"].title == "Cup" and read.present == {"file": 5, "table row": 3}
