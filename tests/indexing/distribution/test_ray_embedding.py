"""A real Ray with two worker processes; the driver is run as a command and killed."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
from listed_source import ListedSource, little_groups
from PIL import Image
from tiny_encoder import write_tiny_encoder

from gog_edge.errors import PackError
from gog_edge.indexing.build import build_pack, read_snapshot
from gog_edge.indexing.distribution.ray_embedding import RayWorkers, embed_with_ray, resume_build
from gog_edge.indexing.generation import PackOptions
from gog_edge.indexing.sources.base import ArticleRecord, ImageRecord
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.pack import verify_pack

REPOSITORY = Path(__file__).parents[3]
SHARDS = 12


def large_pictures():
    """Return pictures that take a while to decode, two per shard."""
    groups = []
    for n in range(2 * SHARDS):
        stream = io.BytesIO()
        Image.new("RGB", (2000, 2000), (10 * n, 255 - 10 * n, 5 * n)).save(stream, "JPEG")
        title = f"Colour {n}"
        groups.append((ArticleRecord(title, (("", f"{title} is one."),), "CC0"),
                       ImageRecord(stream.getvalue(), title, "CC0", "us", (title,))))
    return tuple(groups)


@pytest.fixture
def ray_home():
    """Return a temporary folder with a path short enough for the sockets of Ray."""
    home = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    yield home
    for number in processes(home):
        os.kill(number, signal.SIGKILL)
    shutil.rmtree(home, ignore_errors=True)


def processes(home):
    """Return the processes that have files below this folder open: command by process id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or belongs to another user
            if any(link_target(link).startswith(home) for link in (folder / "fd").iterdir()):
                found[int(folder.name)] = (folder / "cmdline").read_text()
    return found


def link_target(link):
    with suppress(OSError):  # it was closed
        return str(link.readlink())
    return ""


def live_workers(home):
    """Return the processes that may write shards; two agents of a killed Ray live for up to a minute longer."""
    return [command for command in processes(home).values() if "Agent" not in command]


def wait_until(true, seconds):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    assert true()


def start(folder, encoder, home):
    command = [sys.executable, "-m", "index.embed_ray", str(folder), "--encoder", str(encoder), "--workers", "2"]
    return subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | {"RAY_TMPDIR": home}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def shard_files(folder):
    """Return the complete shards, with values that change if a file is written again."""
    files = [path for path in (folder / "vectors").glob("*.npy") if not path.name.endswith(".ids.npy")]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "vectors").iterdir())}


def read_store(folder, encoder, groups, **options):
    build = {"name": "little", "encoder": encoder, "workers": 1, "options": PackOptions(**options)}
    read_snapshot(ListedSource(groups), folder, **build)
    assert not (folder / "vectors").exists()
    return lambda: build_pack(ListedSource(groups), folder, **build)


def test_a_repeated_command_embeds_missing_shards_and_lists_failures(
    tmp_path, tiny_encoder_folder, tiny_encoder, ray_home
):
    pack, total = tmp_path / "pack", 2 * SHARDS
    finish = read_store(pack, tiny_encoder, large_pictures(), shard_rows=2)
    shutil.copytree(pack, tmp_path / "alone")
    blocked = pack / "vectors" / f"000001-captions-{SHARDS - 1:06d}.ids.npy.part"
    blocked.mkdir(parents=True)

    first = start(pack, tiny_encoder_folder, ray_home)
    wait_until(lambda: len(shard_files(pack)) >= 3, 60)
    first.kill()
    first.communicate(timeout=30)
    wait_until(lambda: not live_workers(ray_home), 30)  # workers end with their driver
    kept = shard_files(pack)
    assert 3 <= len(kept) < total - 1

    before = set(processes(ray_home))
    second = start(pack, tiny_encoder_folder, ray_home)
    _, err = second.communicate(timeout=90)
    message = " ".join(err.split())
    assert second.returncode == 1 and f"1 of {total - len(kept)} shards were not embedded" in message
    assert f"'vectors/000001-captions-{SHARDS - 1:06d}.npy' (IsADirectoryError" in message
    assert "the others are done: run the same command again" in message
    wait_until(lambda: not set(processes(ray_home)) - before, 15)  # no process remains
    now = shard_files(pack)
    assert len(now) == total - 1 and {name: now[name] for name in kept} == kept

    blocked.rmdir()
    manifest = finish()
    assert {name: value for name, value in shard_files(pack).items() if name in now} == now
    assert verify_pack(pack) == manifest and manifest.counts.images == 2 * SHARDS
    alone = resume_build(tmp_path / "alone", tiny_encoder)
    alone.embed()
    alone.close()
    assert bytes_of(tmp_path / "alone") == bytes_of(pack)


def test_ray_is_not_started_if_no_shard_is_missing(tmp_path, tiny_encoder_folder, tiny_encoder, ray_home):
    read_store(tmp_path / "pack", tiny_encoder, little_groups())
    whole = resume_build(tmp_path / "pack", tiny_encoder)
    whole.embed()
    whole.close()
    command = start(tmp_path / "pack", tiny_encoder_folder, ray_home)
    out, err = command.communicate(timeout=60)
    assert command.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["shards"] == 0 and not list(Path(ray_home).iterdir())


def test_builds_that_cannot_be_embedded_are_refused(tmp_path, tiny_encoder_folder, tiny_encoder):
    with pytest.raises(PackError, match="does not contain an unfinished build; run `gog-edge pack build"):
        embed_with_ray(tmp_path / "new", tiny_encoder_folder, RayWorkers())
    finish = read_store(tmp_path / "pack", tiny_encoder, little_groups())
    other = write_tiny_encoder(tmp_path / "other", seed=1, name="other")
    with pytest.raises(PackError, match="unfinished build with another encoder"):
        embed_with_ray(tmp_path / "pack", other, RayWorkers())
    assert Encoder.open(other).fingerprint != tiny_encoder.fingerprint
    finish()
    with pytest.raises(PackError, match="does not contain an unfinished build"):
        embed_with_ray(tmp_path / "pack", tiny_encoder_folder, RayWorkers())
