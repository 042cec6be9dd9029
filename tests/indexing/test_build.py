import json
import sqlite3

import numpy as np
import pytest
from listed_source import ListedSource, changed, little_groups
from little_world import FACTS, FLAGS, articles, flag, png

from gog_edge.errors import PackError, SourceError
from gog_edge.indexing.build import build_pack
from gog_edge.indexing.commit import changing, writing
from gog_edge.indexing.generation import PackOptions
from gog_edge.indexing.sources.base import ArticleDraft, ImageDraft, Skipped
from gog_edge.retrieval.manifest import MANIFEST, Snapshot, generation_path, read_manifest
from gog_edge.retrieval.pack import Pack, verify_pack
from gog_edge.retrieval.retriever import Retriever
from gog_edge.types import ImageQuery, TextQuery

NAMES = sorted(FACTS)


def build(folder, groups, encoder, **more):
    settings = {"name": "little", "encoder": encoder, "workers": 1, "options": PackOptions(shard_rows=4)} | more
    return build_pack(ListedSource(groups), folder, **settings)


def found(folder, encoder, query):
    """Titles of the best evidence, and what it says."""
    pack = Pack.open(folder, encoder)
    (result,) = Retriever(encoder, [pack]).search([query])
    pack.close()
    best = result.evidence[0] if result.evidence else None
    return (best.titles, [passage.text for passage in best.passages]) if best else ((), [])


def live_titles(folder, encoder):
    pack = Pack.open(folder, encoder)
    titles = {hit.article: name for name in NAMES for hit in pack.store.named([name.lower()]) if not hit.redirect}
    pack.close()
    return sorted(titles.values())


def test_a_snapshot_becomes_a_pack(tmp_path, tiny_encoder):
    manifest = build(tmp_path / "pack", little_groups(), tiny_encoder)
    assert (manifest.counts.articles, manifest.counts.images) == (len(FACTS), len(FLAGS))
    assert [shard.rows for shard in manifest.images.shards] == [4, 4, 2]
    assert verify_pack(tmp_path / "pack") == manifest
    titles, _ = found(tmp_path / "pack", tiny_encoder, ImageQuery(flag("Norway")))
    assert titles == ("Norway", "Svalbard")
    assert found(tmp_path / "pack", tiny_encoder, TextQuery("Hispania"))[0] == ("Spain",)
    report = json.loads((tmp_path / "pack" / manifest.report).read_text())
    assert report["skipped"] == [{"reason": "redirect to no article", "count": 1, "examples": ["Atlantis"]}]


def test_reading_in_other_processes_gives_the_same_rows(tmp_path, tiny_encoder):
    one = build(tmp_path / "one", little_groups(), tiny_encoder)
    two = build(tmp_path / "two", little_groups(), tiny_encoder, workers=2)
    assert dump(tmp_path / "one") == dump(tmp_path / "two")
    assert [shard.rows for shard in one.images.shards] == [shard.rows for shard in two.images.shards]


def dump(folder, number=1):
    db = sqlite3.connect(folder / f"store/{number:06d}.sqlite")
    rows = list(db.iterdump())
    db.close()
    return rows


def test_a_torn_snapshot_loses_nothing_that_was_read(tmp_path, tiny_encoder):
    """Stopped in the middle, the build goes on where it stopped and comes to the same pack."""
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
    assert dump(folder) == dump(tmp_path / "whole")


def test_shards_that_are_done_are_not_embedded_again(tmp_path, tiny_encoder):
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


def test_an_unfinished_build_is_finished_with_its_own_settings(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    with pytest.raises(SourceError):
        build_pack(ListedSource(little_groups(), breaks_at=1), folder, name="little", encoder=tiny_encoder, workers=1)
    with pytest.raises(PackError, match="unfinished build with another name"):
        build_pack(ListedSource(little_groups()), folder, name="other", encoder=tiny_encoder, workers=1)
    other = Snapshot("another", "2026-02-02", "u", "s", "CC0")
    with pytest.raises(PackError, match="unfinished build with another snapshot"):
        build_pack(ListedSource(little_groups(), about=other), folder, name="little", encoder=tiny_encoder, workers=1)


def test_only_one_process_writes(tmp_path, tiny_encoder):
    with writing(tmp_path / "pack"), pytest.raises(PackError, match="another process"):
        build(tmp_path / "pack", little_groups(), tiny_encoder)


def test_folders_with_something_else_and_packs_are_not_built_over(tmp_path, tiny_encoder):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(PackError, match="letter.txt"):
        build(tmp_path / "mine", little_groups(), tiny_encoder)
    build(tmp_path / "pack", little_groups(), tiny_encoder)
    with pytest.raises(PackError, match="holds pack 'little' already"):
        build(tmp_path / "pack", little_groups(), tiny_encoder, name="other")
    with pytest.raises(PackError, match="holds no pack"):
        build(tmp_path / "new", little_groups(), tiny_encoder, update=True)


def test_a_snapshot_without_articles_is_refused_and_says_why(tmp_path, tiny_encoder):
    with pytest.raises(PackError, match="article without text: 1"):
        build(tmp_path / "pack", ((Skipped("article without text", "Nothing"),),), tiny_encoder)


def test_what_cannot_be_written_is_counted_and_the_rest_is_there(tmp_path, tiny_encoder):
    twice = articles()[0]
    strange = ImageDraft(png(flag("Spain")), "lost", "MIT", "", ("Atlantis",))
    groups = (*little_groups(), (twice,), (ArticleDraft("???", (), "CC0"),), (strange,),
              (Skipped("image does not decode", "a.png"),), (Skipped("image does not decode", "b.png"),))
    manifest = build(tmp_path / "pack", groups, tiny_encoder)
    assert manifest.counts.articles == len(FACTS)
    report = json.loads((tmp_path / "pack" / manifest.report).read_text())["skipped"]
    counts = {entry["reason"]: (entry["count"], entry["examples"]) for entry in report}
    assert counts == {
        "image does not decode": (2, ["a.png", "b.png"]), "redirect to no article": (1, ["Atlantis"]),
        "two articles of one key": (1, ["France"]), "title without any word": (1, ["???"]),
        "image of no article": (1, ["Atlantis"]),
    }  # fmt: skip


# --- the next generation ------------------------------------------------------------------------


def test_an_update_writes_and_embeds_only_what_changed(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    first = build(folder, little_groups(), tiny_encoder)
    later = changed(little_groups(skip=["Chad"]), "Spain", "Spain won the cup.")
    later = (*later, (ArticleDraft("Peru", (("", "The capital of Peru is Lima."),), "CC0"),
                      ImageDraft(png(flag("France")[:, ::-1]), "Flag of Peru", "MIT", "us", ("Peru",))))
    second = build(folder, later, tiny_encoder, update=True)
    assert (second.generation, second.parent) == (2, 1)
    assert second.segments[0] == first.segments[0]
    assert second.segments[1].counts.articles == 2 and second.segments[1].counts.images == 1
    assert second.images.rows == first.images.rows + 1
    assert (second.counts.articles, second.counts.images) == (len(FACTS), len(FLAGS))
    assert verify_pack(folder) == second
    assert live_titles(folder, tiny_encoder) == [name for name in NAMES if name != "Chad"]
    assert found(folder, tiny_encoder, TextQuery("Who won the cup?"))[1] == ["Spain won the cup."]
    assert found(folder, tiny_encoder, ImageQuery(flag("Spain"), "cup"))[1] == ["Spain won the cup."]
    assert found(folder, tiny_encoder, ImageQuery(flag("Chad")))[0] == ("Romania",)
    assert found(folder, tiny_encoder, TextQuery("Hispania"))[0] == ("Spain",)


def test_ids_of_what_did_not_change_stay(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    build(folder, little_groups(), tiny_encoder)
    pack = Pack.open(folder, tiny_encoder)
    before = {row.text: row.id for row in pack.store.paragraphs(range(1, 100)).values()}
    pack.close()
    build(folder, changed(little_groups(), "Spain", "News."), tiny_encoder, update=True)
    pack = Pack.open(folder, tiny_encoder)
    spain = list(FACTS).index("Spain") + 1
    gone = pack.store.leads([spain])[spain]
    after = {row.text: row.id for row in pack.store.paragraphs(range(1, 200)).values()}
    kept = [text for text in before if "Spain " not in text and not text.endswith("Spain.")]
    assert {text: after[text] for text in kept} == {text: before[text] for text in kept} and len(kept) > 30
    assert gone is not None
    pack.close()


def test_adding_keeps_what_the_addition_does_not_name(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    build(folder, little_groups(), tiny_encoder)
    extra = changed(tuple(group for group in little_groups() if group[0] == articles()[4]), "Spain", "Spain has news.")
    second = build(folder, extra, tiny_encoder, add=True)
    assert second.counts.articles == len(FACTS) and second.images.rows == len(FLAGS)
    assert live_titles(folder, tiny_encoder) == NAMES
    assert found(folder, tiny_encoder, TextQuery("news"))[1] == ["Spain has news."]


def test_a_pack_that_was_copied_without_its_lock_can_be_added_to(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    build(folder, little_groups(skip=["Chad"]), tiny_encoder)
    (folder / "LOCK").unlink()
    assert build(folder, little_groups(), tiny_encoder, update=True).generation == 2


def test_an_image_whose_article_came_back_is_alive_again(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    build(folder, little_groups(), tiny_encoder)
    second = build(folder, little_groups(skip=["Spain"]), tiny_encoder, update=True)
    assert second.counts.images == len(FLAGS) - 1
    third = build(folder, little_groups(), tiny_encoder, update=True)
    assert third.counts.images == third.images.rows == len(FLAGS)
    assert found(folder, tiny_encoder, ImageQuery(flag("Spain")))[0] == ("Spain",)


def test_a_new_caption_of_an_old_image_is_embedded(tmp_path, tiny_encoder):
    """The image stays; what is written under it is another."""
    folder = tmp_path / "pack"
    article = ArticleDraft("Flag", (("", "A flag."),), "CC0")
    for caption, update in (("red", False), ("blue", True)):
        group = (article, ImageDraft(png(flag("Spain")), caption, "MIT", "", ("Flag",)))
        manifest = build(folder, (group,), tiny_encoder, update=update)
    assert manifest.images.rows == 1 and manifest.captions.rows == 2
    pack = Pack.open(folder, tiny_encoder)
    hits = pack.captions.search(tiny_encoder.embed_texts(["blue"]), 1)
    assert hits.ids[0, 0] == 1 and hits.scores[0, 0] > 0.99
    assert pack.store.images([1])[1].caption == "blue"
    pack.close()


def test_captions_that_stay_are_not_embedded_again(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    first = build(folder, little_groups(), tiny_encoder)
    for number in range(3):
        later = build(folder, changed(little_groups(), "Spain", f"News {number}."), tiny_encoder, update=True)
    assert later.generation == 4 and later.captions.rows == first.captions.rows


def test_the_second_of_two_articles_of_one_key_never_replaces_the_first(tmp_path, tiny_encoder):
    """Not in a later update of the same snapshot either."""
    folder = tmp_path / "pack"
    groups = (*little_groups(), (ArticleDraft("France", (("", "Another France."),), "CC0"),))
    build(folder, groups, tiny_encoder)
    assert build(folder, groups, tiny_encoder, update=True).generation == 1
    assert "Another" not in " ".join(found(folder, tiny_encoder, TextQuery("France"))[1])


def test_another_memory_or_recall_costs_no_embedding(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    with pytest.raises(PackError, match="no index .* fits"):
        build(folder, little_groups(), tiny_encoder, options=PackOptions(shard_rows=4, memory=10))
    assert not list((folder / "vectors").glob("*"))  # said before anything was embedded

    def stop(stage, done, total):
        if stage == "captions":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(folder, little_groups(), tiny_encoder, options=PackOptions(shard_rows=4, memory=2**20), on_progress=stop)
    made = {path.name: path.stat().st_mtime_ns for path in (folder / "vectors").glob("*images*")}
    manifest = build(folder, little_groups(), tiny_encoder, options=PackOptions(shard_rows=4, recall=0.9))
    assert made and {name: (folder / "vectors" / name).stat().st_mtime_ns for name in made} == made
    assert manifest.target.recall == 0.9 and manifest.target.memory is None


def test_other_shards_are_another_build(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    with pytest.raises(SourceError):
        build_pack(ListedSource(little_groups(), breaks_at=1), folder, name="little", encoder=tiny_encoder, workers=1)
    with pytest.raises(PackError, match="another shard_rows"):
        build(folder, little_groups(), tiny_encoder, options=PackOptions(shard_rows=5))


def test_a_build_that_was_killed_behind_its_commit_is_done(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    first = build(folder, little_groups(), tiny_encoder)
    (folder / "build").mkdir()
    settings = {"generation": 1, "name": "little", "snapshot": {}, "encoder": {}, "options": {}}
    (folder / "build/settings.json").write_text(json.dumps(settings))
    with changing(folder) as manifest:
        assert manifest == first
    assert build(folder, little_groups(), tiny_encoder) == first
    assert not (folder / "build").exists()
    assert build(folder, changed(little_groups(), "Spain", "News."), tiny_encoder, update=True).generation == 2


def test_files_of_others_are_never_removed(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    (folder / "reports").mkdir(parents=True)
    (folder / "reports/thesis.txt").write_text("years of work")
    with pytest.raises(PackError, match="reports"):
        build(folder, little_groups(), tiny_encoder)
    (folder / "LOCK").touch()
    build(folder, little_groups(), tiny_encoder)
    assert (folder / "reports/thesis.txt").read_text() == "years of work"


def test_a_generation_removes_the_files_of_the_one_before_its_parent(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    for number in range(3):
        build(folder, changed(little_groups(), "Spain", f"News {number}."), tiny_encoder, update=number > 0)
    manifest = read_manifest(folder)
    assert manifest.generation == 3
    assert not generation_path(folder, 1).exists() and generation_path(folder, 2).exists()
    tombs = sorted(path.name for path in (folder / "tombstones").iterdir())
    assert tombs == ["000002-articles.npy", "000002-images.npy", "000003-articles.npy", "000003-images.npy"]
    assert verify_pack(folder) == manifest


def test_a_failed_update_leaves_the_generation_in_force(tmp_path, tiny_encoder):
    folder = tmp_path / "pack"
    build(folder, little_groups(), tiny_encoder)
    before = (folder / MANIFEST).read_bytes()
    later = changed(little_groups(), "Spain", "News.")
    with pytest.raises(SourceError):
        build_pack(ListedSource(later, breaks_at=2), folder, name="little", encoder=tiny_encoder, workers=1,
                   update=True)
    assert (folder / MANIFEST).read_bytes() == before
    assert verify_pack(folder).generation == 1
    assert build_pack(ListedSource(later), folder, name="little", encoder=tiny_encoder, workers=1,
                      update=True).generation == 2


def test_another_encoder_cannot_go_on_with_a_pack(tmp_path, tiny_encoder):
    build(tmp_path / "pack", little_groups(), tiny_encoder)
    with pytest.raises(PackError, match="another encoder"):
        build(tmp_path / "pack", little_groups(), None, update=True)


def test_a_build_that_died_before_its_store_was_renamed_goes_on(tmp_path, tiny_encoder):
    """The store is whole and its place in the pack is not: nothing is read again."""
    folder = tmp_path / "pack"
    copy = tmp_path / "copy.sqlite"
    whole = build(tmp_path / "whole", little_groups(), tiny_encoder)
    copy.write_bytes((tmp_path / "whole/store/000001.sqlite").read_bytes())
    with pytest.raises(SourceError):
        build_pack(ListedSource(little_groups(), breaks_at=1), folder, name="little", encoder=tiny_encoder, workers=1,
                   options=PackOptions(shard_rows=4))
    for beside in (folder / "build").glob("store.sqlite*"):
        beside.unlink()
    copy.rename(folder / "build/store.sqlite")
    manifest = build_pack(ListedSource(little_groups(), breaks_at=0), folder, name="little", encoder=tiny_encoder,
                          workers=1, options=PackOptions(shard_rows=4))
    assert manifest.segments == whole.segments and verify_pack(folder) == manifest
