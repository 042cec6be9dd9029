import json
import sqlite3

import numpy as np
import pytest
from listed_source import ListedSource, little_groups, with_news
from little_world import FACTS, FLAGS, articles, flag, png

from gog_edge.errors import PackError, SourceError
from gog_edge.indexing.build import build_pack
from gog_edge.indexing.commit import modify_pack, write_lock
from gog_edge.indexing.generation import PackOptions
from gog_edge.indexing.sources.base import ArticleRecord, ImageRecord, Skipped
from gog_edge.retrieval.manifest import MANIFEST, Snapshot, generation_path, read_manifest
from gog_edge.retrieval.pack import Pack, verify_pack
from gog_edge.retrieval.retriever import Retriever
from gog_edge.types import ImageQuery, TextQuery

NAMES = sorted(FACTS)


def build(folder, groups, encoder, **more):
    settings = {"name": "little", "encoder": encoder, "workers": 1, "options": PackOptions(shard_rows=4)} | more
    return build_pack(ListedSource(groups), folder, **settings)


def best_evidence(folder, encoder, query):
    """Return titles and passages of the best evidence."""
    pack = Pack.open(folder, encoder)
    (result,) = Retriever(encoder, [pack]).search([query])
    pack.close()
    best = result.evidence[0] if result.evidence else None
    return (best.titles, [passage.text for passage in best.passages]) if best else ((), [])


def live_titles(folder, encoder):
    pack = Pack.open(folder, encoder)
    titles = {hit.article: name for name in NAMES for hit in pack.store.find_names([name.lower()]) if not hit.redirect}
    pack.close()
    return sorted(titles.values())


def test_a_pack_is_built_from_a_snapshot(tmp_path, tiny_encoder):
    manifest = build(tmp_path / "pack", little_groups(), tiny_encoder)
    assert (manifest.counts.articles, manifest.counts.images) == (len(FACTS), len(FLAGS))
    assert [shard.rows for shard in manifest.images.shards] == [4, 4, 2]
    assert verify_pack(tmp_path / "pack") == manifest
    titles, _ = best_evidence(tmp_path / "pack", tiny_encoder, ImageQuery(flag("Norway")))
    assert titles == ("Norway", "Svalbard")
    assert best_evidence(tmp_path / "pack", tiny_encoder, TextQuery("Hispania"))[0] == ("Spain",)
    report = json.loads((tmp_path / "pack" / manifest.report).read_text())
    assert report["skipped"] == [
        {"reason": "redirect to a missing article", "kind": "", "count": 1, "examples": ["Atlantis"]}]


def test_worker_processes_yield_the_same_rows(tmp_path, tiny_encoder):
    one = build(tmp_path / "one", little_groups(), tiny_encoder)
    two = build(tmp_path / "two", little_groups(), tiny_encoder, workers=2)
    assert store_dump(tmp_path / "one") == store_dump(tmp_path / "two")
    assert [shard.rows for shard in one.images.shards] == [shard.rows for shard in two.images.shards]


def store_dump(folder, number=1):
    db = sqlite3.connect(folder / f"store/{number:06d}.sqlite")
    rows = list(db.iterdump())
    db.close()
    return rows


def test_a_build_is_resumed_after_a_source_error(tmp_path, tiny_encoder):
    """The resumed build reads the remaining chunks only, and gives the same pack."""
    folder, groups = tmp_path / "pack", little_groups()
    with pytest.raises(SourceError, match="chunk 3"):
        build_pack(ListedSource(groups, breaks_at=3), folder, name="little", encoder=tiny_encoder, workers=1)
    with pytest.raises(PackError, match="build"):
        Pack.open(folder, tiny_encoder)
    stages = []
    build_pack(ListedSource(groups), folder, name="little", encoder=tiny_encoder, workers=1,
               on_progress=lambda *stage: stages.append(stage))
    assert stages[0] == ("reading", 8, len(groups))
    build_pack(ListedSource(groups), tmp_path / "whole", name="little", encoder=tiny_encoder, workers=1)
    assert store_dump(folder) == store_dump(tmp_path / "whole")


def test_complete_shards_are_not_embedded_again(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    whole = build(tmp_path / "whole", little_groups(), tiny_encoder)

    def stop(stage, done, total):
        if stage == "images" and done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(folder, little_groups(), tiny_encoder, on_progress=stop)
    done = {path.name: path.stat().st_mtime_ns for path in (folder / "vectors").iterdir()}
    assert sorted(done) == [f"000001-images-00000{n}{end}" for n in (0, 1) for end in (".ids.npy", ".npy")]
    manifest = build(folder, little_groups(), tiny_encoder)
    assert {name: (folder / "vectors" / name).stat().st_mtime_ns for name in done} == done
    for mine, theirs in zip(manifest.images.shards, whole.images.shards, strict=True):
        np.testing.assert_array_equal(np.load(folder / mine.vectors), np.load(tmp_path / "whole" / theirs.vectors))


def test_an_unfinished_build_cannot_be_resumed_with_other_settings(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    with pytest.raises(SourceError):
        build_pack(ListedSource(little_groups(), breaks_at=1), folder, name="little", encoder=tiny_encoder, workers=1)
    with pytest.raises(PackError, match="unfinished build with another name"):
        build_pack(ListedSource(little_groups()), folder, name="other", encoder=tiny_encoder, workers=1)
    other = Snapshot("another", "2026-02-02", "u", "s", "CC0")
    with pytest.raises(PackError, match="unfinished build with another snapshot"):
        build_pack(ListedSource(little_groups(), about=other), folder, name="little", encoder=tiny_encoder, workers=1)


def test_a_second_writer_is_refused(tmp_path, tiny_encoder):
    with write_lock(tmp_path / "pack"), pytest.raises(PackError, match="another process"):
        build(tmp_path / "pack", little_groups(), tiny_encoder)


def test_folders_with_other_files_and_existing_packs_are_refused(tmp_path, tiny_encoder):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(PackError, match="letter.txt"):
        build(tmp_path / "mine", little_groups(), tiny_encoder)
    build(tmp_path / "pack", little_groups(), tiny_encoder)
    with pytest.raises(PackError, match="contains pack 'little' already"):
        build(tmp_path / "pack", little_groups(), tiny_encoder, name="other")
    with pytest.raises(PackError, match="does not contain a pack"):
        build(tmp_path / "new", little_groups(), tiny_encoder, update=True)


def test_a_snapshot_without_articles_is_refused_with_the_skip_reasons(tmp_path, tiny_encoder):
    with pytest.raises(PackError, match="article without text: 1"):
        build(tmp_path / "pack", ((Skipped("article without text", "Nothing"),),), tiny_encoder)


def test_rejected_records_are_reported_as_skipped(tmp_path, tiny_encoder):
    twice = articles()[0]
    orphan = ImageRecord(png(flag("Spain")), "lost", "MIT", "", ("Atlantis",))
    groups = (*little_groups(), (twice,), (ArticleRecord("???", (), "CC0"),), (orphan,),
              (Skipped("image does not decode", "a.png"),), (Skipped("image does not decode", "b.png"),))
    manifest = build(tmp_path / "pack", groups, tiny_encoder)
    assert manifest.counts.articles == len(FACTS)
    report = json.loads((tmp_path / "pack" / manifest.report).read_text())["skipped"]
    counts = {entry["reason"]: (entry["count"], entry["examples"]) for entry in report}
    assert counts == {
        "image does not decode": (2, ["a.png", "b.png"]), "redirect to a missing article": (1, ["Atlantis"]),
        "duplicate article key": (1, ["France"]), "title has no word": (1, ["???"]),
        "image belongs to no article": (1, ["Atlantis"]),
    }  # fmt: skip


# --- the next generation ------------------------------------------------------------------------


def test_an_update_writes_and_embeds_only_what_changed(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    first = build(folder, little_groups(), tiny_encoder)
    later = with_news(little_groups(skip=["Chad"]), "Spain", "Spain won the cup.")
    later = (*later, (ArticleRecord("Peru", (("", "The capital of Peru is Lima."),), "CC0"),
                      ImageRecord(png(flag("France")[:, ::-1]), "Flag of Peru", "MIT", "us", ("Peru",))))
    second = build(folder, later, tiny_encoder, update=True)
    assert (second.generation, second.parent) == (2, 1)
    assert second.segments[0] == first.segments[0]
    assert second.segments[1].counts.articles == 2 and second.segments[1].counts.images == 1
    assert second.images.rows == first.images.rows + 1
    assert (second.counts.articles, second.counts.images) == (len(FACTS), len(FLAGS))
    assert verify_pack(folder) == second
    assert live_titles(folder, tiny_encoder) == [name for name in NAMES if name != "Chad"]
    assert best_evidence(folder, tiny_encoder, TextQuery("Who won the cup?"))[1] == ["Spain won the cup."]
    assert best_evidence(folder, tiny_encoder, ImageQuery(flag("Spain"), "cup"))[1] == ["Spain won the cup."]
    assert best_evidence(folder, tiny_encoder, ImageQuery(flag("Chad")))[0] == ("Romania",)
    assert best_evidence(folder, tiny_encoder, TextQuery("Hispania"))[0] == ("Spain",)


def test_ids_of_unchanged_articles_are_stable(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    build(folder, little_groups(), tiny_encoder)
    pack = Pack.open(folder, tiny_encoder)
    before = {row.text: row.id for row in pack.store.paragraphs(range(1, 100)).values()}
    pack.close()
    build(folder, with_news(little_groups(), "Spain", "News."), tiny_encoder, update=True)
    pack = Pack.open(folder, tiny_encoder)
    spain = list(FACTS).index("Spain") + 1
    old_lead = pack.store.lead_paragraphs([spain])[spain]
    after = {row.text: row.id for row in pack.store.paragraphs(range(1, 200)).values()}
    unchanged = [text for text in before if "Spain " not in text and not text.endswith("Spain.")]
    assert {text: after[text] for text in unchanged} == {text: before[text] for text in unchanged}
    assert len(unchanged) > 30
    assert old_lead is not None
    pack.close()


def test_an_addition_keeps_other_articles(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    build(folder, little_groups(), tiny_encoder)
    spain = tuple(group for group in little_groups() if group[0] == articles()[4])
    extra = with_news(spain, "Spain", "Spain has news.")
    second = build(folder, extra, tiny_encoder, add=True)
    assert second.counts.articles == len(FACTS) and second.images.rows == len(FLAGS)
    assert live_titles(folder, tiny_encoder) == NAMES
    assert best_evidence(folder, tiny_encoder, TextQuery("news"))[1] == ["Spain has news."]


def test_a_pack_without_a_lock_file_can_be_updated(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    build(folder, little_groups(skip=["Chad"]), tiny_encoder)
    (folder / "LOCK").unlink()
    assert build(folder, little_groups(), tiny_encoder, update=True).generation == 2


def test_an_image_is_live_again_when_its_article_returns(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    build(folder, little_groups(), tiny_encoder)
    second = build(folder, little_groups(skip=["Spain"]), tiny_encoder, update=True)
    assert second.counts.images == len(FLAGS) - 1
    third = build(folder, little_groups(), tiny_encoder, update=True)
    assert third.counts.images == third.images.rows == len(FLAGS)
    assert best_evidence(folder, tiny_encoder, ImageQuery(flag("Spain")))[0] == ("Spain",)


def test_a_new_caption_of_an_old_image_is_embedded(tmp_path, tiny_encoder):
    """The image is unchanged, its caption is new."""
    folder = tmp_path / "pack"
    article = ArticleRecord("Flag", (("", "A flag."),), "CC0")
    for caption, update in (("red", False), ("blue", True)):
        group = (article, ImageRecord(png(flag("Spain")), caption, "MIT", "", ("Flag",)))
        manifest = build(folder, (group,), tiny_encoder, update=update)
    assert manifest.images.rows == 1 and manifest.captions.rows == 2
    pack = Pack.open(folder, tiny_encoder)
    hits = pack.captions.search(tiny_encoder.embed_texts(["blue"]), 1)
    assert hits.ids[0, 0] == 1 and hits.scores[0, 0] > 0.99
    assert pack.store.images([1])[1].caption == "blue"
    pack.close()


def test_unchanged_captions_are_not_embedded_again(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    first = build(folder, little_groups(), tiny_encoder)
    for number in range(3):
        later = build(folder, with_news(little_groups(), "Spain", f"News {number}."), tiny_encoder, update=True)
    assert later.generation == 4 and later.captions.rows == first.captions.rows


def test_a_duplicate_key_never_replaces_the_first_article(tmp_path, tiny_encoder):
    """Neither in the first build nor in an update from the same snapshot."""
    folder = tmp_path / "pack"
    groups = (*little_groups(), (ArticleRecord("France", (("", "Another France."),), "CC0"),))
    build(folder, groups, tiny_encoder)
    assert build(folder, groups, tiny_encoder, update=True).generation == 1
    assert "Another" not in " ".join(best_evidence(folder, tiny_encoder, TextQuery("France"))[1])


def test_memory_and_recall_can_be_changed_without_embedding_again(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    with pytest.raises(PackError, match="no index .* fits"):
        build(folder, little_groups(), tiny_encoder, options=PackOptions(shard_rows=4, memory=10))
    assert not list((folder / "vectors").glob("*"))  # refused before anything was embedded

    def stop(stage, done, total):
        if stage == "captions":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(folder, little_groups(), tiny_encoder, options=PackOptions(shard_rows=4, memory=2**20), on_progress=stop)
    made = {path.name: path.stat().st_mtime_ns for path in (folder / "vectors").glob("*images*")}
    manifest = build(folder, little_groups(), tiny_encoder, options=PackOptions(shard_rows=4, recall=0.9))
    assert made and {name: (folder / "vectors" / name).stat().st_mtime_ns for name in made} == made
    assert manifest.target.recall == 0.9 and manifest.target.memory is None


def test_the_shard_size_of_an_unfinished_build_cannot_be_changed(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    with pytest.raises(SourceError):
        build_pack(ListedSource(little_groups(), breaks_at=1), folder, name="little", encoder=tiny_encoder, workers=1)
    with pytest.raises(PackError, match="another shard_rows"):
        build(folder, little_groups(), tiny_encoder, options=PackOptions(shard_rows=5))


def test_a_build_that_was_killed_after_its_commit_is_complete(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    first = build(folder, little_groups(), tiny_encoder)
    (folder / "build").mkdir()
    settings = {"generation": 1, "name": "little", "snapshot": {}, "encoder": {}, "options": {}}
    (folder / "build/settings.json").write_text(json.dumps(settings))
    with modify_pack(folder) as manifest:
        assert manifest == first
    assert build(folder, little_groups(), tiny_encoder) == first
    assert not (folder / "build").exists()
    assert build(folder, with_news(little_groups(), "Spain", "News."), tiny_encoder, update=True).generation == 2


def test_foreign_files_are_never_deleted(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    (folder / "reports").mkdir(parents=True)
    (folder / "reports/thesis.txt").write_text("years of work")
    with pytest.raises(PackError, match="reports"):
        build(folder, little_groups(), tiny_encoder)
    (folder / "LOCK").touch()
    build(folder, little_groups(), tiny_encoder)
    assert (folder / "reports/thesis.txt").read_text() == "years of work"


def test_a_commit_deletes_the_files_of_generations_before_the_parent(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    for number in range(3):
        build(folder, with_news(little_groups(), "Spain", f"News {number}."), tiny_encoder, update=number > 0)
    manifest = read_manifest(folder)
    assert manifest.generation == 3
    assert not generation_path(folder, 1).exists() and generation_path(folder, 2).exists()
    tombs = sorted(path.name for path in (folder / "tombstones").iterdir())
    assert tombs == ["000002-articles.npy", "000002-images.npy", "000003-articles.npy", "000003-images.npy"]
    assert verify_pack(folder) == manifest


def test_a_failed_update_leaves_the_current_generation(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    build(folder, little_groups(), tiny_encoder)
    before = (folder / MANIFEST).read_bytes()
    later = with_news(little_groups(), "Spain", "News.")
    with pytest.raises(SourceError):
        build_pack(ListedSource(later, breaks_at=2), folder, name="little", encoder=tiny_encoder, workers=1,
                   update=True)
    assert (folder / MANIFEST).read_bytes() == before
    assert verify_pack(folder).generation == 1
    assert build_pack(ListedSource(later), folder, name="little", encoder=tiny_encoder, workers=1,
                      update=True).generation == 2


def test_an_update_with_another_encoder_is_refused(tmp_path, tiny_encoder):
    build(tmp_path / "pack", little_groups(), tiny_encoder)
    with pytest.raises(PackError, match="another encoder"):
        build(tmp_path / "pack", little_groups(), None, update=True)


def test_a_build_is_resumed_after_its_store_was_finished_but_not_moved(tmp_path, tiny_encoder):
    """The snapshot is not read again."""
    folder = tmp_path / "pack"
    copy = tmp_path / "copy.sqlite"
    whole = build(tmp_path / "whole", little_groups(), tiny_encoder)
    copy.write_bytes((tmp_path / "whole/store/000001.sqlite").read_bytes())
    with pytest.raises(SourceError):
        build_pack(ListedSource(little_groups(), breaks_at=1), folder, name="little", encoder=tiny_encoder, workers=1,
                   options=PackOptions(shard_rows=4))
    for unfinished in (folder / "build").glob("store.sqlite*"):
        unfinished.unlink()
    copy.rename(folder / "build/store.sqlite")
    manifest = build_pack(ListedSource(little_groups(), breaks_at=0), folder, name="little", encoder=tiny_encoder,
                          workers=1, options=PackOptions(shard_rows=4))
    assert manifest.segments == whole.segments and verify_pack(folder) == manifest
