"""Articles and images taken out of a pack, by name."""

import hashlib
import resource

import numpy as np
import pytest
from listed_source import ListedSource, little_groups
from little_world import FACTS, FLAGS, flag, png

from gog_edge.errors import PackError
from gog_edge.indexing.build import build_pack
from gog_edge.indexing.commit import SETTINGS, writing
from gog_edge.indexing.sources.base import ArticleDraft, ImageDraft
from gog_edge.indexing.tombstones import remove
from gog_edge.retrieval.manifest import read_manifest
from gog_edge.retrieval.pack import Pack, verify_pack
from gog_edge.retrieval.retriever import Retriever
from gog_edge.types import ImageQuery, TextQuery


@pytest.fixture
def folder(tmp_path, tiny_encoder):
    build_pack(ListedSource(little_groups()), tmp_path / "pack", name="little", encoder=tiny_encoder, workers=1)
    return tmp_path / "pack"


@pytest.fixture
def opened(folder, tiny_encoder):
    """Opens the pack as it is now."""
    packs = []

    def now():
        packs.append(Pack.open(folder, tiny_encoder))
        return packs[-1]

    yield now
    for pack in packs:
        pack.close()


def titles(pack, encoder, query):
    (result,) = Retriever(encoder, [pack]).search([query])
    return [title for evidence in result.evidence for title in evidence.titles]


def image_of(pack, title):
    """The id of the image that is most an article's own."""
    article = pack.store.article(title)
    return pack.live_main_images([article])[article]


def state(folder):
    """Every file but the lock, by hash."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "LOCK"}


def test_a_removed_article_is_found_by_nobody_and_nothing_is_written_but_tombstones(folder, opened, tiny_encoder):
    before = read_manifest(folder)
    assert titles(opened(), tiny_encoder, ImageQuery(flag("Spain")))[0] == "Spain"
    manifest = remove(folder, articles=["Spain"])
    assert (manifest.generation, manifest.parent) == (2, 1)
    assert {entry.path for entry in manifest.files} - {entry.path for entry in before.files} == {
        "tombstones/000002-articles.npy", "tombstones/000002-images.npy"}
    assert manifest.counts.articles == before.counts.articles - 1
    assert manifest.counts.images == before.counts.images - 1
    assert manifest.counts.paragraphs == before.counts.paragraphs - 4
    assert verify_pack(folder) == manifest == read_manifest(folder)
    pack = opened()
    for query in (ImageQuery(flag("Spain")), TextQuery("What is the capital of Spain?"), TextQuery("Hispania")):
        assert "Spain" not in titles(pack, tiny_encoder, query)
    assert titles(pack, tiny_encoder, ImageQuery(flag("Italy")))[0] == "Italy"


def test_an_image_stays_while_another_article_shows_it(folder, opened):
    norway = image_of(opened(), "Norway")
    assert remove(folder, articles=["Norway"]).counts.images == len(FLAGS)
    pack = opened()
    assert pack.store.images([norway])[norway].titles == ("Svalbard",) and pack.picture(norway) is not None
    assert remove(folder, articles=["Svalbard"]).counts.images == len(FLAGS) - 1
    assert opened().picture(norway) is None


def test_an_image_that_was_removed_by_name_stays_away_until_it_is_brought_again(folder, opened, tiny_encoder):
    italy = image_of(opened(), "Italy")
    manifest = remove(folder, images=[italy])
    assert (manifest.counts.articles, manifest.counts.images) == (len(FACTS), len(FLAGS) - 1)
    remove(folder, articles=["Chad"])
    other = ((ArticleDraft("Malta", (("Flag", "Malta has one."),), "CC0"),),)
    build_pack(ListedSource(other), folder, name="little", encoder=tiny_encoder, workers=1, add=True)
    pack = opened()
    assert pack.picture(italy) is None and italy not in pack.images.search(tiny_encoder.embed_images([flag("Italy")]),
                                                                           20).ids
    shown = ((ArticleDraft("Tricolour", (("Flag", "Italy flies it."),), "CC0"),
              ImageDraft(png(flag("Italy")), "Italy's", "MIT", "us", ("Tricolour",))),)
    build_pack(ListedSource(shown), folder, name="little", encoder=tiny_encoder, workers=1, add=True)
    assert opened().picture(italy) is not None
    verify_pack(folder)


def test_the_golden_image_may_go(folder, opened):
    golden = read_manifest(folder).golden
    manifest = remove(folder, images=[golden])
    assert manifest.golden not in (None, golden)
    opened()


def test_without_any_image_words_are_still_searched(folder, opened, tiny_encoder):
    manifest = remove(folder, images=range(1, len(FLAGS) + 1))
    assert manifest.golden is None and manifest.counts.images == 0
    assert titles(opened(), tiny_encoder, TextQuery("capital of Spain"))[0] == "Spain"


@pytest.mark.parametrize("name, told", [
    ("Portugl", "'Portugal'"), ("Hispania", "'Spain'"), ("capital of Romania", "'Romania'"),
    ("xyzzy", "as citations write it"), ("", "as citations write it"),
])  # fmt: skip
def test_an_unknown_name_is_told_near_ones_and_nothing_goes(folder, name, told):
    before = state(folder)
    with pytest.raises(PackError, match=f"no article '{name}'.*{told}"):
        remove(folder, articles=["Italy", name])
    assert state(folder) == before


def test_what_is_gone_is_no_near_name(folder):
    remove(folder, articles=["Portugal"])
    with pytest.raises(PackError) as caught:
        remove(folder, articles=["Portugl"])
    assert "Portugal" not in str(caught.value)
    with pytest.raises(PackError, match="no article 'Portugal'"):
        remove(folder, articles=["Portugal"])


def test_a_title_of_two_articles_wants_a_key(tmp_path, tiny_encoder):
    twins = tuple((ArticleDraft("Mercury", (("Lead", text),), "CC0", key=key),)
                  for key, text in (("A/Mercury_(planet)", "A planet."), ("A/Mercury_(element)", "A metal.")))
    build_pack(ListedSource(twins), tmp_path / "pack", name="twins", encoder=tiny_encoder, workers=1)
    with pytest.raises(PackError, match=r"2 articles.*Mercury_\(planet\).*Mercury_\(element\)"):
        remove(tmp_path / "pack", articles=["Mercury"])
    assert remove(tmp_path / "pack", articles=["A/Mercury_(planet)"]).counts.articles == 1


@pytest.mark.parametrize("image", [0, 99, -1])
def test_an_unknown_image_is_refused(folder, image):
    with pytest.raises(PackError, match=f"no image {image}"):
        remove(folder, images=[image])


def test_a_pack_is_never_emptied(folder):
    with pytest.raises(PackError, match="no article would be left"):
        remove(folder, articles=list(FACTS))
    assert verify_pack(folder).generation == 1


def test_a_second_writer_is_refused(folder):
    with writing(folder), pytest.raises(PackError, match="written by another process"):
        remove(folder, articles=["Spain"])


def test_an_unfinished_build_is_not_lost(folder, tiny_encoder):
    torn = ListedSource(little_groups(skip=["Spain"]), per_chunk=2, breaks_at=3)
    with pytest.raises(Exception, match="torn"):
        build_pack(torn, folder, name="little", encoder=tiny_encoder, workers=1, update=True)
    assert (folder / SETTINGS).is_file()
    with pytest.raises(PackError, match="unfinished build"):
        remove(folder, articles=["Italy"])
    whole = ListedSource(torn.groups)
    manifest = build_pack(whole, folder, name="little", encoder=tiny_encoder, workers=1, update=True)
    assert manifest.generation == 2 and remove(folder, articles=["Italy"]).generation == 3


def test_a_folder_without_a_pack_gets_no_lock(tmp_path):
    with pytest.raises(PackError, match="right folder"):
        remove(tmp_path, articles=["Spain"])
    assert not list(tmp_path.iterdir())


def test_ids_of_tombstones_are_sorted(folder):
    remove(folder, articles=["Germany"])
    remove(folder, articles=["France", "Chad"])
    gone = np.load(folder / read_manifest(folder).tombstones.articles)
    assert len(gone) == 3 and (np.diff(gone) > 0).all()


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(PackError, match="cannot be written"), writing(tmp_path / "file" / "pack"):
        pass


@pytest.mark.parametrize("limit", [100, 1_000])
def test_a_full_disk_leaves_the_generation_in_force(folder, opened, limit):
    """Where the tombstones find no room, or the manifest."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))  # as a disk that takes no more
    try:
        with pytest.raises(PackError, match="disk of .* is full"):
            remove(folder, articles=["Spain"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert verify_pack(folder).generation == 1 and opened().store.article("Spain") is not None
    assert remove(folder, articles=["Spain"]).generation == 2
