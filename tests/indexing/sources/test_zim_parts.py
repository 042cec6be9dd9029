"""The bytes of ZIM files: checksum, parts, and files that are not whole. libzim is the reference."""

import hashlib
import json
import struct

import pytest
from libzim.reader import Archive
from old_zim import write_old_zim
from reading import Read
from typer.testing import CliRunner
from zim_world import articles, write_zim

from gog_edge.cli import app
from gog_edge.errors import SourceError
from gog_edge.indexing.build import build_pack
from gog_edge.indexing.sources.open import detect_kind, open_source
from gog_edge.indexing.sources.zim import CHECKING, ZimSource
from gog_edge.retrieval.manifest import read_manifest


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_zim(tmp_path_factory.mktemp("whole") / "x.zim", articles(12))


def split(whole, folder, names=("aa", "ab", "ac", "ad"), leave_out=()):
    data = whole.read_bytes()
    size = -(-len(data) // len(names))
    for number, name in enumerate(names):
        if name not in leave_out:
            (folder / f"x.zim{name}").write_bytes(data[number * size : (number + 1) * size])
    return folder / "x.zim"


def changed(whole, folder, at, data):
    content = bytearray(whole.read_bytes())
    content[at : at + len(data)] = data
    path = folder / "changed.zim"
    path.write_bytes(content)
    return path


# --- checksum -----------------------------------------------------------------------------------


def test_the_checksum_is_that_of_libzim(whole):
    steps = []
    ZimSource(whole).verify(lambda *step: steps.append(step))
    size = whole.stat().st_size
    assert Archive(whole).check() and ZimSource(whole).snapshot().sha256 == f"md5:{whole.read_bytes()[-16:].hex()}"
    assert steps[-1] == (CHECKING, size - 16, size)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_pack_of_a_damaged_file_is_refused_before_anything_is_read(tmp_path, share):
    whole = write_zim(tmp_path / "x.zim", articles(12), packed=False)
    at = int(whole.stat().st_size * share)
    while True:  # libzim does not open a file whose directory is damaged
        path = changed(whole, tmp_path, at, bytes([whole.read_bytes()[at] ^ 1]))
        try:
            assert not Archive(path).check()
            break
        except RuntimeError:
            at += 1
    out = tmp_path / "pack"
    with pytest.raises(SourceError, match=r"changed\.zim' is corrupt.*download it again.*--no-checksum"):
        build_pack(ZimSource(path), out, name="x", encoder=None, workers=1)
    assert {entry.name for entry in out.iterdir()} <= {"LOCK"}
    manifest = build_pack(ZimSource(path), out, name="x", encoder=None, workers=1, verify=False)
    assert manifest.counts.articles


def test_a_resumed_build_does_not_compare_the_checksum_again(whole, tmp_path):
    out, stages = tmp_path / "pack", []
    with pytest.raises(KeyboardInterrupt):
        build_pack(ZimSource(whole), out, name="x", encoder=None, workers=1, on_progress=stop_at("words"))
    build_pack(ZimSource(whole), out, name="x", encoder=None, workers=1,
               on_progress=lambda stage, *_: stages.append(stage))
    assert CHECKING not in stages and read_manifest(out).counts.articles == 15


def stop_at(stage):
    def on_progress(now, *_):
        if now == stage:
            raise KeyboardInterrupt

    return on_progress


def test_a_file_without_a_checksum_is_read_with_a_notice(tmp_path):
    path = write_old_zim(tmp_path / "old.zim", [("A/Here", "Here", b"<p>Text.</p>", "text/html")], checksum=False)
    assert not Archive(path).has_checksum
    source = ZimSource(path)
    source.verify()
    assert source.snapshot().sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    (notice,) = Read(source).notices
    assert "old.zim" in notice and "no checksum" in notice


# --- parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.zim", "x.zimaa", "x.zimac"])
def test_parts_are_read_like_the_whole_file(whole, tmp_path, name):
    split(whole, tmp_path)
    assert detect_kind(tmp_path / name) == "zim"
    source = open_source(tmp_path / name)
    source.verify()
    assert source.snapshot() == ZimSource(whole).snapshot()
    assert Read(source).records == Read(ZimSource(whole)).records


def test_damage_is_found_in_any_part(whole, tmp_path):
    path = split(whole, tmp_path)
    part = tmp_path / "x.zimac"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(SourceError, match="corrupt"):
        ZimSource(path).verify()


@pytest.mark.parametrize(("missing", "named"), [("aa", "x.zimaa"), ("ab", "x.zimab"), ("ac", "x.zimac")])
def test_a_missing_part_is_named(whole, tmp_path, missing, named):
    path = split(whole, tmp_path, leave_out=(missing,))
    with pytest.raises(SourceError, match=rf"part '{named}'.*is missing.*copy all parts"):
        open_source(path).snapshot()
    with pytest.raises(SourceError, match=rf"part '{named}'.*is missing"):
        ZimSource(tmp_path / "x.zimad").snapshot()


def test_a_missing_last_part_makes_the_file_truncated(whole, tmp_path):
    path = split(whole, tmp_path, leave_out=("ad",))
    with pytest.raises(SourceError, match=r"truncated.*A part after 'x\.zimac' may be missing"):
        ZimSource(path).snapshot()


def test_a_header_across_parts_is_read(whole, tmp_path):
    data = whole.read_bytes()
    (tmp_path / "x.zimaa").write_bytes(data[:40])
    (tmp_path / "x.zimab").write_bytes(data[40:-7])
    (tmp_path / "x.zimac").write_bytes(data[-7:])
    source = ZimSource(tmp_path / "x.zim")
    source.verify()


def test_without_file_and_parts_the_path_is_refused(tmp_path):
    (tmp_path / "x.zimtext").write_bytes(b"not a part")
    with pytest.raises(SourceError, match="does not exist"):
        open_source(tmp_path / "x.zim")
    with pytest.raises(SourceError, match=r"does not exist or is not a file, nor are there parts .* 'x\.zimaa'"):
        ZimSource(tmp_path / "x.zim").snapshot()


# --- headers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [-1, -16, -17, 81, 80])
def test_a_file_shorter_than_its_header_says_is_refused(whole, tmp_path, kept):
    path = tmp_path / "part.zim"
    path.write_bytes(whole.read_bytes()[:kept])
    with pytest.raises(SourceError, match=rf"truncated: it has {path.stat().st_size} bytes, its header says"):
        ZimSource(path).snapshot()


def test_a_longer_file_is_refused(whole, tmp_path):
    path = tmp_path / "longer.zim"
    path.write_bytes(whole.read_bytes() + b"<html>")
    with pytest.raises(SourceError, match="corrupt: it has .* its header says"):
        ZimSource(path).snapshot()


@pytest.mark.parametrize(("version", "advice"), [(3, "newer edition"), (4, "newer edition"), (7, "update gog_edge")])
def test_other_versions_of_the_format_are_refused(whole, tmp_path, version, advice):
    path = changed(whole, tmp_path, 4, struct.pack("<H", version))
    with pytest.raises(SourceError, match=rf"version {version} of the ZIM format; 5 and 6 are supported; .*{advice}"):
        ZimSource(path).snapshot()


@pytest.mark.parametrize("content", [b"PK\x03\x04" * 40, b"<!DOCTYPE html><html>404 not found</html>" * 4, b"\0" * 99])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.zim"
    path.write_bytes(content)
    with pytest.raises(SourceError, match="is not a ZIM file: it begins with"):
        open_source(path, kind="zim").snapshot()


@pytest.mark.parametrize("field", [24, 32, 48, 56])  # counts and positions of the tables
def test_a_header_that_libzim_refuses_is_reported(whole, tmp_path, field):
    path = changed(whole, tmp_path, field, b"\xff\xff\xff\xff")
    with pytest.raises(RuntimeError):
        Archive(path)
    with pytest.raises(SourceError, match=r"changed\.zim' is damaged: libzim cannot open it"):
        ZimSource(path).snapshot()


def test_no_flipped_byte_ends_in_a_traceback(whole, tmp_path):
    size = whole.stat().st_size
    outcomes = set()
    for at in [*range(0, 80, 3), *range(81, size, size // 60)]:
        source = ZimSource(changed(whole, tmp_path, at, bytes([whole.read_bytes()[at] ^ 0x15])))
        try:
            source.snapshot()
        except SourceError:
            outcomes.add("refused")
            continue
        Read(source).check_balance()
        outcomes.add("read")
    assert outcomes == {"refused", "read"}


# --- the command --------------------------------------------------------------------------------


def run(*words):
    return CliRunner().invoke(app, ["pack", *(str(word) for word in words)])


def test_the_command_refuses_a_damaged_file_unless_told_otherwise(tmp_path):
    good = write_zim(tmp_path / "x.zim", articles(12), packed=False)
    bad = changed(good, tmp_path, good.stat().st_size // 2, b"\1")
    out = tmp_path / "pack"
    done = run("build", bad, out, "--text-only", "--workers", 1)
    assert done.exit_code == 1 and "checksum differs" in done.output and "Traceback" not in done.output
    assert not (out / "MANIFEST.json").exists()
    done = run("build", good, out, "--text-only", "--workers", 1)  # the same folder, with the file downloaded again
    assert done.exit_code == 0, done.output
    done = run("add", out, bad, "--workers", 1)
    assert done.exit_code != 0 and "checksum differs" in done.output and read_manifest(out).generation == 1
    done = run("build", bad, tmp_path / "other", "--text-only", "--workers", 1, "--no-checksum")
    assert done.exit_code == 0, done.output
    items = json.loads(done.stdout.splitlines()[-1])["items"]
    assert [(row["present"], row["used"] + row["skipped"]) for row in items] == [(15, 15)]
    done = run("add", out, bad, "--workers", 1, "--no-checksum")
    assert done.exit_code == 0, done.output


def test_the_command_opens_parts(whole, tmp_path):
    split(whole, tmp_path)
    done = run("build", tmp_path / "x.zim", tmp_path / "pack", "--text-only", "--workers", 2)
    assert done.exit_code == 0, done.output
    manifest = read_manifest(tmp_path / "pack")
    assert manifest.counts.articles == 15 and manifest.snapshot == ZimSource(whole).snapshot()
