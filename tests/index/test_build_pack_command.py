"""`python -m index.build_pack`: its output, its errors, and that it can be killed at any moment."""

import contextlib
import csv
import json
import os
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from gog_edge.errors import PackError
from gog_edge.retrieval.manifest import read_manifest
from gog_edge.retrieval.pack import Pack, verify_pack
from index.build_pack import main

ARTICLES = 400
CALIBRATED = "calibrated"  # a word that leaves out --no-calibration, which most tests use to save time


def write_collection(folder, changed=(), without=()):
    """Write pictures with a table. All pictures differ, and they are the same in every call."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "captions.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["file", "title", "caption", "text", "licence"])
        for number in range(ARTICLES):
            if number in without:
                continue
            name, rng = f"{number:04d}.png", np.random.default_rng(number + ARTICLES * (number in changed))
            Image.fromarray(rng.integers(0, 255, (4, 6, 3), dtype=np.uint8)).resize((48, 32), 0).save(folder / name)
            text = f"Vase {number} is new." if number in changed else f"Vase {number} is old."
            table.writerow([name, f"Vase {number}", f"a red vase, number {number}", text, "CC0"])
    return folder


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return write_collection(tmp_path_factory.mktemp("collection") / "collection")


@pytest.fixture
def build(tiny_encoder_folder, capsys):
    """Return a function that runs the command and returns exit code, JSON output and stderr."""

    def run(source, out, *words):
        encoder = [] if "--text-only" in words else ["--encoder", str(tiny_encoder_folder)]
        calibration = [] if CALIBRATED in words else ["--no-calibration"]
        words = [word for word in words if word != CALIBRATED]
        status = main([str(source), str(out), *encoder, "--workers", "1", *calibration, *words])
        output = capsys.readouterr()
        return status, json.loads(output.out.splitlines()[-1]) if status == 0 else output.out, output.err

    return run


def test_the_output_describes_the_pack_and_skipped_files(build, tmp_path):
    source = write_collection(tmp_path / "collection")
    (source / "torn.png").write_bytes((source / "0001.png").read_bytes()[:50])
    status, last, progress = build(source, tmp_path / "pack", "--name", "museum", "--tiles", CALIBRATED)
    assert status == 0 and last["calibration"]["image"] is not None and "calibrating" in progress
    assert last["name"] == "museum"
    assert last["counts"] == {"articles": ARTICLES, "paragraphs": ARTICLES, "images": ARTICLES}
    assert sum(shard["rows"] for shard in last["images"]["shards"]) == 6 * ARTICLES
    assert [(one["count"], one["examples"]) for one in last["skipped"]] == [(1, ["torn.png"])]
    assert {"reading", "images", "tiles", "captions"} <= last["seconds"].keys()
    for stage in ("reading", "images", "tiles", "captions"):
        assert stage in progress
    assert verify_pack(tmp_path / "pack").name == "museum"


def test_a_pack_without_vectors(build, tmp_path, collection):
    status, last, _ = build(collection, tmp_path / "pack", "--text-only")
    assert status == 0 and last["encoder"] is None and last["name"] == "pack"


def test_an_update_embeds_only_changes(build, tmp_path, collection):
    build(collection, tmp_path / "pack", "--no-captions")
    newer = write_collection(tmp_path / "newer", changed=(3, 5), without=(7,))
    Image.new("RGB", (40, 40), (9, 9, 200)).save(newer / "fresh.png")
    status, last, _ = build(newer, tmp_path / "pack", "--update")
    assert status == 0 and (last["generation"], last["name"]) == (2, "pack")
    written, new = last["segments"][-1]["counts"], last["images"]["shards"][-1]
    assert (written["articles"], written["images"], new["rows"]) == (3, 3, 3)
    assert last["counts"]["articles"] == ARTICLES and last["captions"]["shards"] == []  # as in the first build
    assert last["counts"]["images"] == ARTICLES


@pytest.mark.parametrize("words, code, message", [
    (("--memory", "2X"), 2, "a size must be"), (("--recall", "7"), 2, "--recall must be .* got 7"),
    (("--shard-rows", "0"), 2, "at least 1, got 0"), (("--update",), 1, "does not contain a pack"),
    (("--name", "a/b"), 1, "must consist of letters.*'a/b'"), (("--workers", "-1"), 2, "at least 1, .* got -1"),
    (("--kind", "zip"), 1, "must be one of .* got 'zip'"), (("--kind", "zim"), 1, "does not exist"),
])  # fmt: skip
def test_invalid_options_are_reported_in_one_line(build, tmp_path, collection, words, code, message):
    status, _, err = build(collection, tmp_path / "pack", *words)
    assert status == code
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line


def test_a_folder_with_other_files_is_refused(build, tmp_path, collection):
    build(collection, tmp_path / "pack", "--text-only")
    status, _, err = build(collection, tmp_path / "pack", "--text-only", "--name", "other")
    assert status == 1 and "--update" in err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    status, _, err = build(collection, tmp_path / "other", "--text-only")
    assert status == 1 and "letter.txt" in err and (tmp_path / "other" / "letter.txt").exists()


def test_a_build_that_was_stopped_before_its_calibration_is_resumed(build, tmp_path, collection):
    build(collection, tmp_path / "pack")  # up to the commit
    status, last, _ = build(collection, tmp_path / "pack", CALIBRATED)
    assert status == 0 and last["generation"] == 1 and last["calibration"]["image"] is not None
    status, again, progress = build(collection, tmp_path / "pack", CALIBRATED)
    assert status == 0 and again["calibration"] == last["calibration"] and "calibrating" not in progress


def test_an_output_path_that_is_a_file_is_refused(build, tmp_path, collection):
    (tmp_path / "pack").write_text("dear")
    status, _, err = build(collection, tmp_path / "pack", "--text-only")
    assert status == 1 and "is a file" in err and (tmp_path / "pack").read_text() == "dear"


def test_a_build_is_resumed_after_a_full_disk(build, tmp_path, collection):
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, usual[1]))  # behaves like a full disk
    try:
        status, _, err = build(collection, tmp_path / "pack", "--text-only")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert status == 1 and "full" in err and "free some space" in err, err
    assert build(collection, tmp_path / "pack", "--text-only")[0] == 0


@pytest.mark.parametrize("module", ["selectolax", "ijson", "sqlite_utils"])
def test_a_missing_package_is_reported_with_its_extra(tmp_path, collection, module):
    (tmp_path / "bare" / module).mkdir(parents=True)
    (tmp_path / "bare" / module / "__init__.py").write_text(f'raise ModuleNotFoundError("No module", name="{module}")')
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "bare")}
    words = [sys.executable, "-m", "index.build_pack", str(collection), str(tmp_path / "pack"), "--text-only"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert f"{module} is not installed; pip install 'gog_edge[index]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unreadable_snapshot_is_reported(build, tmp_path):
    status, _, err = build(tmp_path / ("x" * 300), tmp_path / "pack", "--text-only")
    assert status == 1 and "cannot be used (File name too long)" in err


def test_a_missing_snapshot_is_reported(build, tmp_path):
    status, _, err = build(tmp_path / "none.zim", tmp_path / "pack")
    assert status == 1 and "none.zim" in err and not (tmp_path / "pack").exists()


# Forks a child for each try, so that a kill always interrupts the build itself.
_BUILDS = """
import os, sys
import gog_edge.indexing.build, gog_edge.indexing.calibration, gog_edge.indexing.sources.open  # before the first fork
from index.build_pack import main
for line in sys.stdin:
    child = os.fork()
    if not child:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.dup2(null, 1)
        os._exit(main(line.split()))
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def rows(folder):
    found = {}
    for number, segment in enumerate(read_manifest(folder).segments):
        database = sqlite3.connect(folder / segment.store)
        found[number] = list(database.iterdump())
        database.close()
    return found


def vectors(folder, space):
    manifest = read_manifest(folder)
    return [np.load(folder / shard.vectors).tobytes() for shard in getattr(manifest, space).shards]


def shard_files(folder):
    """Return the complete shards, with values that change if a file is written again."""
    whole = (folder / "vectors").glob("*-??????.npy")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in whole}


@pytest.mark.parametrize("update", [False, True])
def test_a_build_is_resumed_after_a_kill_at_any_moment(build, tmp_path, collection, tiny_encoder, tiny_encoder_folder,
                                                       update):
    """SIGKILL after random times until the build is done: the pack equals that of an uninterrupted build."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    small = ["--name", "collection", "--shard-rows", "32", "--no-calibration"]
    words = [str(collection), str(out), "--encoder", str(tiny_encoder_folder), "--workers", "1", *small]
    newer = write_collection(tmp_path / "newer", changed=range(0, ARTICLES, 2)) if update else None
    build(collection, whole, *small)
    if update:
        build(newer, whole, *small, "--update")
        build(collection, out, *small)
        words = [str(newer), *words[1:], "--update"]
    rng, kills, before = np.random.default_rng(3 + update), 0, {}
    with subprocess.Popen([sys.executable, "-c", _BUILDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                          ) as process:
        for attempt in range(100):
            process.stdin.write(" ".join(words) + "\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            time.sleep(rng.uniform(0, 0.05 * (attempt + 1)))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            status = int(process.stdout.readline())
            now = shard_files(out)
            assert before.items() <= now.items()  # no shard was embedded again or lost
            before = now
            if status == 0 or (out / "MANIFEST.json").exists() and not update:
                break  # a second build of the pack would be refused
            assert status == signal.SIGKILL, "the build failed"
            kills += 1
            if not (out / "MANIFEST.json").exists():
                with pytest.raises(PackError, match="has not finished|does not exist"):
                    Pack.open(out, tiny_encoder)
        process.stdin.close()
    assert kills >= 2
    manifest = verify_pack(out)
    assert manifest.generation == 1 + update
    assert rows(out) == rows(whole)
    for space in ("images", "captions"):
        assert vectors(out, space) == vectors(whole, space)
    again = read_manifest(whole)
    assert (manifest.counts, manifest.golden, manifest.segments) == (again.counts, again.golden, again.segments)
    assert not (out / "build").exists()


def test_ctrl_c_prints_how_to_resume(tmp_path, collection, tiny_encoder_folder):
    """A real process and a real Ctrl-C. Opening the unfinished pack prints the command that resumes it."""
    out = tmp_path / "pack"
    words = [str(collection), str(out), "--encoder", str(tiny_encoder_folder), "--no-calibration"]
    command = [sys.executable, "-m", "index.build_pack", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (out / "build" / "store.sqlite").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "run the same command again to resume" in process.stderr.read()
    with pytest.raises(PackError, match=f"python -m index.build_pack .*{out.name} --encoder"):
        read_manifest(out)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["counts"]["articles"] == ARTICLES
