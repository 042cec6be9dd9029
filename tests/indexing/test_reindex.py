"""`gog-edge pack reindex`: packs of schema 2 get the words of today; ids, texts, pictures and vectors stay."""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from listed_source import ListedSource, little_groups, with_news
from little_world import FACTS, FLAGS, flag
from old_store import downgrade
from tiny_text_encoder import write_tiny_text_encoder
from typer.testing import CliRunner

from gog_edge.cli import app
from gog_edge.errors import PackError
from gog_edge.indexing.build import build_pack, read_snapshot
from gog_edge.indexing.calibration import calibrate_pack
from gog_edge.indexing.commit import write_lock
from gog_edge.indexing.compact import compact
from gog_edge.indexing.reindex import COPYING, INDEXING, reindex
from gog_edge.indexing.sources.base import ArticleRecord
from gog_edge.indexing.tombstones import remove
from gog_edge.retrieval.manifest import MANIFEST, Calibration, read_manifest
from gog_edge.retrieval.pack import Pack, verify_pack
from gog_edge.retrieval.retriever import Retriever
from gog_edge.retrieval.text.encoder import TextEncoder
from gog_edge.retrieval.text.segment import STORE_SCHEMA
from gog_edge.types import ImageQuery, TextQuery

GREEK = (ArticleRecord("Αθήνα", (("", "Η Αθήνα είναι η πρωτεύουσα της Ελλάδας."),), "CC BY-SA 4.0", ("Αθήναι",)),)
KOREAN = (ArticleRecord("베를린", (("수도", "베를린은 독일의 수도이다."),), "CC BY-SA 4.0"),)
TABLES = ("licences", "articles", "sections", "paragraphs", "images", "pixels", "links", "skipped", "kept", "counted")
QUERIES = [*(ImageQuery(flag(name), f"What is the capital of {name}?") for name in FLAGS),
           *(TextQuery(f"currency of {name}") for name in FACTS if name != "Chad")]  # fmt: skip


def build(folder, encoder, groups, **more):
    return build_pack(ListedSource(groups), folder, name="little", encoder=encoder, workers=1, **more)


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_encoder):
    """Build a pack of three segments with deleted articles, and take a copy of it back to schema 2."""
    root = tmp_path_factory.mktemp("built")
    folder = root / "pack"
    build(folder, tiny_encoder, (*little_groups(skip=["Italy"]), GREEK))
    build(folder, tiny_encoder, (*with_news(little_groups(), "Spain", "Spain has news."), GREEK), update=True)
    build(folder, tiny_encoder, (KOREAN,), add=True)
    remove(folder, articles=["Chad"])
    shutil.copytree(folder, root / "today")
    downgrade(folder)
    return root


@pytest.fixture
def folder(built, tmp_path):
    """Return a new copy of the old pack, beside one of the pack of today."""
    for name in ("pack", "today"):
        shutil.copytree(built / name, tmp_path / name)
    return tmp_path / "pack"


def rows(folder, table):
    found = []
    for segment in read_manifest(folder).segments:
        with closing(sqlite3.connect(folder / segment.store)) as db:
            found.append(db.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall())
    return found


def hashes(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "LOCK"}


def titles(folder, encoder, text):
    with closing(Pack.open(folder, encoder)) as pack:
        (result,) = Retriever(encoder, [pack]).search([TextQuery(text, text)])
        return [title for one in result.evidence for title in one.titles]


def answers(folder, encoder):
    with closing(Pack.open(folder, encoder)) as pack:
        return Retriever(encoder, [pack]).search(QUERIES)


def test_an_old_pack_is_refused_with_the_command(folder, tiny_encoder):
    for attempt in (lambda: Pack.open(folder, tiny_encoder), lambda: verify_pack(folder),
                    lambda: compact(folder, tiny_encoder), lambda: remove(folder, articles=["Spain"]),
                    lambda: build(folder, tiny_encoder, little_groups(), update=True)):  # fmt: skip
        with pytest.raises(PackError, match=f"schema 3, got 2; convert the pack with `gog-edge pack reindex {folder}`"):
            attempt()
    assert read_manifest(folder).generation == 4


def test_the_result_is_that_of_a_new_build(folder, tmp_path, tiny_encoder):
    """All rows, ids and words equal those of a pack that was written in this version; nothing is embedded."""
    before = read_manifest(folder)
    stages = []
    manifest = reindex(folder, lambda *stage: stages.append(stage))
    assert (manifest.generation, manifest.parent, len(manifest.segments)) == (5, 4, 3)
    assert manifest == read_manifest(folder) == verify_pack(folder)
    kept = ("images", "captions", "paragraphs", "tombstones", "counts", "golden", "image_calibration", "snapshot")
    assert all(getattr(manifest, name) == getattr(before, name) for name in kept)
    assert [replace(one, store="") for one in manifest.segments] == [replace(one, store="") for one in before.segments]
    for table in (*TABLES, "names", "common"):
        assert rows(folder, table) == rows(tmp_path / "today", table), table
    for old, new in zip(read_manifest(tmp_path / "today").segments, manifest.segments, strict=True):
        with closing(sqlite3.connect(folder / new.store)) as db:
            db.execute("ATTACH ? AS today", [str(tmp_path / "today" / old.store)])
            db.execute("CREATE VIRTUAL TABLE temp.a USING fts5vocab(main, words, instance)")
            db.execute("CREATE VIRTUAL TABLE temp.b USING fts5vocab(today, words, instance)")
            assert db.execute("SELECT * FROM a").fetchall() == db.execute("SELECT * FROM b").fetchall() != []
    assert answers(folder, tiny_encoder) == answers(tmp_path / "today", tiny_encoder)
    for text, title in (("ΠΡΩΤΕΎΟΥΣΑ", "Αθήνα"), ("베를린", "베를린")):
        assert titles(folder, tiny_encoder, text) == [title]
    for stage in (COPYING, INDEXING):
        done = [(at, total) for name, at, total in stages if name == stage]
        assert done[-1][0] == done[-1][1] and len({total for _, total in done}) == 1


def test_the_old_generation_stays_until_the_next_change(folder, tiny_encoder):
    before, files = read_manifest(folder), hashes(folder)
    reindex(folder)
    after = hashes(folder)
    assert all(after[folder / path] == files[folder / path] for path in before.paths)  # none was written again
    assert not (folder / "build").exists()
    remove(folder, articles=["Spain"])
    assert not any((folder / segment.store).exists() for segment in before.segments)
    assert verify_pack(folder).generation == 6


def test_a_pack_of_this_version_is_left_alone(folder):
    manifest, files = reindex(folder), hashes(folder)
    assert reindex(folder) == manifest and hashes(folder) == files


def test_later_changes_work_as_before(folder, tiny_encoder):
    reindex(folder)
    vectors = read_manifest(folder).images
    groups = (*with_news(little_groups(skip=["Chad"]), "Spain", "Spain has news."), GREEK, KOREAN)
    manifest = build(folder, tiny_encoder, groups, update=True)
    assert manifest.generation == 5 and manifest.images == vectors  # unchanged articles are recognised by their digest
    compact(folder, tiny_encoder)
    assert verify_pack(folder).counts.articles == len(FACTS) - 1 + 2
    assert titles(folder, tiny_encoder, "Ελλάδας")[0] == "Αθήνα"


# --- failures -----------------------------------------------------------------------------------


def test_a_damaged_store_is_not_converted(folder):
    store = folder / read_manifest(folder).segments[1].store
    data = bytearray(store.read_bytes())
    data[-5000] ^= 255
    store.write_bytes(data)
    files = hashes(folder)
    with pytest.raises(PackError, match="is altered"):
        reindex(folder)
    assert {path: files[path] for path in files} == {path: digest for path, digest in hashes(folder).items()
                                                     if "build" not in path.parts}


def test_a_pack_of_another_version_or_being_written_is_refused(folder):
    with write_lock(folder), pytest.raises(PackError, match="written by another process"):
        reindex(folder)
    for version, advice in ((1, "build the pack again"), (77, "update gog_edge")):
        for segment in read_manifest(folder).segments:
            with closing(sqlite3.connect(folder / segment.store)) as db:
                db.execute(f"PRAGMA user_version = {version}")
        with pytest.raises(PackError, match=f"schema 3, got {version}; {advice}"):
            reindex(folder)


@pytest.mark.parametrize("limit", [2_000, 60_000])
def test_a_full_disk_leaves_the_current_generation(folder, limit):
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))  # behaves like a full disk
    try:
        with pytest.raises(PackError, match="disk of .* is full.*free some space"):
            reindex(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert read_manifest(folder).generation == 4
    assert reindex(folder).generation == 5 and verify_pack(folder)


_REINDEX = """
import os, sys
from pathlib import Path
from gog_edge.indexing.reindex import reindex
for folder in sys.stdin:
    child = os.fork()
    if not child:
        reindex(Path(folder.strip()))
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_generation(folder, tmp_path):
    """Killed conversions go on where they stopped, with the segments that were finished."""
    rng = np.random.default_rng(3)
    killed, resumed = 0, 0
    started = time.monotonic()
    reindex(shutil.copytree(folder, tmp_path / "timed"))
    duration = time.monotonic() - started  # kills are spread over it, on a fast machine and a slow one
    with subprocess.Popen([sys.executable, "-c", _REINDEX], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:  # fmt: skip
        for turn in range(8):
            pack = shutil.copytree(folder, tmp_path / f"{turn}")
            for _ in range(40):
                process.stdin.write(f"{pack}\n")
                process.stdin.flush()
                child = int(process.stdout.readline())
                time.sleep(rng.uniform(0, 0.8 * duration))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                killed += int(process.stdout.readline()) == signal.SIGKILL
                generation = read_manifest(pack).generation
                assert generation in (4, 5)
                if generation == 5:
                    break
                resumed += any("000005" in path.name for path in (pack / "store").iterdir())
            assert reindex(pack).generation == 5 and verify_pack(pack) == read_manifest(pack)
        process.stdin.close()
    assert killed >= 4 and resumed


# --- calibration --------------------------------------------------------------------------------

KNOWN = Calibration(("coverage", "unknown", "rarity", "named"), (1.0, -1.0, 1.0, 1.0), -0.5, 0.1, 0.02, 0.9, 64, 64)


def cities(syllables, count=60):
    """Return articles whose titles are different words of four of the syllables."""
    words = np.random.default_rng(1).permutation(["".join(four) for four in product(syllables, repeat=4)]).tolist()
    return tuple((ArticleRecord(word, (("", f"{number} {syllables[0]}"),), "CC0"),)
                 for number, word in enumerate(words[:count]))  # fmt: skip


@pytest.mark.parametrize(("syllables", "stale"), [(("ba", "lo", "ti", "mé"), False), ("도시마을", True)])
def test_the_text_calibration_is_fitted_again_if_names_have_other_words(tmp_path, syllables, stale):
    folder = tmp_path / "pack"
    build(folder, None, cities(syllables))
    raw = json.loads((folder / MANIFEST).read_text())
    raw["calibration"]["text"] = KNOWN.to_json()
    (folder / MANIFEST).write_text(json.dumps(raw))
    shutil.copytree(folder, tmp_path / "today")
    downgrade(folder)
    calibration = reindex(folder).text_calibration
    assert calibration == (calibrate_pack(tmp_path / "today", None, target_false_accept=0.1).text_calibration if stale
                           else KNOWN)  # fmt: skip


def test_a_calibration_with_paragraph_vectors_is_kept(tmp_path):
    """It can be fitted again with the text encoder only."""
    encoder = TextEncoder.open(write_tiny_text_encoder(tmp_path / "text"), threads=1)
    build(tmp_path / "pack", None, cities("도시마을"), text_encoder=encoder)
    known = calibrate_pack(tmp_path / "pack", None, text_encoder=encoder).text_calibration
    downgrade(tmp_path / "pack")
    assert reindex(tmp_path / "pack").text_calibration == known is not None


# --- the command --------------------------------------------------------------------------------


def test_the_command(folder):
    run = CliRunner()
    done = run.invoke(app, ["pack", "verify", str(folder)])
    assert done.exit_code == 1 and f"`gog-edge pack reindex {folder}`" in " ".join(done.stderr.split())
    done = run.invoke(app, ["pack", "reindex", str(folder)])
    assert done.exit_code == 0, done.output
    assert "pack 'little', generation 5, is indexed again" in done.stdout and INDEXING in done.stderr
    assert run.invoke(app, ["pack", "verify", str(folder)]).exit_code == 0
    done = run.invoke(app, ["pack", "reindex", str(folder)])
    assert done.exit_code == 0 and "has the words of this version already" in done.stdout
    done = run.invoke(app, ["pack", "reindex", str(folder), "--json"])
    assert json.loads(done.stdout)["generation"] == 5
    done = run.invoke(app, ["pack", "reindex", str(folder / "nothing")])
    assert done.exit_code and "Traceback" not in done.output


def test_an_unfinished_build_of_an_earlier_version_is_refused(tmp_path):
    """Its store has other tables and keys."""
    source = ListedSource(little_groups())
    read_snapshot(source, tmp_path / "pack", name="little", encoder=None, workers=1)
    settings = tmp_path / "pack" / "build" / "settings.json"
    raw = json.loads(settings.read_text())
    assert raw.pop("store_schema") == STORE_SCHEMA
    settings.write_text(json.dumps(raw))
    with pytest.raises(PackError, match=r"unfinished build with another store_schema \(None, now 3\).*delete"):
        build_pack(source, tmp_path / "pack", name="little", encoder=None, workers=1)
