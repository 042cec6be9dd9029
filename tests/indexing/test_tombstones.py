"""Deletion of articles and images by name."""

import hashlib
import resource
import shutil

import numpy as np
import pytest
from listed_source import ListedSource, little_groups
from little_world import FACTS, FLAGS, flag, png

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.errors import PackError
from gog_edge.indexing.build import build_pack
from gog_edge.indexing.commit import SETTINGS, write_lock
from gog_edge.indexing.compact import compact
from gog_edge.indexing.sources.base import ArticleRecord, ImageRecord
from gog_edge.indexing.tombstones import remove
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import read_manifest
from gog_edge.retrieval.pack import Pack, verify_pack
from gog_edge.retrieval.retriever import Retriever
from gog_edge.types import ImageQuery, TextQuery


@pytest.fixture
def folder(tmp_path, tiny_encoder):
    build_pack(ListedSource(little_groups()), tmp_path / "pack", name="little", encoder=tiny_encoder, workers=1)
    return tmp_path / "pack"


@pytest.fixture
def open_pack(folder, tiny_encoder):
    """Return a function that opens the current generation of the pack."""
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
    """Return the id of the main image of an article."""
    article = pack.store.article_by_key(title)
    return pack.main_images([article])[article]


def state(folder):
    """Return the hash of every file but the lock."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "LOCK"}


def test_removing_an_article_writes_tombstones_only(folder, open_pack, tiny_encoder):
    before = read_manifest(folder)
    assert titles(open_pack(), tiny_encoder, ImageQuery(flag("Spain")))[0] == "Spain"
    manifest = remove(folder, articles=["Spain"])
    assert (manifest.generation, manifest.parent) == (2, 1)
    assert {entry.path for entry in manifest.files} - {entry.path for entry in before.files} == {
        "tombstones/000002-articles.npy", "tombstones/000002-images.npy"}
    assert manifest.counts.articles == before.counts.articles - 1
    assert manifest.counts.images == before.counts.images - 1
    assert manifest.counts.paragraphs == before.counts.paragraphs - 4
    assert verify_pack(folder) == manifest == read_manifest(folder)
    pack = open_pack()
    for query in (ImageQuery(flag("Spain")), TextQuery("What is the capital of Spain?"), TextQuery("Hispania")):
        assert "Spain" not in titles(pack, tiny_encoder, query)
    assert titles(pack, tiny_encoder, ImageQuery(flag("Italy")))[0] == "Italy"


def test_an_image_is_deleted_with_its_last_article(folder, open_pack):
    norway = image_of(open_pack(), "Norway")
    assert remove(folder, articles=["Norway"]).counts.images == len(FLAGS)
    pack = open_pack()
    assert pack.store.images([norway])[norway].titles == ("Svalbard",) and pack.image_file(norway) is not None
    assert remove(folder, articles=["Svalbard"]).counts.images == len(FLAGS) - 1
    assert open_pack().image_file(norway) is None


def test_an_image_deleted_by_id_returns_with_a_new_article(folder, open_pack, tiny_encoder):
    italy = image_of(open_pack(), "Italy")
    manifest = remove(folder, images=[italy])
    assert (manifest.counts.articles, manifest.counts.images) == (len(FACTS), len(FLAGS) - 1)
    remove(folder, articles=["Chad"])
    other = ((ArticleRecord("Malta", (("Flag", "Malta has one."),), "CC0"),),)
    build_pack(ListedSource(other), folder, name="little", encoder=tiny_encoder, workers=1, add=True)
    pack = open_pack()
    hits = pack.images.search(tiny_encoder.embed_images([flag("Italy")]), 20)
    assert pack.image_file(italy) is None and italy not in hits.ids
    shown = ((ArticleRecord("Tricolour", (("Flag", "Italy flies it."),), "CC0"),
              ImageRecord(png(flag("Italy")), "Italy's", "MIT", "us", ("Tricolour",))),)
    build_pack(ListedSource(shown), folder, name="little", encoder=tiny_encoder, workers=1, add=True)
    assert open_pack().image_file(italy) is not None
    verify_pack(folder)


def test_the_golden_image_is_replaced_when_it_is_deleted(folder, open_pack):
    golden = read_manifest(folder).golden
    manifest = remove(folder, images=[golden])
    assert manifest.golden not in (None, golden)
    open_pack()


def test_a_pack_without_images_is_searched_by_words(folder, open_pack, tiny_encoder):
    manifest = remove(folder, images=range(1, len(FLAGS) + 1))
    assert manifest.golden is None and manifest.counts.images == 0
    assert titles(open_pack(), tiny_encoder, TextQuery("capital of Spain"))[0] == "Spain"


@pytest.mark.parametrize("name, expected", [
    ("Portugl", "'Portugal'"), ("Hispania", "'Spain'"), ("capital of Romania", "'Romania'"),
    ("xyzzy", "as citations contain it"), ("", "as citations contain it"),
])  # fmt: skip
def test_an_unknown_article_is_refused_with_similar_titles(folder, name, expected):
    before = state(folder)
    with pytest.raises(PackError, match=f"the article '{name}' does not exist.*{expected}"):
        remove(folder, articles=["Italy", name])
    assert state(folder) == before


def test_deleted_titles_are_not_suggested(folder):
    remove(folder, articles=["Portugal"])
    with pytest.raises(PackError) as caught:
        remove(folder, articles=["Portugl"])
    assert "Portugal" not in str(caught.value)
    with pytest.raises(PackError, match="the article 'Portugal' does not exist"):
        remove(folder, articles=["Portugal"])


def test_an_ambiguous_title_is_refused_with_its_keys(tmp_path, tiny_encoder):
    twins = tuple((ArticleRecord("Mercury", (("Lead", text),), "CC0", key=key),)
                  for key, text in (("A/Mercury_(planet)", "A planet."), ("A/Mercury_(element)", "A metal.")))
    build_pack(ListedSource(twins), tmp_path / "pack", name="twins", encoder=tiny_encoder, workers=1)
    with pytest.raises(PackError, match=r"2 articles.*Mercury_\(planet\).*Mercury_\(element\)"):
        remove(tmp_path / "pack", articles=["Mercury"])
    assert remove(tmp_path / "pack", articles=["A/Mercury_(planet)"]).counts.articles == 1


@pytest.mark.parametrize("image", [0, 99, -1])
def test_an_unknown_image_is_refused(folder, image):
    with pytest.raises(PackError, match=f"the image {image} does not exist"):
        remove(folder, images=[image])


def test_the_last_article_cannot_be_deleted(folder):
    with pytest.raises(PackError, match="no article would remain"):
        remove(folder, articles=list(FACTS))
    assert verify_pack(folder).generation == 1


def test_a_second_writer_is_refused(folder):
    with write_lock(folder), pytest.raises(PackError, match="written by another process"):
        remove(folder, articles=["Spain"])


def test_removal_is_refused_during_an_unfinished_build(folder, tiny_encoder):
    damaged = ListedSource(little_groups(skip=["Spain"]), per_chunk=2, breaks_at=3)
    with pytest.raises(Exception, match="damaged"):
        build_pack(damaged, folder, name="little", encoder=tiny_encoder, workers=1, update=True)
    assert (folder / SETTINGS).is_file()
    with pytest.raises(PackError, match="unfinished build"):
        remove(folder, articles=["Italy"])
    whole = ListedSource(damaged.groups)
    manifest = build_pack(whole, folder, name="little", encoder=tiny_encoder, workers=1, update=True)
    assert manifest.generation == 2 and remove(folder, articles=["Italy"]).generation == 3


def test_no_lock_file_is_created_outside_of_a_pack(tmp_path):
    with pytest.raises(PackError, match="right folder"):
        remove(tmp_path, articles=["Spain"])
    assert not list(tmp_path.iterdir())


def test_tombstones_are_sorted(folder):
    remove(folder, articles=["Germany"])
    remove(folder, articles=["France", "Chad"])
    deleted = np.load(folder / read_manifest(folder).tombstones.articles)
    assert len(deleted) == 3 and (np.diff(deleted) > 0).all()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(PackError, match="cannot be written"), write_lock(tmp_path / "file" / "pack"):
        pass


@pytest.mark.parametrize("limit", [100, 1_000])
def test_a_full_disk_leaves_the_current_generation(folder, open_pack, limit):
    """While the tombstones are written, or the manifest."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))  # behaves like a full disk
    try:
        with pytest.raises(PackError, match="disk of .* is full"):
            remove(folder, articles=["Spain"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert verify_pack(folder).generation == 1 and open_pack().store.article_by_key("Spain") is not None
    assert remove(folder, articles=["Spain"]).generation == 2


def test_a_pack_of_the_first_release_is_changed(tmp_path):
    """The shipped atlas was written by that version: articles are removed and added, then it is compacted."""
    bundle = DEFAULT_BUNDLE
    folder = shutil.copytree(bundle / "packs" / "atlas", tmp_path / "atlas")
    encoder = Encoder.open(bundle / "encoder", threads=1)
    before = read_manifest(folder)
    assert remove(folder, articles=["Chad"]).counts.articles == before.counts.articles - 1
    record = ArticleRecord("Atlantis", (("Capital", "The capital of Atlantis is Poseidonis."),), "CC0")
    added = build_pack(ListedSource(((record,),)), folder, name="atlas", encoder=encoder, workers=1, add=True)
    assert added.counts.articles == before.counts.articles
    assert compact(folder, encoder).counts == added.counts == verify_pack(folder).counts
    pack = Pack.open(folder, encoder)
    assert pack.store.article_by_key("Chad") is None and titles(pack, encoder, TextQuery("Poseidonis"))[0] == "Atlantis"
    pack.close()
