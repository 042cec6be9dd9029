"""New generations replace old ones while these are searched."""

import shutil
import threading
import time
from contextlib import contextmanager

import pytest
from little_world import flag, write_little_pack
from tiny_encoder import write_tiny_encoder

from gog_edge.errors import PackError
from gog_edge.indexing.commit import publish_manifest
from gog_edge.indexing.compact import compact
from gog_edge.indexing.tombstones import remove
from gog_edge.retrieval import registry as registry_module
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import MANIFEST, read_manifest
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.registry import PackRegistry
from gog_edge.types import ImageQuery, TextQuery


@pytest.fixture
def folder(tmp_path, little_pack_folder):
    return shutil.copytree(little_pack_folder, tmp_path / "pack")


class PackOpener:
    """Opens packs and keeps them, to see which are still open."""

    def __init__(self):
        self.packs = []

    def __call__(self, folder, encoder):
        self.packs.append(Pack.open(folder, encoder))
        return self.packs[-1]

    @property
    def open(self):
        """Return the generations whose store can be read."""
        return [pack.manifest.generation for pack in self.packs if self._can_read(pack)]

    def _can_read(self, pack):
        try:
            return pack.store.titles([1]) is not None
        except Exception as exc:
            assert "closed" in str(exc)
            return False


@pytest.fixture
def opened():
    return PackOpener()


@pytest.fixture
def registry(folder, tiny_encoder, opened):
    registry = PackRegistry([folder], tiny_encoder, opened)
    yield registry
    registry.close()
    assert opened.open == []


def best(retriever, query):
    (result,) = retriever.search([query])
    return result.evidence[0].titles[0]


def generation(registry):
    return registry.states()[0].generation


def test_a_new_generation_is_served_and_the_old_one_is_closed(registry, folder, opened):
    remove(folder, articles=["Spain"])
    assert generation(registry) == 1
    registry.refresh()
    (state,) = registry.states()
    assert (state.name, state.generation, state.switches, state.refused) == ("little", 2, 1, "")
    assert opened.open == [2]
    with registry.lease() as retriever:
        assert best(retriever, ImageQuery(flag("Spain"))) != "Spain"


def test_a_lease_keeps_its_generation(registry, folder, opened):
    with registry.lease() as old:
        spain = old.packs["little"].store.article_by_key("Spain")
        (image,) = old.packs["little"].main_images([spain]).values()
        remove(folder, articles=["Spain"])
        registry.refresh()
        assert opened.open == [1, 2]
        with registry.lease() as new:
            assert best(new, ImageQuery(flag("Spain"))) != "Spain" and new.packs["little"].image_file(image) is None
        assert best(old, ImageQuery(flag("Spain"))) == "Spain"
        assert old.packs["little"].image_file(image) is not None
    assert opened.open == [2]


def test_a_lease_reads_files_that_were_deleted(registry, folder, tiny_encoder, opened):
    """After two commits no file of the first generation is left on disk. Every connection of its store is used."""
    with registry.lease() as old:
        store = folder / old.packs["little"].manifest.segments[0].store
        compact(folder, tiny_encoder)
        remove(folder, articles=["Spain"])
        assert not store.exists()
        barrier, found = threading.Barrier(8), []

        def ask():
            barrier.wait(30)
            for _ in range(20):
                found.append((best(old, ImageQuery(flag("Spain"), "capital")), best(old, TextQuery("Oslo"))))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 160 and set(found) == {("Spain", "Norway")}


def test_at_most_two_generations_are_open(registry, folder, opened):
    with registry.lease():
        remove(folder, articles=["Spain"])
        registry.refresh()
        remove(folder, articles=["Chad"])
        registry.refresh()
        assert generation(registry) == 2 and opened.open == [1, 2]
    registry.refresh()
    assert generation(registry) == 3 and opened.open == [3]


def test_an_unchanged_manifest_is_not_opened_again(registry, folder, opened):
    registry.refresh()
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes())
    registry.refresh()
    assert len(opened.packs) == 1 and registry.states()[0].switches == 0


def test_another_calibration_of_the_same_generation_is_a_change(registry, folder):
    from dataclasses import replace

    publish_manifest(folder, replace(read_manifest(folder), duplicate_cosine=0.5))
    registry.refresh()
    with registry.lease() as retriever:
        assert retriever.packs["little"].manifest.duplicate_cosine == 0.5
    assert (generation(registry), registry.states()[0].switches) == (1, 1)


def write_damaged_generation(folder):
    """Write a new generation with an altered file. Return its path and its correct content."""
    remove(folder, articles=["Spain"])
    path = folder / read_manifest(folder).tombstones.articles
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"\x07")
    return path, good


def test_a_damaged_generation_is_refused_with_a_reason(registry, folder, opened, caplog):
    path, good = write_damaged_generation(folder)
    registry.refresh()
    (state,) = registry.states()
    assert (state.generation, state.refusals) == (1, 1) and "is altered" in state.refused
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "is altered" in caplog.text
    with registry.lease() as retriever:
        assert best(retriever, ImageQuery(flag("Spain"))) == "Spain"
    registry.refresh()
    assert registry.states()[0].refusals == 1  # not tried again at once
    path.write_bytes(good)
    registry.refresh(force=True)
    assert (generation(registry), registry.states()[0].refused) == (2, "") and opened.open == [2]


def test_a_refused_generation_is_tried_again_after_the_retry_interval(registry, folder, monkeypatch):
    monkeypatch.setattr(registry_module, "RETRY_INTERVAL_S", 0.0)
    path, good = write_damaged_generation(folder)
    registry.refresh()
    path.write_bytes(good)
    time.sleep(0.01)
    registry.refresh()
    assert generation(registry) == 2


@pytest.mark.parametrize("content, reason", [(None, "does not exist"), (b"{", "is not JSON"), (b"{}", "schema"),
                                             (b'{"kind": "pack", "schema": 1}', "build the pack again")])
def test_a_missing_or_invalid_manifest_is_refused(registry, folder, content, reason):
    path = folder / MANIFEST
    good = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    registry.refresh()
    registry.refresh()
    assert reason in registry.states()[0].refused and generation(registry) == 1 and registry.states()[0].refusals == 1
    path.write_bytes(good)
    registry.refresh()
    assert registry.states()[0].refused == ""


def test_a_pack_of_another_encoder_is_refused(registry, folder, tmp_path):
    shutil.rmtree(folder)
    write_little_pack(folder, Encoder.open(write_tiny_encoder(tmp_path / "other", seed=3), threads=1))
    registry.refresh()
    assert "encoder" in registry.states()[0].refused
    with registry.lease() as retriever:
        assert best(retriever, ImageQuery(flag("Spain"))) == "Spain"


def test_a_name_that_another_pack_has_is_refused(folder, tmp_path, tiny_encoder, opened):
    write_little_pack(tmp_path / "other", tiny_encoder, name="other")
    registry = PackRegistry([folder, tmp_path / "other"], tiny_encoder, opened)
    shutil.rmtree(tmp_path / "other")
    write_little_pack(tmp_path / "other", tiny_encoder)
    registry.refresh()
    assert "same name" in registry.states()[1].refused and opened.open == [1, 1]
    registry.close()


def test_the_other_packs_are_not_opened_again(folder, tmp_path, tiny_encoder, opened):
    write_little_pack(tmp_path / "other", tiny_encoder, name="other")
    registry = PackRegistry([folder, tmp_path / "other"], tiny_encoder, opened)
    remove(folder, articles=["Spain"])
    registry.refresh()
    assert [state.generation for state in registry.states()] == [2, 1] and len(opened.packs) == 3
    with registry.lease() as retriever:
        assert best(retriever, ImageQuery(flag("Spain"))) == "Spain"  # in the other
    registry.close()
    assert opened.open == []


def test_a_pack_that_changes_while_it_is_opened_is_opened_again(folder, tiny_encoder):
    turns = iter([["Spain"], ["Chad"], []])

    def slow(where, encoder):
        for name in next(turns):
            manifest = read_manifest(where)
            remove(where, articles=[name])
            raise PackError(f"'{manifest.segments[0].store}' is missing")
        return Pack.open(where, encoder)

    registry = PackRegistry([folder], tiny_encoder, slow)
    assert generation(registry) == 3
    registry.close()


def test_a_pack_that_cannot_be_opened_is_an_error(folder, tmp_path, tiny_encoder, opened):
    with pytest.raises(PackError, match="right folder"):
        PackRegistry([folder, tmp_path / "none"], tiny_encoder, opened)
    assert opened.open == []


def test_close_waits_for_leases(registry, opened):
    with registry.lease() as retriever:
        registry.close()
        assert best(retriever, ImageQuery(flag("Spain"))) == "Spain" and opened.open == [1]
    assert opened.open == []
    with pytest.raises(PackError, match="stopping"), registry.lease():
        pass


def test_close_while_it_watches(registry, folder, opened):
    with registry.watch(interval_s=0.001):
        registry.close()
        remove(folder, articles=["Spain"])
        registry.refresh()
        time.sleep(0.05)
        assert any(thread.name == "pack-registry" for thread in threading.enumerate())
    assert opened.open == []


def test_close_while_a_new_generation_is_opened(folder, tiny_encoder, opened):
    def closing(place, encoder):
        pack = opened(place, encoder)
        if len(opened.packs) > 1:
            registry.close()
        return pack

    registry = PackRegistry([folder], tiny_encoder, closing)
    remove(folder, articles=["Spain"])
    registry.refresh()
    assert len(opened.packs) == 2 and opened.open == []


@contextmanager
def until(seconds=20):
    """Wait for the conditions that the block appends to its list."""
    conditions = []
    yield conditions
    end = time.monotonic() + seconds
    while not all(condition() for condition in conditions):
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_watch_switches_by_itself_and_at_once_on_request(registry, folder):
    with registry.watch(interval_s=0.05):
        remove(folder, articles=["Spain"])
        with until() as conditions:
            conditions.append(lambda: generation(registry) == 2)
    with registry.watch(interval_s=600):
        remove(folder, articles=["Chad"])
        registry.request_refresh()
        with until() as conditions:
            conditions.append(lambda: generation(registry) == 3)
    remove(folder, articles=["Italy"])
    time.sleep(0.1)
    assert generation(registry) == 3 and not any(thread.name == "pack-registry" for thread in threading.enumerate())


def test_no_search_fails_while_generations_come_and_go(registry, folder, tiny_encoder):
    """Results are those of the leased generation, old or new, never a mixture."""
    names = ["Spain", "Chad", "Italy", "Guinea", "Norway"]
    deleted = {1: set()}
    failures, leased, stopped = [], set(), threading.Event()

    def ask():
        while not stopped.is_set():
            try:
                with registry.lease() as retriever:
                    number = retriever.packs["little"].manifest.generation
                    for name in names:
                        title = best(retriever, ImageQuery(flag(name), "capital"))
                        assert (title == name) == (name not in deleted[number])
                    leased.add(number)
            except BaseException as exc:
                failures.append(exc)
                return

    threads = [threading.Thread(target=ask) for _ in range(3)]
    with registry.watch(interval_s=0.01):
        for thread in threads:
            thread.start()
        for name in names:
            number = read_manifest(folder).generation
            deleted[number + 1] = deleted[number] | {name}
            deleted[number + 2] = deleted[number + 1]
            remove(folder, articles=[name])
            compact(folder, tiny_encoder)
            with until() as conditions:
                conditions.append(lambda: generation(registry) == read_manifest(folder).generation or bool(failures))
        stopped.set()
        for thread in threads:
            thread.join()
    assert not failures and len(leased) >= 4 and generation(registry) == 11


def test_on_closed_is_called_after_the_last_pack_is_closed(folder, tiny_encoder, opened):
    """Also if a new generation is being opened when the registry is closed."""
    ended = []

    def open_pack(folder, encoder):
        pack = opened(folder, encoder)
        if len(opened.packs) == 2:
            registry.close()
            assert opened.open == [2] and not ended
        return pack

    registry = PackRegistry([folder], tiny_encoder, open_pack, lambda: ended.append(opened.open))
    remove(folder, articles=["Spain"])
    registry.refresh()
    assert ended == [[]]


def test_on_closed_is_called_if_a_pack_cannot_be_opened(folder, tiny_encoder, opened, tmp_path):
    ended = []
    with pytest.raises(PackError):
        PackRegistry([folder, tmp_path / "none"], tiny_encoder, opened, lambda: ended.append(opened.open))
    assert ended == [[]]
