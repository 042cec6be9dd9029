"""New generations take the place of old ones while these are read."""

import shutil
import threading
import time
from contextlib import contextmanager

import pytest
from little_world import flag, write_little_pack
from tiny_encoder import write_tiny_encoder

from gog_edge.errors import PackError
from gog_edge.indexing.commit import put_in_force
from gog_edge.indexing.compact import compact
from gog_edge.indexing.tombstones import remove
from gog_edge.retrieval import registry as shelf_module
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import MANIFEST, read_manifest
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.registry import Shelf
from gog_edge.types import ImageQuery, TextQuery


@pytest.fixture
def folder(tmp_path, little_pack_folder):
    return shutil.copytree(little_pack_folder, tmp_path / "pack")


class Opened:
    """Opens packs and keeps them; tells which are closed."""

    def __init__(self):
        self.packs = []

    def __call__(self, folder, encoder):
        self.packs.append(Pack.open(folder, encoder))
        return self.packs[-1]

    @property
    def open(self):
        """Generations whose store still answers."""
        return [pack.manifest.generation for pack in self.packs if self._answers(pack)]

    def _answers(self, pack):
        try:
            return pack.store.titles([1]) is not None
        except Exception as exc:
            assert "closed" in str(exc)
            return False


@pytest.fixture
def opened():
    return Opened()


@pytest.fixture
def shelf(folder, tiny_encoder, opened):
    shelf = Shelf([folder], tiny_encoder, opened)
    yield shelf
    shelf.close()
    assert opened.open == []


def best(retriever, query):
    (result,) = retriever.search([query])
    return result.evidence[0].titles[0]


def generation(shelf):
    return shelf.states()[0].generation


def test_a_new_generation_is_served_and_the_old_one_closed(shelf, folder, opened):
    remove(folder, articles=["Spain"])
    assert generation(shelf) == 1
    shelf.refresh()
    (state,) = shelf.states()
    assert (state.name, state.generation, state.switches, state.refused) == ("little", 2, 1, "")
    assert opened.open == [2]
    with shelf.lease() as retriever:
        assert best(retriever, ImageQuery(flag("Spain"))) != "Spain"


def test_who_began_with_a_generation_ends_with_it(shelf, folder, opened):
    with shelf.lease() as old:
        spain = old.packs["little"].store.article("Spain")
        (image,) = old.packs["little"].live_main_images([spain]).values()
        remove(folder, articles=["Spain"])
        shelf.refresh()
        assert opened.open == [1, 2]
        with shelf.lease() as new:
            assert best(new, ImageQuery(flag("Spain"))) != "Spain" and new.packs["little"].picture(image) is None
        assert best(old, ImageQuery(flag("Spain"))) == "Spain"
        assert old.packs["little"].picture(image) is not None
    assert opened.open == [2]


def test_files_that_are_gone_are_still_read_by_who_has_them_open(shelf, folder, tiny_encoder, opened):
    """Two commits: nothing of the first generation is left on the disk. Every connection of its store is used."""
    with shelf.lease() as old:
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


def test_no_more_than_two_generations_are_open(shelf, folder, opened):
    with shelf.lease():
        remove(folder, articles=["Spain"])
        shelf.refresh()
        remove(folder, articles=["Chad"])
        shelf.refresh()
        assert generation(shelf) == 2 and opened.open == [1, 2]
    shelf.refresh()
    assert generation(shelf) == 3 and opened.open == [3]


def test_what_is_not_new_is_not_opened_again(shelf, folder, opened):
    shelf.refresh()
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes())
    shelf.refresh()
    assert len(opened.packs) == 1 and shelf.states()[0].switches == 0


def test_another_calibration_of_the_same_generation_is_a_change(shelf, folder):
    from dataclasses import replace

    put_in_force(folder, replace(read_manifest(folder), duplicate_cosine=0.5))
    shelf.refresh()
    with shelf.lease() as retriever:
        assert retriever.packs["little"].manifest.duplicate_cosine == 0.5
    assert (generation(shelf), shelf.states()[0].switches) == (1, 1)


def spoil(folder):
    """A new generation with an altered file."""
    remove(folder, articles=["Spain"])
    path = folder / read_manifest(folder).tombstones.articles
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"\x07")
    return path, good


def test_a_broken_generation_is_refused_with_its_reason_and_the_old_one_goes_on(shelf, folder, opened, caplog):
    path, good = spoil(folder)
    shelf.refresh()
    (state,) = shelf.states()
    assert (state.generation, state.refusals) == (1, 1) and "is altered" in state.refused
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "is altered" in caplog.text
    with shelf.lease() as retriever:
        assert best(retriever, ImageQuery(flag("Spain"))) == "Spain"
    shelf.refresh()
    assert shelf.states()[0].refusals == 1  # not looked at again at once
    path.write_bytes(good)
    shelf.refresh(hurry=True)
    assert (generation(shelf), shelf.states()[0].refused) == (2, "") and opened.open == [2]


def test_a_refused_generation_is_tried_again_after_a_while(shelf, folder, monkeypatch):
    monkeypatch.setattr(shelf_module, "AGAIN_S", 0.0)
    path, good = spoil(folder)
    shelf.refresh()
    path.write_bytes(good)
    time.sleep(0.01)
    shelf.refresh()
    assert generation(shelf) == 2


@pytest.mark.parametrize("content, reason", [(None, "there is no"), (b"{", "is not JSON"), (b"{}", "schema"),
                                             (b'{"kind": "pack", "schema": 1}', "build it again")])
def test_a_manifest_that_is_none_is_refused(shelf, folder, content, reason):
    path = folder / MANIFEST
    good = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    shelf.refresh()
    shelf.refresh()
    assert reason in shelf.states()[0].refused and generation(shelf) == 1 and shelf.states()[0].refusals == 1
    path.write_bytes(good)
    shelf.refresh()
    assert shelf.states()[0].refused == ""


def test_a_pack_of_another_encoder_is_refused(shelf, folder, tmp_path):
    shutil.rmtree(folder)
    write_little_pack(folder, Encoder.open(write_tiny_encoder(tmp_path / "other", seed=3), threads=1))
    shelf.refresh()
    assert "encoder" in shelf.states()[0].refused
    with shelf.lease() as retriever:
        assert best(retriever, ImageQuery(flag("Spain"))) == "Spain"


def test_a_name_that_another_pack_bears_is_refused(folder, tmp_path, tiny_encoder, opened):
    write_little_pack(tmp_path / "other", tiny_encoder, name="other")
    shelf = Shelf([folder, tmp_path / "other"], tiny_encoder, opened)
    shutil.rmtree(tmp_path / "other")
    write_little_pack(tmp_path / "other", tiny_encoder)
    shelf.refresh()
    assert "same name" in shelf.states()[1].refused and opened.open == [1, 1]
    shelf.close()


def test_the_other_packs_stay_open(folder, tmp_path, tiny_encoder, opened):
    write_little_pack(tmp_path / "other", tiny_encoder, name="other")
    shelf = Shelf([folder, tmp_path / "other"], tiny_encoder, opened)
    remove(folder, articles=["Spain"])
    shelf.refresh()
    assert [state.generation for state in shelf.states()] == [2, 1] and len(opened.packs) == 3
    with shelf.lease() as retriever:
        assert best(retriever, ImageQuery(flag("Spain"))) == "Spain"  # in the other
    shelf.close()
    assert opened.open == []


def test_a_pack_that_changes_while_it_is_opened_is_opened_as_it_is_then(folder, tiny_encoder):
    turns = iter([["Spain"], ["Chad"], []])

    def slow(where, encoder):
        for name in next(turns):
            manifest = read_manifest(where)
            remove(where, articles=[name])
            raise PackError(f"'{manifest.segments[0].store}' is missing")
        return Pack.open(where, encoder)

    shelf = Shelf([folder], tiny_encoder, slow)
    assert generation(shelf) == 3
    shelf.close()


def test_what_cannot_be_opened_at_first_is_said(folder, tmp_path, tiny_encoder, opened):
    with pytest.raises(PackError, match="right folder"):
        Shelf([folder, tmp_path / "none"], tiny_encoder, opened)
    assert opened.open == []


def test_closed_while_it_is_used(shelf, opened):
    with shelf.lease() as retriever:
        shelf.close()
        assert best(retriever, ImageQuery(flag("Spain"))) == "Spain" and opened.open == [1]
    assert opened.open == []
    with pytest.raises(PackError, match="stopping"), shelf.lease():
        pass


def test_closed_while_it_watches(shelf, folder, opened):
    with shelf.watching(every=0.001):
        shelf.close()
        remove(folder, articles=["Spain"])
        shelf.refresh()
        time.sleep(0.05)
        assert any(thread.name == "shelf" for thread in threading.enumerate())
    assert opened.open == []


def test_closed_while_a_new_generation_is_opened(folder, tiny_encoder, opened):
    def closing(place, encoder):
        pack = opened(place, encoder)
        if len(opened.packs) > 1:
            shelf.close()
        return pack

    shelf = Shelf([folder], tiny_encoder, closing)
    remove(folder, articles=["Spain"])
    shelf.refresh()
    assert len(opened.packs) == 2 and opened.open == []


@contextmanager
def until(seconds=20):
    """Waits for what the block's list of conditions says."""
    conditions = []
    yield conditions
    end = time.monotonic() + seconds
    while not all(condition() for condition in conditions):
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_watch_switches_by_itself_and_at_once_when_woken(shelf, folder):
    with shelf.watching(every=0.05):
        remove(folder, articles=["Spain"])
        with until() as conditions:
            conditions.append(lambda: generation(shelf) == 2)
    with shelf.watching(every=600):
        remove(folder, articles=["Chad"])
        shelf.wake()
        with until() as conditions:
            conditions.append(lambda: generation(shelf) == 3)
    remove(folder, articles=["Italy"])
    time.sleep(0.1)
    assert generation(shelf) == 3 and not any(thread.name == "shelf" for thread in threading.enumerate())


def test_no_search_fails_while_generations_come_and_go(shelf, folder, tiny_encoder):
    """Answers are those of the generation that was lent, old or new, never a mixture."""
    names = ["Spain", "Chad", "Italy", "Guinea", "Norway"]
    gone = {1: set()}
    failures, lent, stopped = [], set(), threading.Event()

    def ask():
        while not stopped.is_set():
            try:
                with shelf.lease() as retriever:
                    number = retriever.packs["little"].manifest.generation
                    for name in names:
                        title = best(retriever, ImageQuery(flag(name), "capital"))
                        assert (title == name) == (name not in gone[number])
                    lent.add(number)
            except BaseException as exc:
                failures.append(exc)
                return

    threads = [threading.Thread(target=ask) for _ in range(3)]
    with shelf.watching(every=0.01):
        for thread in threads:
            thread.start()
        for name in names:
            number = read_manifest(folder).generation
            gone[number + 1] = gone[number] | {name}
            gone[number + 2] = gone[number + 1]
            remove(folder, articles=[name])
            compact(folder, tiny_encoder)
            with until() as conditions:
                conditions.append(lambda: generation(shelf) == read_manifest(folder).generation or bool(failures))
        stopped.set()
        for thread in threads:
            thread.join()
    assert not failures and len(lent) >= 4 and generation(shelf) == 11


def test_what_packs_are_opened_with_ends_after_the_last_pack(folder, tiny_encoder, opened):
    """Also where a new generation is being opened when the shelf is closed."""
    ended = []

    def open_pack(folder, encoder):
        pack = opened(folder, encoder)
        if len(opened.packs) == 2:
            shelf.close()
            assert opened.open == [2] and not ended
        return pack

    shelf = Shelf([folder], tiny_encoder, open_pack, lambda: ended.append(opened.open))
    remove(folder, articles=["Spain"])
    shelf.refresh()
    assert ended == [[]]


def test_what_packs_are_opened_with_ends_where_one_does_not_open(folder, tiny_encoder, opened, tmp_path):
    ended = []
    with pytest.raises(PackError):
        Shelf([folder, tmp_path / "none"], tiny_encoder, opened, lambda: ended.append(opened.open))
    assert ended == [[]]
