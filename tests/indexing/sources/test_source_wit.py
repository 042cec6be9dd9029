"""WIT: scattered rows are collected by page, for one language of many, with images from a folder."""

import gzip
import multiprocessing
import os
import resource
import signal
import sqlite3
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
from reading import Read, check_contract
from zim_world import picture

from gog_edge.errors import SourceError
from gog_edge.indexing.sources import wit
from gog_edge.indexing.sources.images import IMAGE_MISSING, ImageFolder
from gog_edge.indexing.sources.wit import WitSource

COLUMNS = (
    "language", "page_url", "image_url", "page_title", "section_title", "hierarchical_section_title",
    "caption_reference_description", "caption_attribution_description", "caption_alt_text_description", "mime_type",
    "original_height", "original_width", "is_main_image", "attribution_passes_lang_id", "page_changed_recently",
    "context_page_description", "context_section_description",
)  # fmt: skip
WITHOUT = ImageFolder(None)


def row(page, image, language="en", **fields):
    """A line of a WIT file."""
    values = dict.fromkeys(COLUMNS, "") | {
        "language": language, "page_title": f"Page {page}",
        "page_url": f"https://{language}.wikipedia.org/wiki/Page_{page}",
        "image_url": f"http://upload.wikimedia.org/wikipedia/commons/0/00/Image_{image}.jpg", "mime_type": "image/jpeg",
        "section_title": "Uses", "hierarchical_section_title": f"Page {page} / Uses / Early",
        "caption_reference_description": f"Image {image} of page {page}", "is_main_image": "false",
        "attribution_passes_lang_id": "true", "context_page_description": f"Page {page} is about \"something\".",
        "context_section_description": f"Used with image {image}.", "original_height": "300", "original_width": "400",
    } | fields  # fmt: skip
    return "\t".join(values[name] for name in COLUMNS)


def write_rows(path, rows):
    with gzip.open(path, "wt", encoding="utf-8", newline="\n", compresslevel=1) as stream:
        stream.write("\n".join(["\t".join(COLUMNS), *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files with three scattered rows for each of 400 pages, and the same for another language."""
    folder = tmp_path_factory.mktemp("wit")
    rows = [row(page, f"{page % 20}_{k}", language)
            for k in range(3) for page in range(400) for language in ("en", "de")]  # fmt: skip
    write_rows(folder / "wit_v1.train.all-00000-of-00002.tsv.gz", rows[:1500])
    write_rows(folder / "wit_v1.train.all-00001-of-00002.tsv.gz", rows[1500:])
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(20):
        for k in range(2):
            (folder / f"Image_{number}_{k}.jpg").write_bytes(picture(number * 3 + k, "JPEG", 90, 70))
    return ImageFolder(folder)


def prepared(path, work, images=WITHOUT, language="en"):
    source = WitSource(path, images, language)
    source.snapshot()
    source.prepare(work)
    return source


def test_each_page_is_one_article_with_all_its_images(folder, images, tmp_path):
    source = prepared(folder, tmp_path, images)
    read = check_contract(source)
    assert len(read.articles) == 400 and source.size == 1200 and len(read.chunks) == 3
    article = read.articles["https://en.wikipedia.org/wiki/Page_7"]
    assert article.paragraphs[0] == ("", 'Page 7 is about "something".')
    assert article.paragraphs[1:] == tuple(("Uses / Early", f"Used with image 7_{k}.") for k in range(3))
    assert [image.caption for image in read.images_of(article.key)] == [f"Image 7_{k} of page 7" for k in range(2)]
    assert read.skipped == {IMAGE_MISSING: 400, wit.OTHER_LANGUAGE: 1200}
    assert read.present == {wit.ROW: 2400, wit.IMAGE: 1200}
    assert {image.attribution for image in read.images_of(article.key)} == {
        f"http://upload.wikimedia.org/wikipedia/commons/0/00/Image_7_{k}.jpg" for k in range(2)}


def test_the_language_is_selectable(folder, tmp_path):
    assert len(Read(prepared(folder, tmp_path, language="de")).articles) == 400
    assert len(Read(prepared(folder, tmp_path, language="")).articles) == 800
    assert not Read(prepared(folder, tmp_path, language="fr")).records


def test_a_complete_spool_is_not_written_again(folder, tmp_path):
    source = prepared(folder, tmp_path)
    before = source.spool.stat().st_mtime_ns
    again = prepared(folder, tmp_path)
    assert again.spool.stat().st_mtime_ns == before and list(again.chunks()) == list(source.chunks())


@pytest.mark.parametrize(
    ("fields", "caption"),
    [
        ({}, "Image x of page 1"),
        ({"caption_reference_description": "", "caption_alt_text_description": "alt"}, "alt"),
        ({"caption_reference_description": "", "caption_attribution_description": "A house"}, "A house"),
        ({"caption_reference_description": "", "caption_attribution_description": "Ein Haus",
          "attribution_passes_lang_id": "false"}, ""),
        ({"caption_reference_description": "Вид на реку"}, "Вид на реку"),
    ],
)
def test_the_most_specific_caption_is_used(tmp_path, fields, caption):
    (tmp_path / "Image_x.jpg").write_bytes(picture(1, "JPEG"))
    path = write_rows(tmp_path / "one.tsv.gz", [row(1, "x", **fields, is_main_image="true")])
    (image,) = Read(prepared(path, tmp_path, ImageFolder(tmp_path))).images
    assert image.caption == caption and image.lead


def test_rows_without_text_or_columns_are_skipped(tmp_path):
    empty = row(1, "x", context_page_description="", context_section_description="")
    path = write_rows(tmp_path / "one.tsv.gz", [empty, row(2, "y"), "en\tshort", row(3, "z", page_title="")])
    read = Read(prepared(path, tmp_path))
    assert {article.title for article in read.articles.values()} == {"Page 2", "https://en.wikipedia.org/wiki/Page_3"}
    assert read.skipped["article has no text"] == 1


def test_every_row_is_counted(tmp_path):
    rows = [row(1, "a"), row(1, "b"), "en\tshort", row(2, "c") + "\tone more", row(3, "d", language="fr"), "",
            row(4, "e", page_url=" ")]  # fmt: skip
    read = check_contract(prepared(write_rows(tmp_path / "one.tsv.gz", rows), tmp_path))
    assert read.present == {wit.ROW: 7, wit.IMAGE: 2} and read.used[wit.ROW] == 2
    assert (read.skipped[wit.MALFORMED], read.skipped[wit.OTHER_LANGUAGE], read.skipped[wit.NO_PAGE]) == (3, 1, 1)


def prepare_slowly(folder, work):
    wit._BATCH = 50
    commit = wit._commit

    def slow(*arguments):
        commit(*arguments)
        time.sleep(0.05)

    wit._commit = slow
    WitSource(folder, WITHOUT).prepare(work)


def test_preparation_is_resumed_after_a_kill(folder, tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=prepare_slowly, args=(folder, tmp_path / "killed"))
    process.start()
    spool = tmp_path / "killed" / "wit-en.sqlite"
    until = time.monotonic() + 60
    rows = 0
    while rows < 200 and time.monotonic() < until:
        time.sleep(0.02)
        if spool.exists():
            try:
                with sqlite3.connect(spool) as base:
                    rows = base.execute("SELECT count(*) FROM rows").fetchone()[0]
                base.close()
            except sqlite3.Error:
                continue  # not created yet, or locked
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert 200 <= rows < 1200
    assert Read(prepared(folder, tmp_path / "killed")).records == Read(prepared(folder, tmp_path / "whole")).records


def prepare_on_a_full_disk(folder, work):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    try:
        WitSource(folder, WITHOUT).prepare(work)
    except SourceError as exc:
        return str(exc)
    return "prepared"


def test_preparation_is_resumed_after_a_full_disk(folder, tmp_path):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        message = pool.submit(prepare_on_a_full_disk, folder, tmp_path / "full").result(60)
    assert "wit-en.sqlite' cannot be written" in message and "make room" in message
    assert Read(prepared(folder, tmp_path / "full")).records == Read(prepared(folder, tmp_path / "whole")).records


def test_reading_before_preparation_is_refused(folder):
    with pytest.raises(SourceError, match="prepare"):
        next(WitSource(folder, WITHOUT).chunks())


def test_other_files_are_refused(tmp_path):
    with pytest.raises(SourceError, match="contains no .tsv"):
        WitSource(tmp_path, WITHOUT).snapshot()
    other = tmp_path / "a.tsv"
    other.write_text("file\ttitle\n")
    with pytest.raises(SourceError, match="lacks the column 'language'"):
        WitSource(other, WITHOUT).snapshot()


def test_preparation_is_resumed_when_a_truncated_file_is_replaced(folder, tmp_path):
    whole = (folder / "wit_v1.train.all-00000-of-00002.tsv.gz").read_bytes()
    path = tmp_path / "part.tsv.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"part\.tsv\.gz.*truncated"):
        prepared(path, tmp_path)
    path.write_bytes(whole)
    expected = prepared(folder / "wit_v1.train.all-00000-of-00002.tsv.gz", tmp_path / "other")
    assert Read(prepared(path, tmp_path)).records == Read(expected).records
