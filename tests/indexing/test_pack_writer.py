import sqlite3

import numpy as np
import pytest
from little_world import FACTS, FLAGS, SNAPSHOT, articles, flag, images, png, write_little_pack
from PIL import Image

from gog_edge.errors import PackError, PictureError
from gog_edge.indexing.pack_writer import ArticleDraft, ImageDraft, PackWriter
from gog_edge.retrieval.pack import MANIFEST, Pack, read_manifest
from gog_edge.retrieval.retriever import Retriever
from gog_edge.types import ImageQuery, TextQuery


@pytest.fixture
def writer(tmp_path, tiny_encoder):
    with PackWriter(tmp_path / "pack", name="little", snapshot=SNAPSHOT, encoder=tiny_encoder) as writer:
        yield writer


def content(folder):
    """Everything a store holds."""
    db = sqlite3.connect(folder / "store.sqlite")
    dump = list(db.iterdump())
    db.close()
    return dump


def test_the_manifest_says_what_is_there(little_pack_folder, tiny_encoder):
    manifest = read_manifest(little_pack_folder)
    assert (manifest.generation, manifest.parent, manifest.tombstones) == (1, None, ())
    assert (manifest.counts.articles, manifest.counts.images) == (len(FACTS), len(FLAGS))
    assert manifest.counts.paragraphs == 4 * len(FACTS)
    assert manifest.snapshot == SNAPSHOT and manifest.encoder == tiny_encoder.fingerprint
    assert manifest.index.factory == "Flat" and manifest.index.recall == 1.0
    assert {entry.path for entry in manifest.files} == {
        path.relative_to(little_pack_folder).as_posix()
        for path in little_pack_folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def test_the_same_drafts_give_the_same_pack(tmp_path, tiny_encoder, little_pack_folder):
    manifest = write_little_pack(tmp_path / "again", tiny_encoder)
    assert content(tmp_path / "again") == content(little_pack_folder)
    assert manifest == read_manifest(little_pack_folder)


def test_the_same_file_twice_is_one_image_of_both_articles(writer, tiny_encoder):
    writer.add(articles(), images())
    writer.add_image(ImageDraft(png(flag("Spain")), "again", "MIT", "us", ("Guinea", "Spain")))
    assert writer.commit().counts.images == len(FLAGS)
    pack = Pack.open(writer.folder, tiny_encoder)
    (result,) = Retriever(tiny_encoder, [pack]).search([ImageQuery(flag("Spain"))])
    assert result.evidence[0].titles == ("Spain", "Guinea")
    pack.close()


def test_an_article_is_shown_by_the_image_that_is_most_its_own(writer, tiny_encoder):
    writer.add_article(ArticleDraft("Chad", (("", "Chad is."),), "CC0"))
    writer.add_article(ArticleDraft("Romania", (("", "Romania is."),), "CC0"))
    writer.add_image(ImageDraft(png(flag("Romania")), "Romania's", "MIT", "", ("Romania", "Chad")))
    writer.add_image(ImageDraft(png(flag("Chad")), "Chad's", "MIT", "", ("Chad", "Romania")))
    writer.add_image(ImageDraft(png(flag("Spain")), "other", "MIT", "", ("Chad",)))
    writer.commit()
    pack = Pack.open(writer.folder, tiny_encoder)
    results = Retriever(tiny_encoder, [pack]).search([TextQuery("Chad"), TextQuery("Romania")])
    assert [result.evidence[0].image.caption for result in results] == ["Chad's", "Romania's"]
    pack.close()


def test_many_small_shards_and_half_precision(tmp_path, tiny_encoder, monkeypatch):
    monkeypatch.setattr("gog_edge.indexing.pack_writer.BATCH", 3)
    manifest = write_little_pack(tmp_path / "pack", tiny_encoder, shard_rows=3, half=True)
    assert [shard.rows for shard in manifest.shards] == [3, 3, 3, 1]
    assert np.load(tmp_path / "pack" / manifest.shards[0].vectors).dtype == np.float16
    Pack.open(tmp_path / "pack", tiny_encoder).close()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_other_image_formats_are_kept_as_they_are(writer, tiny_encoder, kind, tmp_path):
    Image.fromarray(flag("Spain")).save(tmp_path / "x", kind)
    data = (tmp_path / "x").read_bytes()
    writer.add_article(ArticleDraft("Spain", (("", "It is."),), "CC0"))
    writer.add_image(ImageDraft(data, "", "MIT", "", ("Spain",)))
    writer.commit()
    pack = Pack.open(writer.folder, tiny_encoder)
    assert pack.picture(1).data == data and pack.picture(1).media_type == f"image/{kind.lower()}"
    pack.close()


def test_a_build_that_stops_half_way_is_no_pack(tmp_path, tiny_encoder):
    with (
        pytest.raises(RuntimeError, match="power"),
        PackWriter(tmp_path / "pack", name="little", snapshot=SNAPSHOT, encoder=tiny_encoder) as writer,
    ):
        writer.add(articles(), images())
        raise RuntimeError("power cut")
    with pytest.raises(PackError, match="right folder"):
        Pack.open(tmp_path / "pack", tiny_encoder)


def test_a_folder_in_use_is_not_overwritten(little_pack_folder, tiny_encoder):
    with pytest.raises(PackError, match="never overwritten"):
        write_little_pack(little_pack_folder, tiny_encoder)


@pytest.mark.parametrize("name", ["", "a/b", "..", "ü", "a b"])
def test_names_that_fit_no_address_are_refused(tmp_path, tiny_encoder, name):
    with pytest.raises(PackError, match="named"):
        PackWriter(tmp_path / "pack", name=name, snapshot=SNAPSHOT, encoder=tiny_encoder)
    assert not (tmp_path / "pack").exists()


def test_drafts_that_cannot_be_are_refused(writer):
    writer.add_article(articles()[0])
    with pytest.raises(PackError, match="two articles"):
        writer.add_article(articles()[0])
    with pytest.raises(PackError, match="without any word"):
        writer.add_article(ArticleDraft(" ?", (), "CC0"))
    with pytest.raises(PackError, match="Atlantis"):
        writer.add_image(ImageDraft(png(flag("Spain")), "x", "MIT", "", ("Atlantis",)))
    with pytest.raises(PackError, match="add them first"):
        writer.add_image(ImageDraft(png(flag("Spain")), "x", "MIT", "", ()))
    with pytest.raises(PictureError):
        writer.add_image(ImageDraft(b"no picture", "x", "MIT", "", ("France",)))
    with pytest.raises(PackError, match="no image"):
        writer.commit()


def test_an_article_without_paragraphs_can_be_found_and_quoted_as_nothing(writer, tiny_encoder):
    writer.add_article(ArticleDraft("Empty", (), "CC0"))
    writer.add_article(ArticleDraft("Spain", (("", "Spain is."), ("", "It has Madrid.")), "CC0"))
    writer.add_image(ImageDraft(png(flag("Spain")), "", "MIT", "", ("Empty",)))
    writer.commit()
    pack = Pack.open(writer.folder, tiny_encoder)
    image, text, spain = Retriever(tiny_encoder, [pack]).search(
        [ImageQuery(flag("Spain"), "what?"), TextQuery("Empty"), TextQuery("Madrid")]
    )
    assert image.evidence[0].passages == () and text.evidence[0].titles == ("Empty",)
    assert spain.evidence[0].passages[0].text == "It has Madrid."
    pack.close()
