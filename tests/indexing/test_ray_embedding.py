"""A real Ray of two worker processes; the driver runs as the command does, and is killed as a machine is."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from listed_source import ListedSource, little_groups
from PIL import Image
from tiny_encoder import write_tiny_encoder

from gog_edge.errors import PackError
from gog_edge.indexing.build import build_pack, read_snapshot
from gog_edge.indexing.drafts import ArticleDraft, ImageDraft
from gog_edge.indexing.generation import PackOptions
from gog_edge.indexing.ray_embedding import Workers, embed_with_ray, resume
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.pack import verify_pack

REPOSITORY = Path(__file__).parents[2]
SHARDS = 12


def broad_pictures():
    """Pictures that take a while to decode, two to a shard."""
    groups = []
    for n in range(2 * SHARDS):
        stream = io.BytesIO()
        Image.new("RGB", (2000, 2000), (10 * n, 255 - 10 * n, 5 * n)).save(stream, "JPEG")
        title = f"Colour {n}"
        groups.append((ArticleDraft(title, (("", f"{title} is one."),), "CC0"),
                       ImageDraft(stream.getvalue(), title, "CC0", "us", (title,))))
    return tuple(groups)


@pytest.fixture
def ray_home():
    """A folder short enough for Ray's sockets; whoever bears its name in the environment is of this test."""
    home = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    yield home
    for number in processes(home):
        os.kill(number, signal.SIGKILL)
    shutil.rmtree(home, ignore_errors=True)


def processes(home):
    """Live processes that were started with this home: number and command."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment, command = ((folder / name).read_bytes() for name in ("environ", "cmdline"))
        except OSError:
            continue  # it has ended, or is another's
        if f"RAY_TMPDIR={home}".encode() in environment.split(b"\0"):
            found[int(folder.name)] = command.decode()
    return found


def workers(home):
    """Those that may write shards. Two agents of a killed Ray ask for it for up to a minute before they end too."""
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


def done(folder):
    """Finished shards, and what would change if they were written again."""
    files = [path for path in (folder / "vectors").glob("*.npy") if not path.name.endswith(".ids.npy")]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "vectors").iterdir())}


def read(folder, encoder, groups, **options):
    build = {"name": "little", "encoder": encoder, "workers": 1, "options": PackOptions(**options)}
    read_snapshot(ListedSource(groups), folder, **build)
    assert not (folder / "vectors").exists()
    return lambda: build_pack(ListedSource(groups), folder, **build)


def test_killed_and_run_again_it_embeds_only_what_is_left(tmp_path, tiny_encoder_folder, tiny_encoder, ray_home):
    finish = read(tmp_path / "pack", tiny_encoder, broad_pictures(), shard_rows=2)
    shutil.copytree(tmp_path / "pack", tmp_path / "alone")

    first = start(tmp_path / "pack", tiny_encoder_folder, ray_home)
    wait_until(lambda: len(done(tmp_path / "pack")) >= 3, 60)
    first.kill()
    first.communicate(timeout=30)
    wait_until(lambda: not workers(ray_home), 30)  # they end with it
    kept = done(tmp_path / "pack")
    assert 3 <= len(kept) < 2 * SHARDS

    second = start(tmp_path / "pack", tiny_encoder_folder, ray_home)
    out, err = second.communicate(timeout=90)
    assert second.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["shards"] == 2 * SHARDS - len(kept)
    now = done(tmp_path / "pack")
    assert len(now) == 2 * SHARDS and {name: now[name] for name in kept} == kept

    manifest = finish()
    assert {name: value for name, value in done(tmp_path / "pack").items() if name in now} == now
    assert verify_pack(tmp_path / "pack") == manifest and manifest.counts.images == 2 * SHARDS
    alone = resume(tmp_path / "alone", tiny_encoder)
    alone.embed()
    alone.close()
    assert bytes_of(tmp_path / "alone") == bytes_of(tmp_path / "pack")


def test_shards_that_fail_are_named_and_the_others_are_done(tmp_path, tiny_encoder_folder, tiny_encoder, ray_home):
    finish = read(tmp_path / "pack", tiny_encoder, little_groups(), shard_rows=2)
    blocked = tmp_path / "pack" / "vectors" / "000001-images-000001.ids.npy.part"
    blocked.mkdir(parents=True)
    command = start(tmp_path / "pack", tiny_encoder_folder, ray_home)
    _, err = command.communicate(timeout=90)
    said = " ".join(err.split())
    assert command.returncode == 1 and "1 of 10 shards were not embedded" in said
    assert "'vectors/000001-images-000001.npy' (IsADirectoryError" in said and "the others are done" in said
    assert len(done(tmp_path / "pack")) == 9
    wait_until(lambda: not processes(ray_home), 10)
    blocked.rmdir()
    assert finish() == verify_pack(tmp_path / "pack")
    assert len(done(tmp_path / "pack")) == 10


def test_what_cannot_be_embedded_is_said(tmp_path, tiny_encoder_folder, tiny_encoder):
    with pytest.raises(PackError, match="holds no unfinished build; run `python -m index.build_pack"):
        embed_with_ray(tmp_path / "new", tiny_encoder_folder, Workers())
    finish = read(tmp_path / "pack", tiny_encoder, little_groups())
    other = write_tiny_encoder(tmp_path / "other", seed=1, name="other")
    with pytest.raises(PackError, match="unfinished build with another encoder"):
        embed_with_ray(tmp_path / "pack", other, Workers())
    assert Encoder.open(other).fingerprint != tiny_encoder.fingerprint
    finish()
    with pytest.raises(PackError, match="holds no unfinished build"):
        embed_with_ray(tmp_path / "pack", tiny_encoder_folder, Workers())
