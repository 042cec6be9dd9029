import io
import sqlite3

import numpy as np
import pytest
from little_world import FACTS, FLAGS, SNAPSHOT, articles, flag, images, png, write_little_pack
from PIL import Image

from gog_edge.errors import PackError, PictureError
from gog_edge.files import read_json
from gog_edge.indexing.commit import BUILD, LOCK
from gog_edge.indexing.generation import PackOptions, PackWriter
from gog_edge.indexing.sources.base import ArticleRecord, ImageRecord
from gog_edge.indexing.vectors.embedding import TILE_BOXES
from gog_edge.retrieval.manifest import GENERATIONS, MANIFEST, Manifest, generation_path, read_manifest
from gog_edge.retrieval.pack import Pack, verify_pack
from gog_edge.retrieval.retriever import Retriever
from gog_edge.types import ImageQuery, TextQuery


@pytest.fixture
def writer(tmp_path, tiny_encoder):
    with PackWriter(tmp_path / "pack", name="little", snapshot=SNAPSHOT, encoder=tiny_encoder) as writer:
        yield writer


def store_dump(folder):
    """Return the SQL dump of a store."""
    db = sqlite3.connect(folder / "store/000001.sqlite")
    dump = list(db.iterdump())
    db.close()
    return dump


def test_the_manifest_describes_the_pack(little_pack_folder, tiny_encoder):
    manifest = read_manifest(little_pack_folder)
    assert (manifest.generation, manifest.parent, manifest.tombstones) == (1, None, None)
    assert (manifest.counts.articles, manifest.counts.images) == (len(FACTS), len(FLAGS))
    assert manifest.counts.paragraphs == 4 * len(FACTS)
    assert manifest.snapshot == SNAPSHOT and manifest.encoder == tiny_encoder.fingerprint
    assert manifest.images.rows == manifest.captions.rows == len(FLAGS)
    for space in (manifest.images, manifest.captions):
        assert space.index.rows == space.rows and space.index.recall >= 0.95
    assert {entry.path for entry in manifest.files} == {
        path.relative_to(little_pack_folder).as_posix()
        for path in little_pack_folder.rglob("*")
        if path.is_file() and path.name not in (MANIFEST, LOCK) and path.parent.name != GENERATIONS
    }
    assert Manifest.from_json(read_json(generation_path(little_pack_folder, 1), what="pack")) == manifest
    assert not (little_pack_folder / BUILD).exists()


def test_the_same_records_give_the_same_pack(tmp_path, tiny_encoder, little_pack_folder):
    manifest = write_little_pack(tmp_path / "again", tiny_encoder)
    assert store_dump(tmp_path / "again") == store_dump(little_pack_folder)
    first = read_manifest(little_pack_folder)
    assert [entry for entry in manifest.files if "index" not in entry.path] == [
        entry for entry in first.files if "index" not in entry.path
    ]


def test_a_repeated_file_is_one_image_of_both_articles(writer, tiny_encoder):
    writer.add(articles(), images())
    writer.add_image(ImageRecord(png(flag("Spain")), "again", "MIT", "us", ("Guinea", "Spain")))
    assert writer.commit().counts.images == len(FLAGS)
    pack = Pack.open(writer.folder, tiny_encoder)
    (result,) = Retriever(tiny_encoder, [pack]).search([ImageQuery(flag("Spain"))])
    assert result.evidence[0].titles == ("Spain", "Guinea")
    pack.close()


def test_the_main_image_of_an_article_is_the_one_that_names_it_first(writer, tiny_encoder):
    writer.add_article(ArticleRecord("Chad", (("", "Chad is."),), "CC0"))
    writer.add_article(ArticleRecord("Romania", (("", "Romania is."),), "CC0"))
    writer.add_image(ImageRecord(png(flag("Romania")), "Romania's", "MIT", "", ("Romania", "Chad")))
    writer.add_image(ImageRecord(png(flag("Chad")), "Chad's", "MIT", "", ("Chad", "Romania")))
    writer.add_image(ImageRecord(png(flag("Spain")), "other", "MIT", "", ("Chad",)))
    writer.commit()
    pack = Pack.open(writer.folder, tiny_encoder)
    results = Retriever(tiny_encoder, [pack]).search([TextQuery("Chad"), TextQuery("Romania")])
    assert [result.evidence[0].image.caption for result in results] == ["Chad's", "Romania's"]
    pack.close()


def test_small_shards_are_stored_as_float16(tmp_path, tiny_encoder):
    manifest = write_little_pack(tmp_path / "pack", tiny_encoder, shard_rows=3)
    assert [shard.rows for shard in manifest.images.shards] == [3, 3, 3, 1]
    assert np.load(tmp_path / "pack" / manifest.images.shards[0].vectors).dtype == np.float16
    Pack.open(tmp_path / "pack", tiny_encoder).close()
    assert verify_pack(tmp_path / "pack") == manifest


def test_tiles_of_lead_images_are_indexed(tmp_path, tiny_encoder):
    """A crop of one corner of a picture has nearly the vector of its tile."""
    corners = [flag(name) for name in ("France", "Spain", "Guinea", "Germany")]
    wall = np.concatenate([np.concatenate(corners[:2], axis=1), np.concatenate(corners[2:], axis=1)])
    found = {}
    for tiles in (False, True):
        folder = tmp_path / str(tiles)
        options = PackOptions(tiles=tiles)
        with PackWriter(folder, name="walls", snapshot=SNAPSHOT, encoder=tiny_encoder, options=options) as writer:
            writer.add_article(ArticleRecord("Wall", (("", "Four flags."),), "CC0"))
            writer.add_image(ImageRecord(png(wall), "", "MIT", "", ("Wall",), lead=True))
            writer.add_image(ImageRecord(png(flag("Norway")), "", "MIT", "", ("Wall",)))
            manifest = writer.commit()
        assert manifest.images.rows == (2 + len(TILE_BOXES) if tiles else 2)
        pack = Pack.open(folder, tiny_encoder)
        hits = pack.images.search(tiny_encoder.embed_images([wall[:48, :72]]), 2)
        found[tiles] = float(hits.scores[0, hits.ids[0].tolist().index(1)])
        pack.close()
        assert verify_pack(folder).counts.images == 2
    assert found[True] > 0.99 > found[False]


def test_a_pack_without_images_needs_no_encoder(tmp_path, tiny_encoder):
    with PackWriter(tmp_path / "pack", name="texts", snapshot=SNAPSHOT, encoder=None) as writer:
        writer.add(articles(), [])
        manifest = writer.commit()
    assert manifest.encoder is None and manifest.golden is None and manifest.images.rows == 0
    assert verify_pack(tmp_path / "pack") == manifest
    pack = Pack.open(tmp_path / "pack", tiny_encoder)
    words, picture = Retriever(tiny_encoder, [pack]).search([TextQuery("Madrid"), ImageQuery(flag("Spain"))])
    assert words.evidence[0].titles == ("Spain",) and picture.evidence == ()
    pack.close()


def test_paragraphs_have_their_offset_in_the_article(little_pack):
    """The text of an article is its paragraphs, separated by blank lines."""
    article = articles()[3]
    first = 3 * len(article.paragraphs) + 1
    rows = little_pack.store.paragraphs(range(first, first + len(article.paragraphs)))
    whole = "\n\n".join(text for _, text in article.paragraphs)
    texts = [row.text for row in rows.values()]
    assert [whole[row.start : row.start + len(row.text)] for row in rows.values()] == texts


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_jpeg_and_webp_are_stored_unchanged(writer, tiny_encoder, kind, tmp_path):
    Image.fromarray(flag("Spain")).save(tmp_path / "x", kind)
    data = (tmp_path / "x").read_bytes()
    writer.add_article(ArticleRecord("Spain", (("", "It is."),), "CC0"))
    writer.add_image(ImageRecord(data, "", "MIT", "", ("Spain",)))
    writer.commit()
    pack = Pack.open(writer.folder, tiny_encoder)
    assert pack.image_file(1).data == data and pack.image_file(1).media_type == f"image/{kind.lower()}"
    pack.close()


def test_an_interrupted_build_is_not_a_pack(tmp_path, tiny_encoder):
    with (
        pytest.raises(RuntimeError, match="power"),
        PackWriter(tmp_path / "pack", name="little", snapshot=SNAPSHOT, encoder=tiny_encoder) as writer,
    ):
        writer.add(articles(), images())
        raise RuntimeError("power cut")
    with pytest.raises(PackError, match="not finished"):
        Pack.open(tmp_path / "pack", tiny_encoder)


def test_a_folder_that_is_not_empty_is_refused(little_pack_folder, tiny_encoder):
    with pytest.raises(PackError, match="never overwritten"):
        write_little_pack(little_pack_folder, tiny_encoder)


@pytest.mark.parametrize("name", ["", "a/b", "..", "ü", "a b"])
def test_names_that_are_not_valid_in_an_address_are_refused(tmp_path, tiny_encoder, name):
    with pytest.raises(PackError, match="name of a pack must consist of"):
        PackWriter(tmp_path / "pack", name=name, snapshot=SNAPSHOT, encoder=tiny_encoder)
    assert not (tmp_path / "pack").exists()


def test_invalid_records_are_refused(writer):
    writer.add_article(articles()[0])
    with pytest.raises(PackError, match="duplicate article key"):
        writer.add_article(articles()[0])
    with pytest.raises(PackError, match="title has no word"):
        writer.add_article(ArticleRecord(" ?", (), "CC0"))
    with pytest.raises(PackError, match="Atlantis"):
        writer.add_image(ImageRecord(png(flag("Spain")), "x", "MIT", "", ("Atlantis",)))
    with pytest.raises(PackError, match="belongs to no article"):
        writer.add_image(ImageRecord(png(flag("Spain")), "x", "MIT", "", ()))
    with pytest.raises(PictureError):
        writer.add_image(ImageRecord(b"not a picture", "x", "MIT", "", ("France",)))


def test_a_pack_without_articles_is_refused(writer):
    with pytest.raises(PackError, match="no article"):
        writer.commit()


def test_unsupported_image_formats_are_refused(writer):
    writer.add_article(articles()[0])
    stream = io.BytesIO()
    Image.fromarray(flag("Spain")).save(stream, "BMP")
    with pytest.raises(PackError, match="PNG, JPEG or WebP"):
        writer.add_image(ImageRecord(stream.getvalue(), "x", "MIT", "", ("France",)))


def test_an_article_without_paragraphs_is_found_without_passages(writer, tiny_encoder):
    writer.add_article(ArticleRecord("Empty", (), "CC0"))
    writer.add_article(ArticleRecord("Spain", (("", "Spain is."), ("", "It has Madrid.")), "CC0"))
    writer.add_image(ImageRecord(png(flag("Spain")), "", "MIT", "", ("Empty",)))
    writer.commit()
    pack = Pack.open(writer.folder, tiny_encoder)
    image, text, spain = Retriever(tiny_encoder, [pack]).search(
        [ImageQuery(flag("Spain"), "what?"), TextQuery("Empty"), TextQuery("Madrid")]
    )
    assert image.evidence[0].passages == () and text.evidence[0].titles == ("Empty",)
    assert spain.evidence[0].passages[0].text == "It has Madrid."
    pack.close()
