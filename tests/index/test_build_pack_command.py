"""`python -m index.build_pack`: what it says, and that it may be killed at any moment."""

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

THINGS = 400
CALIBRATED = "calibrated"  # as the command does by itself, but for tests of other things


def write_collection(folder, changed=(), without=()):
    """Pictures with a table: each its own, and the same each time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "captions.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["file", "title", "caption", "text", "licence"])
        for number in range(THINGS):
            if number in without:
                continue
            name, rng = f"{number:04d}.png", np.random.default_rng(number + THINGS * (number in changed))
            Image.fromarray(rng.integers(0, 255, (4, 6, 3), dtype=np.uint8)).resize((48, 32), 0).save(folder / name)
            text = f"Thing {number} is new." if number in changed else f"Thing {number} is old."
            table.writerow([name, f"Thing {number}", f"a red thing, number {number}", text, "CC0"])
    return folder


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return write_collection(tmp_path_factory.mktemp("things") / "things")


@pytest.fixture
def build(tiny_encoder_folder, capsys):
    """Runs the command: its exit status, what it prints last, and what it says on stderr."""

    def run(source, out, *words):
        encoder = [] if "--text-only" in words else ["--encoder", str(tiny_encoder_folder)]
        calibration = [] if CALIBRATED in words else ["--no-calibration"]
        words = [word for word in words if word != CALIBRATED]
        status = main([str(source), str(out), *encoder, "--workers", "1", *calibration, *words])
        said = capsys.readouterr()
        return status, json.loads(said.out.splitlines()[-1]) if status == 0 else said.out, said.err

    return run


def test_it_tells_what_was_made_and_what_was_not(build, tmp_path):
    source = write_collection(tmp_path / "things")
    (source / "torn.png").write_bytes((source / "0001.png").read_bytes()[:50])
    status, last, progress = build(source, tmp_path / "pack", "--name", "museum", "--tiles", CALIBRATED)
    assert status == 0 and last["calibration"]["image"] is not None and "calibrating" in progress
    assert last["name"] == "museum" and last["counts"] == {"articles": THINGS, "paragraphs": THINGS, "images": THINGS}
    assert sum(shard["rows"] for shard in last["images"]["shards"]) == 6 * THINGS
    assert [(one["count"], one["examples"]) for one in last["skipped"]] == [(1, ["torn.png"])]
    assert {"reading", "images", "tiles", "captions"} <= last["seconds"].keys()
    for stage in ("reading", "images", "tiles", "captions"):
        assert stage in progress
    assert verify_pack(tmp_path / "pack").name == "museum"


def test_without_vectors(build, tmp_path, collection):
    status, last, _ = build(collection, tmp_path / "pack", "--text-only")
    assert status == 0 and last["encoder"] is None and last["name"] == "pack"


def test_an_update_embeds_only_what_changed(build, tmp_path, collection):
    build(collection, tmp_path / "pack", "--no-captions")
    newer = write_collection(tmp_path / "newer", changed=(3, 5), without=(7,))
    Image.new("RGB", (40, 40), (9, 9, 200)).save(newer / "fresh.png")
    status, last, _ = build(newer, tmp_path / "pack", "--update")
    assert status == 0 and (last["generation"], last["name"]) == (2, "pack")
    written, new = last["segments"][-1]["counts"], last["images"]["shards"][-1]
    assert (written["articles"], written["images"], new["rows"]) == (3, 3, 3)
    assert last["counts"]["articles"] == THINGS and last["captions"]["shards"] == []  # as it was built
    assert last["counts"]["images"] == THINGS


@pytest.mark.parametrize("words, told", [
    (("--memory", "2X"), "no size"), (("--recall", "7"), "recall of 7"),
    (("--shard-rows", "0"), "at least 1"), (("--update",), "no pack"),
    (("--name", "a/b"), "cannot be named"), (("--workers", "-1"), "-1 workers"),
    (("--kind", "zip"), "no kind"), (("--kind", "zim"), "no file"),
])  # fmt: skip
def test_what_cannot_be_done_is_one_line(build, tmp_path, collection, words, told):
    status, _, err = build(collection, tmp_path / "pack", *words)
    assert status == 1
    (line,) = [line for line in err.splitlines() if line.startswith("build_pack: ")]
    assert re.search(told, line), line


def test_a_folder_that_holds_something_is_not_built_into(build, tmp_path, collection):
    build(collection, tmp_path / "pack", "--text-only")
    status, _, err = build(collection, tmp_path / "pack", "--text-only", "--name", "other")
    assert status == 1 and "--update" in err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    status, _, err = build(collection, tmp_path / "other", "--text-only")
    assert status == 1 and "letter.txt" in err and (tmp_path / "other" / "letter.txt").exists()


def test_stopped_before_its_calibration_the_same_command_calibrates(build, tmp_path, collection):
    build(collection, tmp_path / "pack")  # as far as the commit
    status, last, _ = build(collection, tmp_path / "pack", CALIBRATED)
    assert status == 0 and last["generation"] == 1 and last["calibration"]["image"] is not None
    status, again, progress = build(collection, tmp_path / "pack", CALIBRATED)
    assert status == 0 and again["calibration"] == last["calibration"] and "calibrating" not in progress


def test_out_is_a_file(build, tmp_path, collection):
    (tmp_path / "pack").write_text("dear")
    status, _, err = build(collection, tmp_path / "pack", "--text-only")
    assert status == 1 and "is a file" in err and (tmp_path / "pack").read_text() == "dear"


def test_a_full_disk_while_it_reads(build, tmp_path, collection):
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, usual[1]))  # as a disk that takes no more
    try:
        status, _, err = build(collection, tmp_path / "pack", "--text-only")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert status == 1 and "full" in err and "make room" in err, err
    assert build(collection, tmp_path / "pack", "--text-only")[0] == 0


@pytest.mark.parametrize("module", ["selectolax", "ijson"])
def test_what_is_not_installed_is_one_line(tmp_path, collection, module):
    (tmp_path / "bare" / module).mkdir(parents=True)
    (tmp_path / "bare" / module / "__init__.py").write_text(f'raise ModuleNotFoundError("No module", name="{module}")')
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "bare")}
    words = [sys.executable, "-m", "index.build_pack", str(collection), str(tmp_path / "pack"), "--text-only"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"{module} is not installed; pip install" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_a_snapshot_that_may_not_be_read(build, tmp_path):
    status, _, err = build(tmp_path / ("x" * 300), tmp_path / "pack", "--text-only")
    assert status == 1 and "cannot be used (File name too long)" in err


def test_a_snapshot_that_is_not_there(build, tmp_path):
    status, _, err = build(tmp_path / "none.zim", tmp_path / "pack")
    assert status == 1 and "none.zim" in err and not (tmp_path / "pack").exists()


# Forks for each try, so that a child lives for its work alone and may be killed at any moment of it.
_BUILDS = """
import os, sys
from index.build_pack import main  # and all that it needs, before the first fork
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


def finished(folder):
    """Which whole shards lie there, and which file each is: one that is written again is another."""
    whole = (folder / "vectors").glob("*-??????.npy")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in whole}


@pytest.mark.parametrize("update", [False, True])
def test_killed_at_any_moment_it_goes_on(build, tmp_path, collection, tiny_encoder, tiny_encoder_folder, update):
    """SIGKILL after random times until it is done: the pack is that of a build that nobody stopped."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    small = ["--name", "things", "--shard-rows", "32", "--no-calibration"]
    words = [str(collection), str(out), "--encoder", str(tiny_encoder_folder), "--workers", "1", *small]
    newer = write_collection(tmp_path / "newer", changed=range(0, THINGS, 2)) if update else None
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
            now = finished(out)
            assert before.items() <= now.items()  # nothing was embedded twice, nothing was lost
            before = now
            if status == 0 or (out / "MANIFEST.json").exists() and not update:
                break  # a pack that is there is not built again
            assert status == signal.SIGKILL, "it ended by itself, and not well"
            kills += 1
            if not (out / "MANIFEST.json").exists():
                with pytest.raises(PackError, match="not finished|right folder"):
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


def test_stopped_by_the_user_it_tells_how_to_go_on(tmp_path, collection, tiny_encoder_folder):
    """A real process and a real Ctrl-C; who opens the pack meanwhile is told the command."""
    out = tmp_path / "pack"
    words = [str(collection), str(out), "--encoder", str(tiny_encoder_folder), "--no-calibration"]
    command = [sys.executable, "-m", "index.build_pack", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (out / "build" / "store.sqlite").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "the same command goes on" in process.stderr.read()
    with pytest.raises(PackError, match=f"python -m index.build_pack .*{out.name} --encoder"):
        read_manifest(out)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["counts"]["articles"] == THINGS
