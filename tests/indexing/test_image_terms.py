"""Equal files in several articles: an image is cited with the licence and attribution of the article that is cited."""

import pytest
from little_world import flag
from PIL import Image

from gog_edge.indexing.build import build_pack
from gog_edge.indexing.compact import compact
from gog_edge.indexing.sources.open import open_source
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.retriever import Retriever
from gog_edge.types import ImageQuery, TextQuery

ROWS = ("file,title,text,licence,attribution\na.png,Blue cup,A cup from Delft.,CC0,Ann\n"
        "b.png,Old mug,A mug from Meissen.,CC BY 4.0,Bob\nc.png,Third jar,A jar from Sevres.,CC0,Ann\n")  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(flag("Norway")).save(source / name)
    Image.fromarray(flag("Chad")).save(source / "d.png")
    (source / "list.csv").write_text(ROWS)
    return source


@pytest.fixture
def pack(folder, tmp_path, tiny_encoder):
    build_pack(open_source(folder), tmp_path / "pack", name="cups", encoder=tiny_encoder, workers=1)
    return tmp_path / "pack"


def search(folder, encoder, query):
    opened = Pack.open(folder, encoder)
    (result,) = Retriever(encoder, [opened]).search([query])
    opened.close()
    return {title: (one.image.licence, one.image.attribution, one.image.caption) for one in result.evidence if one.image
            for title in one.titles}


def check(folder, encoder):
    assert search(folder, encoder, TextQuery("mug from Meissen"))["Old mug"] == ("CC BY 4.0", "Bob", "Old mug")
    assert search(folder, encoder, TextQuery("cup from Delft"))["Blue cup"] == ("CC0", "Ann", "Blue cup")
    found = search(folder, encoder, ImageQuery(flag("Norway")))
    assert {title: found[title][:2] for title in ("Blue cup", "Old mug", "Third jar")} == {
        "Blue cup": ("CC0", "Ann"), "Old mug": ("CC BY 4.0", "Bob"), "Third jar": ("CC0", "Ann")}


def test_an_image_is_cited_with_the_terms_of_its_article(pack, tiny_encoder):
    opened = Pack.open(pack, tiny_encoder)
    assert opened.store.counts().images == 2, "equal files are stored once"
    opened.close()
    check(pack, tiny_encoder)


def test_articles_with_the_same_terms_are_one_evidence(pack, tiny_encoder):
    opened = Pack.open(pack, tiny_encoder)
    (result,) = Retriever(tiny_encoder, [opened]).search([ImageQuery(flag("Norway"))])
    opened.close()
    assert [one.titles for one in result.evidence if "Old mug" not in one.titles][0] == ("Blue cup", "Third jar")


def test_terms_survive_an_update_and_compaction(pack, folder, tiny_encoder):
    (folder / "list.csv").write_text(ROWS.replace("Bob", "Carol"))
    build_pack(open_source(folder), pack, name="cups", encoder=tiny_encoder, workers=1, update=True)
    assert search(pack, tiny_encoder, TextQuery("mug from Meissen"))["Old mug"] == ("CC BY 4.0", "Carol", "Old mug")
    compact(pack, tiny_encoder)
    assert search(pack, tiny_encoder, TextQuery("mug from Meissen"))["Old mug"] == ("CC BY 4.0", "Carol", "Old mug")
    assert search(pack, tiny_encoder, TextQuery("cup from Delft"))["Blue cup"] == ("CC0", "Ann", "Blue cup")
