"""Wiki6M: one page per line."""

import gzip
import json

import pytest
from reading import Read, check_contract
from zim_world import picture

from gog_edge.errors import SourceError
from gog_edge.indexing.sources.images import IMAGE_MISSING, ImageFolder
from gog_edge.indexing.sources.wiki6m import Wiki6mSource


def line(number, **fields):
    page = {
        "wikidata_id": f"Q{number}", "wikipedia_title": f"Thing {number}", "wikipedia_summary": f"Thing {number} is.",
        "wikipedia_content": f"Thing {number} is.\n\nIt has parts.\nMany.",
        "wikipedia_image_url": f"https://upload.wikimedia.org/wikipedia/commons/1/12/Thing_{number % 8}.jpg",
    }  # fmt: skip
    return json.dumps(page | fields)


def write_lines(path, lines):
    data = "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(6):
        (folder / f"Thing_{number}.jpg").write_bytes(picture(number, "JPEG", 90, 70))
    return ImageFolder(folder)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_line_is_an_article_with_its_image(tmp_path, images, suffix):
    path = write_lines(tmp_path / f"Wiki6M_ver_1_0{suffix}", [line(number) for number in range(1000)])
    source = Wiki6mSource(path, images)
    assert (source.snapshot().date, source.snapshot().licence) == ("2022-10-01", "CC BY-SA 3.0")
    read = check_contract(source)
    assert len(read.articles) == 1000 and len(read.chunks) == 4
    assert read.articles["Q9"].title == "Thing 9"
    assert read.articles["Q9"].paragraphs == (("", "Thing 9 is."), ("", "It has parts."), ("", "Many."))
    assert len(read.images) == 750 and read.skipped == {IMAGE_MISSING: 250}
    assert all(image.lead and image.caption.startswith("Thing") for image in read.images)


def test_malformed_lines_are_skipped(tmp_path):
    lines = [line(1, wikipedia_image_url=None), "{", "[1]", "", line(2, wikipedia_title=None), "[" * 100_000,
             line(3, wikipedia_content="", wikipedia_summary=""),
             line(4, wikipedia_content=None, wikipedia_image_url="")]  # fmt: skip
    read = Read(Wiki6mSource(write_lines(tmp_path / "a.jsonl", lines), ImageFolder(None)))
    assert set(read.articles) == {"Q1", "Q4"} and read.articles["Q4"].paragraphs == (("", "Thing 4 is."),)
    assert read.skipped == {"line is not a page": 5, "article has no text": 1}


def test_values_of_other_types_are_never_cited(tmp_path):
    lines = [line(1, wikipedia_content=["a"], wikipedia_summary="Sum."), line(2, wikipedia_title=["x"]),
             line(3, wikipedia_image_url=7), line(4, wikipedia_content=3, wikipedia_summary={})]  # fmt: skip
    read = check_contract(Wiki6mSource(write_lines(tmp_path / "a.jsonl", lines), ImageFolder(None)))
    assert read.articles["Q1"].paragraphs == (("", "Sum."),) and set(read.articles) == {"Q1", "Q3"}
    assert read.present["line"] == 4 and read.skipped["image address is not a text"] == 1


def test_unpaired_surrogates_are_removed(tmp_path):
    odd = line(1, wikipedia_title="A\ud800b", wikipedia_content="c\udfffd \u0000", wikipedia_image_url="x\ud800.jpg")
    read = Read(Wiki6mSource(write_lines(tmp_path / "a.jsonl", [odd]), ImageFolder(tmp_path)))
    (article,) = read.articles.values()
    assert (article.title, article.paragraphs) == ("Ab", (("", "cd"),))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(SourceError, match="Wiki6M"):
        Wiki6mSource(write_lines(tmp_path / "a.jsonl", ['{"id": 1}']), ImageFolder(None)).snapshot()
    with pytest.raises(SourceError, match="folder of images .* does not exist"):
        Wiki6mSource(write_lines(tmp_path / "a.jsonl", [line(1)]), ImageFolder(tmp_path / "none")).snapshot()
