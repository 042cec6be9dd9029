"""Folders of pictures with a table, with text files, or with nothing but file names."""

import codecs
import os

import pytest
from reading import Read, check_contract
from zim_world import drawing, picture

from gog_edge.errors import SourceError
from gog_edge.indexing.sources.folder import CHUNK_FILES, FolderSource


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
    read = Read(FolderSource(tmp_path))
    assert set(read.articles) == {"a.jpg", "small.png"}  # small pictures of a collection are not icons
    assert read.skipped == {"image does not decode": 1, "file in the table is missing": 1}


def test_file_names_in_another_encoding_are_read(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(picture(1, "PNG"))
    FolderSource(tmp_path).snapshot()
    (article,) = Read(FolderSource(tmp_path)).articles.values()
    assert article.key == "caf?.png" and article.title == "caf?"


def test_the_snapshot_hash_covers_texts_and_pictures(tmp_path):
    write_pictures(tmp_path, ["a.jpg"])
    first = FolderSource(tmp_path).snapshot()
    assert first.name == tmp_path.name and first == FolderSource(tmp_path).snapshot()
    (tmp_path / "a.txt").write_text("A vase")
    second = FolderSource(tmp_path).snapshot()
    write_pictures(tmp_path, ["b.jpg"])
    assert len({first.sha256, second.sha256, FolderSource(tmp_path).snapshot().sha256}) == 3


def test_folders_without_pictures_and_malformed_tables_are_refused(tmp_path):
    with pytest.raises(SourceError, match="contains no picture"):
        FolderSource(tmp_path).snapshot()
    write_pictures(tmp_path, ["a.jpg"])
    (tmp_path / "list.csv").write_text("file,text\na.jpg," + "x" * 200_000 + "\n")
    with pytest.raises(SourceError, match=r"list\.csv"):
        Read(FolderSource(tmp_path))
