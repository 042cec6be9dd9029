"""The knowledge base of Encyclopedic VQA: one JSON object with a key per page."""

import json
import zipfile

import pytest
from reading import Read, check_contract
from zim_world import picture

from gog_edge.errors import SourceError
from gog_edge.indexing.sources.base import ArticleRecord
from gog_edge.indexing.sources.encyclopedic_vqa import EncyclopedicVqaSource
from gog_edge.indexing.sources.images import IMAGE_MISSING, ImageFolder


def page(number, **fields):
    address = f"https://en.wikipedia.org/wiki/Bird_{number}"
    images = [f"https://upload.wikimedia.org/wikipedia/commons/2/23/Bird_{number % 5}_{k}.jpg" for k in range(3)]
    return address, {
        "title": f"Bird {number}", "url": address, "section_titles": [f"Bird {number}", "Habitat", "Voice"],
        "section_texts": [f"Bird {number} is a bird.\nIt flies.", "It lives in woods.", ""], "image_urls": images,
        "image_reference_descriptions": ["In a tree", None, "On water"], "image_section_indices": [1, 0, 1],
    } | fields  # fmt: skip


def write_pages(path, pages):
    # Not with json.dump, because a key may occur twice.
    text = "{" + ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in pages) + "}"
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("encyclopedic_kb_wiki.json", text)
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(5):
        for k in range(2):
            (folder / f"Bird_{number}_{k}.jpg").write_bytes(picture(number * 2 + k, "JPEG", 90, 70))
    return ImageFolder(folder)


@pytest.mark.parametrize("suffix", [".json", ".zip"])
def test_a_page_is_an_article_with_its_images(tmp_path, images, suffix):
    path = write_pages(tmp_path / f"encyclopedic_kb_wiki{suffix}", [page(number) for number in range(600)])
    source = EncyclopedicVqaSource(path, images)
    source.snapshot()
    read = check_contract(source)
    assert len(read.articles) == 600 and len(read.chunks) == 3
    article = read.articles["https://en.wikipedia.org/wiki/Bird_8"]
    assert article.paragraphs == (("", "Bird 8 is a bird."), ("", "It flies."), ("Habitat", "It lives in woods."))
    shown = read.images_of(article.key)
    assert [(image.caption, image.lead) for image in shown] == [("In a tree", False), ("", True)]
    assert read.skipped == {IMAGE_MISSING: 600}


def test_values_of_other_types_are_never_cited(tmp_path):
    """`null` is not the text "None"; an address that is not a text is counted."""
    odd = page(1, section_texts=[None, ["a"], "Fine."], section_titles=[1, None, {}], image_urls=["x.jpg", None, 7],
               image_reference_descriptions=[3], image_section_indices=["0", None])  # fmt: skip
    read = check_contract(EncyclopedicVqaSource(write_pages(tmp_path / "a.json", [odd]), ImageFolder(None)))
    (article,) = read.articles.values()
    assert article.paragraphs == (("", "Fine."),)
    assert read.present == {"entry": 1, "image": 3} and read.skipped["image address is not a text"] == 2


def test_deeply_nested_json_is_refused_without_taking_memory(tmp_path):
    for text in ("[" * 100_000, '{"a": ' + '{"a":' * 100_000, '{"a": "[[[[' + "[" * 200_000 + '", "b": ' + "[" * 70):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(SourceError):
            EncyclopedicVqaSource(tmp_path / "a.json", ImageFolder(None)).snapshot()
    brackets = page(1, section_texts=["[[[[{{{{" * 100_000, 'quoted \\" [', "x"])
    source = EncyclopedicVqaSource(write_pages(tmp_path / "b.json", [brackets] * 2), ImageFolder(None))
    assert len(Read(source).of(ArticleRecord)) == 2  # brackets in texts are no nesting


def test_malformed_pages_are_skipped(tmp_path):
    pages = [page(1), page(1, title="Again"), ("x", 5), ("y", {"title": "No sections"}),
             page(2, section_texts=["", ""]), page(3, image_urls=None, image_section_indices=None),
             page(4, section_titles=[])]
    read = Read(EncyclopedicVqaSource(write_pages(tmp_path / "a.json", pages), ImageFolder(None)))
    assert sorted(article.title for article in read.articles.values()) == ["Again", "Bird 3", "Bird 4"]
    assert read.skipped["entry is not a page"] == 2 and read.skipped["article has no text"] == 1
    same_key = [article for article in read.of(ArticleRecord) if article.key.endswith("Bird_1")]
    assert [article.title for article in same_key] == ["Bird 1", "Again"]


def test_a_truncated_file_yields_its_pages_before_the_error(tmp_path):
    path = write_pages(tmp_path / "a.json", [page(number) for number in range(2000)])
    path.write_bytes(path.read_bytes()[:-300_000])
    source = EncyclopedicVqaSource(path, ImageFolder(None))
    source.snapshot()
    chunks = source.chunks()
    found = [next(chunks) for _ in range(4)]
    assert sum(len(chunk.content) for chunk in found) == 1024
    with pytest.raises(SourceError, match=r"a\.json' is truncated or damaged before byte \d+"):
        list(chunks)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"a": {"b": 1}}', "no"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(SourceError, match=r"a\.json"):
        EncyclopedicVqaSource(path, ImageFolder(None)).snapshot()
