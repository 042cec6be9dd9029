"""Names in tables are matched to files exactly, by NFC, without case, without folder, without suffix; never outside."""

import time
import unicodedata

import pytest

from gog_edge.indexing.sources.folder.matching import AMBIGUOUS, MISSING, NO_NAME, NO_PICTURE, OUTSIDE, FileNames

SUFFIXES = frozenset((".jpg", ".png"))
NFD = unicodedata.normalize("NFD", "Café.jpg")
FILES = ("a.jpg", "IMG_1.JPG", NFD, "Room 1/b.png", "Room 1/same.jpg", "Room 2/same.jpg", "Vase 2.1.jpg",
         "x/Straße.jpg",
         "ISPARTA.jpg", "İzmir.jpg", "new file.jpg", "100%.jpg", "c;d.jpg", "A00001.jpg")  # fmt: skip


def found(cell, files=FILES, base=""):
    match = FileNames(files, SUFFIXES).find(cell, base)
    return match.files[0] if len(match.files) == 1 else match.reason


@pytest.mark.parametrize(
    ("cell", "file"),
    [("a.jpg", "a.jpg"), (" a.jpg ", "a.jpg"), ('"a.jpg"', "a.jpg"), ("./a.jpg", "a.jpg"), ("A.JPG", "a.jpg"),
     ("img_1.jpg", "IMG_1.JPG"), ("Café.jpg", NFD), ("CAFÉ.JPG", NFD), (NFD, NFD), ("Room 1/b.png", "Room 1/b.png"),
     ("Room 1\\b.png", "Room 1/b.png"), ("room 1//B.PNG", "Room 1/b.png"), ("b.png", "Room 1/b.png"), ("b",
                                                                                                       "Room 1/b.png"),
     ("a", "a.jpg"), ("Vase 2.1", "Vase 2.1.jpg"), ("images/a.jpg", "a.jpg"), ("export/Room 2/same.jpg",
                                                                               "Room 2/same.jpg"),
     ("ısparta.jpg", "ISPARTA.jpg"), ("izmir.jpg", "İzmir.jpg"), ("İZMİR.JPG", "İzmir.jpg"),
     ("strasse.jpg", "x/Straße.jpg"), ("new%20file.jpg", "new file.jpg"), ("new  file.jpg", "new file.jpg"),
     ("new\xa0file.jpg", "new file.jpg"), ("100%.jpg", "100%.jpg"), ("caf%C3%A9.jpg", NFD), ("c;d.jpg", "c;d.jpg"),
     ("https://museum.example/media/a.jpg?w=300#top", "a.jpg"), ("http://m.example/x/new%20file.jpg", "new file.jpg"),
     ("http://m.example/IMG_1.jpg", "IMG_1.JPG"), ("\u200eCafé.jpg\u200b", NFD), ("\u202aa.jpg\u202c", "a.jpg")],
)  # fmt: skip
def test_names_are_found(cell, file):
    assert found(cell) == file


@pytest.mark.parametrize(
    ("cell", "reason"),
    [("gone.jpg", MISSING), ("a.png", MISSING), ("same.jpg", AMBIGUOUS), ("", NO_NAME), ("  ", NO_NAME), ("../a.jpg",
                                                                                                          OUTSIDE),
     ("Room 1/../../a.jpg", OUTSIDE), ("..\\a.jpg", OUTSIDE), ("/etc/a.jpg", OUTSIDE),
     ("C:\\photos\\gone.jpg", OUTSIDE), ("C:\\x\\..\\a.jpg", OUTSIDE),
     ("C:\\same.jpg", AMBIGUOUS),
     ("file:///a.jpg", OUTSIDE), ("~/a.jpg", OUTSIDE),
     ("%2e%2e/a.jpg", OUTSIDE), ("https://m.example/", MISSING), ("\x00", MISSING), ("x" * 5000, MISSING)],
)  # fmt: skip
def test_names_that_are_not_found_have_a_reason(cell, reason):
    assert found(cell) == reason


@pytest.mark.parametrize(
    ("cell", "file"),
    [("C:\\photos\\a.jpg", "a.jpg"), ("c:/A.JPG", "a.jpg"), ("\\\\server\\share\\a.jpg", "a.jpg"),
     ("D:\\x\\b", "Room 1/b.png"),
     ("D:\\export\\Room 2\\same.jpg", "Room 2/same.jpg")],
)  # fmt: skip
def test_absolute_names_of_windows_are_matched_by_their_last_part(cell, file):
    assert found(cell) == file


def test_an_exact_name_comes_before_similar_ones():
    files = ("a.jpg", "A.jpg", "A.JPG", "Sub/a.jpg")
    assert [found(name, files) for name in files] == list(files)
    match = FileNames(files, SUFFIXES).find("a.JPG")
    assert match.reason == AMBIGUOUS and set(match.near) == {"a.jpg", "A.jpg", "A.JPG"}


def test_composed_and_decomposed_twins_are_kept_apart():
    files = ("Café.jpg", NFD)
    assert [found(name, files) for name in files] == list(files)
    assert found("CAFÉ.jpg", files) == AMBIGUOUS


def test_names_are_looked_for_beside_the_table_first():
    files = ("a.jpg", "Room 1/a.jpg")
    assert found("a.jpg", files) == "a.jpg" and found("a.jpg", files, base="Room 1") == "Room 1/a.jpg"
    assert found("A", files, base="Room 1") == "Room 1/a.jpg" and found("Room 1/a.jpg", files,
                                                                        "Room 1") == "Room 1/a.jpg"


@pytest.mark.parametrize("cell", ["a.jpg; b.png", "a.jpg|b", "a.jpg\nb.png", "a.jpg ;gone.jpg; b.png"])
def test_a_cell_may_list_several_pictures(cell):
    assert FileNames(FILES, SUFFIXES).find(cell).files == ("a.jpg", "Room 1/b.png")


def test_numbers_of_objects():
    names = FileNames(("A00001.jpg", "1998.12-3.png", "x/1998_12_4.jpg", "17.jpg", "y/17.png"), SUFFIXES)
    for number, file in (("a00001", "A00001.jpg"), ("1998.12/3", "1998.12-3.png"), ("1998.12.4", "x/1998_12_4.jpg")):
        assert names.find_number(number).files == (file,)
    assert names.find_number("17").reason == AMBIGUOUS and names.find_number("99").reason == NO_PICTURE
    assert names.find_number("--").reason == NO_PICTURE


def test_the_nearest_name_is_suggested():
    names = FileNames(FILES, SUFFIXES)
    assert names.nearest("new_file.jpg") == "new file.jpg" and names.nearest("Room 9/same2.jpg") is not None
    assert names.nearest("zzzzzzzz.gif") is None


def test_a_hundred_thousand_names_are_matched_quickly():
    files = tuple(f"Room {number % 100}/IMG_{number:06d}.JPG" for number in range(100_000))
    names = FileNames(files, SUFFIXES)
    start = time.monotonic()
    assert all(names.find(f"img_{number:06d}.jpg").files for number in range(0, 100_000, 10))
    assert time.monotonic() - start < 5
