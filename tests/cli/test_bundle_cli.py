"""`gog-edge bundle init`: a bundle from parts that exist."""

import errno
import itertools
import json
import os
import re
import shutil
import tomllib
from contextlib import closing
from dataclasses import fields
from pathlib import Path

import pytest
from little_folder import write_little_folder
from tiny_text_encoder import write_tiny_text_encoder
from typer.testing import CliRunner

from gog_edge import bundle_init
from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
from gog_edge.cli import app
from gog_edge.config import Limits, RemoteConfig
from gog_edge.errors import BundleError
from gog_edge.indexing.build import build_pack
from gog_edge.indexing.sources.open import open_source
from gog_edge.retrieval.text.encoder import TextEncoder
from gog_edge.runtime import open_runtime

POLICY, ENCODER, PACK = (DEFAULT_BUNDLE / part for part in ("policy", "encoder", "packs/atlas"))
ATLAS = ("--policy", POLICY, "--encoder", ENCODER, "--pack", PACK)


def init(*words):
    return CliRunner().invoke(app, ["bundle", "init", *map(str, words)])


def refusal(*words, code=1):
    done = init(*words)
    assert done.exit_code == code and done.stderr.startswith("gog-edge: ") and done.stderr.count("\n") == 1, done.output
    return done.stderr


def test_a_bundle_of_the_atlas_parts_answers_a_question(tmp_path):
    out = tmp_path / "museum"
    done = init(out, *ATLAS, "--samples", DEFAULT_BUNDLE / "samples")
    assert done.exit_code == 0, done.output
    assert re.search(r"bundle 'museum' needs up to \d+ MiB: weights ", done.stdout)
    assert f"gog-edge serve --bundle {out}\n" in done.stdout
    bundle = open_bundle(out)
    assert bundle.limits == Limits() and len(bundle.samples) == len(open_bundle(DEFAULT_BUNDLE).samples)
    bundle.verify(full=True)
    sample = next(each for each in bundle.samples if each.picture.name == "one.jpg")
    with closing(open_runtime(out, threads=2)) as runtime:
        record = runtime.answer(sample.picture.read_bytes(), sample.questions[0], lambda _: None)
    accepted = sample.expected[0]
    assert any(answer.casefold() in record.answer.casefold() for answer in accepted), (record.answer, accepted)


def test_parts_inside_the_bundle_are_used_where_they_are(tmp_path):
    shutil.copytree(POLICY, tmp_path / "models" / "small")
    done = init(tmp_path, "--policy", tmp_path / "models" / "small", "--encoder", ENCODER, "--pack", PACK,
                "--name", "the \"north\" wing")  # fmt: skip
    assert done.exit_code == 0, done.output
    table = tomllib.loads((tmp_path / "bundle.toml").read_text())
    assert table["name"] == 'the "north" wing' and table["policy"] == {"path": "models/small"}
    assert table["encoder"] == {"path": "encoder"} and table["packs"] == [{"path": "packs/atlas"}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle.toml", "encoder", "models", "packs"]


def test_a_part_cannot_be_the_bundle(tmp_path):
    policy = shutil.copytree(POLICY, tmp_path / "policy")
    assert "is its part" in refusal(policy, "--policy", policy, *ATLAS[2:])
    assert sorted(path.name for path in policy.iterdir()) == sorted(path.name for path in POLICY.iterdir())


def test_files_of_one_machine_are_not_copied(tmp_path):
    policy = shutil.copytree(POLICY, tmp_path / "policy")
    (policy / "cache" / "0123").mkdir(parents=True)
    (policy / "cache" / "0123" / "prompt.npz").write_bytes(b"of this machine")
    assert init(tmp_path / "out", "--policy", policy, *ATLAS[2:]).exit_code == 0
    assert not (tmp_path / "out" / "policy" / "cache").exists()


def test_links_share_the_files(tmp_path):
    parts = shutil.copytree(DEFAULT_BUNDLE, tmp_path / "parts")
    words = ("--policy", parts / "policy", "--encoder", parts / "encoder", "--pack", parts / "packs" / "atlas")
    assert init(tmp_path / "out", *words, "--link").exit_code == 0
    for name in ("policy/decoder.onnx", "packs/atlas/store/000002.sqlite"):
        assert (parts / name).samefile(tmp_path / "out" / name)
    open_bundle(tmp_path / "out").verify(full=True)


def test_a_policy_of_another_server(tmp_path):
    dialect = shutil.copy(POLICY / "dialect.toml", tmp_path / "own.toml")
    server = ("--policy-url", "http://127.0.0.1:8000/v1", "--model", "gog", "--dialect")
    assert init(tmp_path / "named", *ATLAS[2:], *server, "gog").exit_code == 0
    assert open_bundle(tmp_path / "named").policy == RemoteConfig("http://127.0.0.1:8000/v1", "gog", "gog")
    assert init(tmp_path / "file", *ATLAS[2:], *server, dialect).exit_code == 0
    copied = tmp_path / "file" / "dialect.toml"
    assert open_bundle(tmp_path / "file").policy.dialect == copied and copied.read_bytes() == dialect.read_bytes()
    no_scheme = ("--policy-url", "localhost:8000", *server[2:], "gog")
    assert "'url' must be http:// or https://" in refusal(tmp_path / "out", *ATLAS[2:], *no_scheme)
    assert "klingon" in refusal(tmp_path / "out", *ATLAS[2:], *server, "klingon")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words, code, message", [
    (ATLAS[2:], 2, "give either --policy, or --policy-url with --model and --dialect"),
    ((*ATLAS, "--policy-url", "http://127.0.0.1:1/v1"), 2, "give either --policy, or --policy-url"),
    ((*ATLAS, "--model", "gog"), 2, "--model and --dialect require --policy-url"),
    ((*ATLAS[2:], "--policy-url", "http://127.0.0.1:1/v1"), 2, "--policy-url requires --model and --dialect"),
    (("--policy", ENCODER, *ATLAS[2:]), 1, "expected 1 and 'policy'"),
    ((*ATLAS, "--pack", PACK), 1, "two packs have the name 'atlas'"),
    ((*ATLAS, "--samples", PACK), 1, "samples.json"),
])  # fmt: skip
def test_parts_are_checked_before_anything_is_written(tmp_path, words, code, message):
    assert message in refusal(tmp_path / "out", *words, code=code)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [
    ("", *ATLAS), ("out", "--policy", "", *ATLAS[2:]), ("out", *ATLAS, "--pack", ""), ("out", *ATLAS, "--samples", ""),
])  # fmt: skip
def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    done = init(*words)
    assert done.exit_code == 2 and "the path is empty" in " ".join(done.output.split()), done.output
    assert not list(tmp_path.iterdir())


def test_an_encoder_of_another_pack_is_refused(tmp_path, tiny_encoder_folder):
    message = refusal(tmp_path / "out", "--policy", POLICY, "--encoder", tiny_encoder_folder, "--pack", PACK)
    assert "pack 'atlas' was built with the encoder" in message and not (tmp_path / "out").exists()


def test_the_text_encoder_of_a_pack_is_included(tmp_path, tiny_encoder, tiny_encoder_folder):
    text_encoder = write_tiny_text_encoder(tmp_path / "tiny_text")
    words = ("--policy", POLICY, "--encoder", tiny_encoder_folder, "--text-encoder", text_encoder, "--pack")
    source = open_source(write_little_folder(tmp_path / "source"))
    build_pack(source, tmp_path / "little", name="little", encoder=tiny_encoder, workers=1,
               text_encoder=TextEncoder.open(text_encoder))  # fmt: skip
    assert init(tmp_path / "out", *words, tmp_path / "little").exit_code == 0
    assert open_bundle(tmp_path / "out").text_encoder == tmp_path / "out" / "text_encoder"
    other = write_tiny_text_encoder(tmp_path / "other", seed=1)
    message = refusal(tmp_path / "other_out", *words[:5], other, "--pack", tmp_path / "little")
    assert "pack 'little' was built with the text encoder 'tiny'" in message


def test_existing_bundles_and_parts_are_replaced_only_by_force(tmp_path):
    out = tmp_path / "out"
    assert init(out, *ATLAS, "--name", "first").exit_code == 0
    assert "bundle.toml' already exists; choose another folder, or replace it with --force" in refusal(out, *ATLAS)
    (out / "bundle.toml").unlink()
    assert "policy' already exists; name that folder itself" in refusal(out, *ATLAS)
    (out / "policy" / "decoder.onnx").write_bytes(b"damaged")
    assert init(out, *ATLAS, "--name", "second", "--force").exit_code == 0
    bundle = open_bundle(out)
    bundle.verify(full=True)
    assert bundle.name == "second"


def test_a_bundle_inside_a_part_is_refused(tmp_path):
    policy = shutil.copytree(POLICY, tmp_path / "policy")
    assert "or inside it" in refusal(policy / "bundle", "--policy", policy, *ATLAS[2:])
    assert not (policy / "bundle").exists()


def test_an_interrupted_copy_leaves_nothing(tmp_path, monkeypatch):
    """The second part cannot be copied."""
    copy2 = shutil.copy2

    def fail(source, target, **options):
        if "text.onnx" in str(source):
            raise OSError(28, "No space left on device")
        return copy2(source, target, **options)

    monkeypatch.setattr(shutil, "copy2", fail)
    assert "No space left on device" in refusal(tmp_path / "out", *ATLAS)
    assert not list((tmp_path / "out").rglob("*.onnx")) and not (tmp_path / "out" / "bundle.toml").exists()


def tree(folder):
    """The content of each file below a folder, and the folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def fail_after(calls, error, function):
    """A function that raises `error` in place of the call with this number."""
    numbers = itertools.count()

    def call(*args, **options):
        if next(numbers) == calls:
            raise error
        return function(*args, **options)

    return call


DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [DISK_FULL, KeyboardInterrupt()], ids=["disk full", "interrupted"])
@pytest.mark.parametrize("module, name, calls", [
    (shutil, "copy2", 0), (shutil, "copy2", 7),  # of files of parts
    (Path, "rename", 0), (Path, "rename", 1), (Path, "rename", 3),  # of parts to their places
    (os, "fsync", 0),  # of bundle.toml
    (bundle_init.Bundle, "verify", 0),
])  # fmt: skip
@pytest.mark.parametrize("existing", [False, True], ids=["new", "forced"])
def test_a_failure_at_any_step_changes_nothing(tmp_path, monkeypatch, module, name, calls, error, existing):
    out = tmp_path / "new" / "out"
    if existing:
        assert init(out, *ATLAS, "--name", "first").exit_code == 0
        (out / "policy" / "decoder.onnx").write_bytes(b"of the first bundle")
    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail_after(calls, error, getattr(module, name)))
        done = init(out, *ATLAS, "--force")
    assert done.exit_code == (1 if error is DISK_FULL else 130), done.output
    assert done.stderr.count("\n") == 1 and ("No space left on device" in done.stderr or error is not DISK_FULL)
    assert tree(tmp_path) == before
    assert init(out, *ATLAS, *["--force"] * existing).exit_code == 0
    open_bundle(out).verify(full=True)
    assert not [path for path in tree(out) if path.endswith((".part", ".old"))]


def test_an_old_part_that_cannot_be_restored_is_named(tmp_path, monkeypatch):
    """All other parts are restored."""
    out, rename = tmp_path / "out", Path.rename
    assert init(out, *ATLAS, "--name", "first").exit_code == 0
    (out / "policy" / "decoder.onnx").write_bytes(b"of the first bundle")

    def fail(path, target):
        if path.name == ".encoder.old":
            raise DISK_FULL
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        patch.setattr(bundle_init.Bundle, "verify", fail_after(0, BundleError("a file was changed"), None))
        message = refusal(out, *ATLAS, "--force")
    assert f"a file was changed; '{out / 'encoder'}' cannot be restored" in message
    assert f"is in '{out / '.encoder.old'}'" in message and (out / ".encoder.old" / "image.onnx").is_file()
    assert (out / "policy" / "decoder.onnx").read_bytes() == b"of the first bundle"
    assert tomllib.loads((out / "bundle.toml").read_text())["name"] == "first"


def test_the_remains_of_a_killed_run_are_recovered(tmp_path):
    """It was killed after it had moved the policy aside."""
    out = tmp_path / "out"
    assert init(out, *ATLAS).exit_code == 0
    (out / "policy").rename(out / ".policy.old")
    (out / "encoder.part").mkdir()
    assert init(out, "--policy", tmp_path, *ATLAS[2:], "--force").exit_code == 1  # nothing is changed before the check
    assert init(out, *ATLAS, "--force").exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["bundle.toml", "encoder", "packs", "policy"]


def test_every_limit_is_explained_with_its_default(tmp_path):
    assert init(tmp_path / "out", *ATLAS).exit_code == 0
    text = (tmp_path / "out" / "bundle.toml").read_text()
    section = text.partition("[limits]\n")[2]
    active = "\n".join(line.removeprefix("# ") for line in section.splitlines())
    assert Limits.from_table(tomllib.loads(active), where="bundle.toml") == Limits()
    assert tomllib.loads(active).keys() == {field.name for field in fields(Limits)}
    assert all(" # " in line for line in active.splitlines())


@pytest.mark.parametrize("text", ["plain", 'a "quoted" name', "back\\slash", "tab\tbell\x07\x7f", "日本 🙂"])
def test_strings_survive_toml(text):
    assert tomllib.loads(f"name = {bundle_init._string(text)}") == {"name": text}
    assert json.loads(bundle_init._string(text)) == text
