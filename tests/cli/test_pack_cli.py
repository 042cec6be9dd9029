"""`gog-edge pack`: look at packs and change them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from listed_source import ListedSource
from little_folder import write_flag, write_little_folder
from little_world import FLAGS, flag
from typer.testing import CliRunner

from gog_edge.cli import app
from gog_edge.indexing.build import build_pack
from gog_edge.indexing.commit import writing
from gog_edge.indexing.sources.base import ArticleDraft
from gog_edge.indexing.sources.open import open_source
from gog_edge.retrieval.manifest import MANIFEST, read_manifest
from gog_edge.retrieval.pack import Pack, verify_pack


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_encoder):
    root = tmp_path_factory.mktemp("built")
    build_pack(open_source(write_little_folder(root / "source")), root / "pack", name="little", encoder=tiny_encoder,
               workers=1)
    return root / "pack"


@pytest.fixture
def pack(built, tmp_path):
    return shutil.copytree(built, tmp_path / "pack")


def run(*words):
    return CliRunner().invoke(app, ["pack", *(str(word) for word in words)])


def test_info_tells_what_is_in_it(pack):
    done = run("info", pack)
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    for told in ("pack 'little', generation 1", "tiny, 24 values", "recall@", "not calibrated", "torn.png", "MiB"):
        assert told in text, told


def test_info_as_one_object(pack):
    done = run("info", pack, "--json")
    assert done.exit_code == 0 and done.stdout.count("\n") == 1
    value = json.loads(done.stdout)
    assert value["name"] == "little" and value["counts"]["images"] == len(FLAGS) and "files" not in value
    (skipped,) = value["skipped"]
    assert skipped["count"] == 1 and skipped["examples"] == ["torn.png"]
    assert value["bytes"] == sum(entry.size for entry in read_manifest(pack).files) <= value["bytes_on_disk"]


def test_verify_says_that_it_is_whole(pack):
    done = run("verify", pack)
    assert done.exit_code == 0, done.output
    assert "generation 1, is whole" in done.stdout and "comparing files" in done.stderr


def test_verify_names_the_first_fault_with_exit_code_1(pack):
    path = pack / read_manifest(pack).segments[0].store
    path.write_bytes(path.read_bytes()[:-1])
    done = run("verify", pack)
    assert done.exit_code == 1 and path.name in done.stderr and "bytes" in done.stderr


def test_add_remove_calibrate_compact(pack, tmp_path, tiny_encoder, tiny_encoder_folder):
    write_flag(tmp_path / "more", "Spain", "Spain has news.")
    done = run("add", pack, tmp_path / "more", "--encoder", tiny_encoder_folder, "--workers", 1, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["generation"] == 2 and json.loads(done.stdout)["counts"]["articles"] == len(FLAGS)

    done = run("remove", pack, "--article", "Chad", "--article", "Italy.png")
    assert done.exit_code == 0 and f"generation 3, has {len(FLAGS) - 2} articles" in done.stdout

    done = run("calibrate", pack, "--encoder", tiny_encoder_folder)
    assert done.exit_code == 0, done.output
    assert "generation 3, is calibrated" in done.stdout

    done = run("compact", pack, "--encoder", tiny_encoder_folder)
    assert done.exit_code == 0, done.output
    assert "generation 4" in done.stdout and "MiB" in done.stdout
    assert verify_pack(pack).counts.articles == len(FLAGS) - 2
    opened = Pack.open(pack, tiny_encoder)
    assert opened.store.article("Spain.png") is not None and opened.store.article("Chad.png") is None
    opened.close()


def test_an_image_is_removed_by_its_id(pack):
    assert "9 images left" in run("remove", pack, "--image", 3).stdout
    done = run("remove", pack, "--image", 3)
    assert done.exit_code == 2 and "no image 3" in done.stderr


@pytest.mark.parametrize("words, told", [
    (("--article", "Portugl"), "'Portugal'"), ((), "nothing is named"), (("--article", "xyzzy"), "no article 'xyzzy'"),
])  # fmt: skip
def test_remove_says_what_it_cannot(pack, words, told):
    done = run("remove", pack, *words)
    assert done.exit_code == 2 and told in done.stderr and done.stderr.count("\n") == 1
    assert read_manifest(pack).generation == 1


def test_the_encoder_is_that_of_the_bundle_around_it(built, tmp_path, tiny_encoder_folder):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_encoder_folder, bundle / "encoder")
    pack = shutil.copytree(built, bundle / "packs" / "little")
    (bundle / "bundle.toml").write_text(
        'schema = 1\nname = "toy"\n[policy]\nurl = "http://127.0.0.1:9/v1"\nmodel = "m"\ndialect = "gog"\n'
        '[encoder]\npath = "encoder"\n[[packs]]\npath = "packs/little"\n')
    done = run("compact", pack)
    assert done.exit_code == 0, done.output
    assert read_manifest(pack).generation == 2


def test_vectors_that_lie_on_a_server_need_not_be_here(built, tmp_path, tiny_encoder_folder):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_encoder_folder, bundle / "encoder")
    pack = shutil.copytree(built, bundle / "packs" / "little")
    toml = ('schema = 1\nname = "toy"\n[policy]\nurl = "http://127.0.0.1:9/v1"\nmodel = "m"\ndialect = "gog"\n'
            '[encoder]\npath = "encoder"\n[[packs]]\npath = "packs/little"\n')
    (bundle / "bundle.toml").write_text(toml + 'milvus = "http://10.0.0.5:19530"\n')
    assert "is whole\n" in run("verify", pack).stdout
    shutil.rmtree(pack / "vectors")
    done = run("verify", pack)
    assert done.exit_code == 0 and "its vectors, which lie on http://10.0.0.5:19530" in done.stdout, done.output
    (bundle / "bundle.toml").write_text(toml)
    done = run("verify", pack)
    assert done.exit_code == 1 and "is missing" in done.stderr


def test_compact_says_what_the_disk_still_holds(pack, tiny_encoder_folder):
    run("remove", pack, "--article", "Chad")
    done = run("compact", pack, "--encoder", tiny_encoder_folder)
    assert done.exit_code == 0 and "the generation before's, which the next change removes" in done.stdout, done.output
    before = json.loads(run("info", pack, "--json").stdout)
    assert 0 < before["bytes_superseded"] <= before["bytes_on_disk"] - before["bytes"]
    assert "which the next change removes" in " ".join(run("info", pack).stdout.split())
    run("remove", pack, "--article", "Spain")
    after = json.loads(run("info", pack, "--json").stdout)
    assert after["bytes_on_disk"] < before["bytes_on_disk"] - before["bytes_superseded"] / 2


def test_a_pack_of_texts_alone_is_calibrated_without_an_encoder(tmp_path):
    groups = tuple((ArticleDraft(f"{chr(97 + n % 26) * 3}ton {n}", (("", "It lies by the sea."),), "CC0"),)
                   for n in range(60))
    build_pack(ListedSource(groups, 20), tmp_path / "texts", name="texts", encoder=None, workers=1)
    done = run("calibrate", tmp_path / "texts")
    assert done.exit_code == 0, done.output
    assert "found, words: accepts" in done.stdout and "before: not calibrated" in done.stdout
    assert read_manifest(tmp_path / "texts").text_calibration is not None
    done = run("calibrate", tmp_path / "texts")
    assert "found, words: accepts" in done.stdout and "as before" in done.stdout


def test_fewer_than_no_workers(pack, tmp_path, tiny_encoder_folder):
    done = run("add", pack, tmp_path, "--encoder", tiny_encoder_folder, "--workers", "-1")
    assert done.exit_code == 2 and "--workers" in done.stderr and "Traceback" not in done.stderr


def test_what_the_disk_refuses_is_one_line(pack, tmp_path, tiny_encoder_folder):
    done = run("add", pack, tmp_path / ("x" * 300), "--encoder", tiny_encoder_folder)
    assert done.exit_code == 2 and "cannot be used (File name too long)" in done.stderr, done.output
    assert done.stderr.strip().count("\n") == 0 and read_manifest(pack).generation == 1


def test_without_a_bundle_the_encoder_is_asked_for(pack):
    for words in (("compact", pack), ("calibrate", pack), ("add", pack, pack.parent)):
        done = run(*words)
        assert done.exit_code == 2 and "--encoder DIR" in done.stderr, done.output


def test_what_is_no_pack(tmp_path):
    for command in ("info", "remove", "compact", "calibrate"):
        done = run(command, tmp_path, *(["--article", "x"] if command == "remove" else []))
        assert done.exit_code == 2 and "right folder" in done.stderr
    assert run("verify", tmp_path).exit_code == 1 and not list(tmp_path.iterdir())


def test_an_older_schema_says_what_to_do(pack):
    (pack / MANIFEST).write_text('{"kind": "pack", "schema": 1}')
    done = run("info", pack)
    assert done.exit_code == 2 and "schema 1" in done.stderr and "build it again" in done.stderr


def test_what_another_process_writes(pack, tiny_encoder_folder):
    with writing(pack):
        for words in (("remove", pack, "--article", "Chad"), ("compact", pack, "--encoder", tiny_encoder_folder)):
            done = run(*words)
            assert done.exit_code == 2 and "written by another process" in done.stderr


@pytest.mark.parametrize("memory", ["2X", "", "-1G", "0"])
def test_a_size_that_is_none(pack, tiny_encoder_folder, memory):
    done = run("compact", pack, "--encoder", tiny_encoder_folder, "--memory", memory)
    assert done.exit_code == 2 and "no size" in done.stderr


def test_what_is_not_installed_is_named_with_its_extra(pack, tmp_path, tiny_encoder_folder):
    """A box without FAISS: what needs it says so, what does not works."""
    (tmp_path / "bare" / "faiss").mkdir(parents=True)
    (tmp_path / "bare" / "faiss" / "__init__.py").write_text('raise ModuleNotFoundError("No module", name="faiss")')
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "bare")}
    command = [sys.executable, "-m", "gog_edge.cli", "pack"]
    done = subprocess.run([*command, "verify", str(pack)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "gog_edge[cpu]" in done.stderr
    done = subprocess.run([*command, "--help"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "compact" in done.stdout


def test_stopped_by_the_user(tmp_path, built, tiny_encoder_folder):
    """Ctrl-C in the middle of an addition: it says how to go on, and does."""
    pack, source = shutil.copytree(built, tmp_path / "pack"), tmp_path / "many"
    for number in range(600):
        write_flag(source / str(number), "Germany")
    command = [sys.executable, "-m", "gog_edge.cli", "pack", "add", str(pack), str(source), "--encoder",
               str(tiny_encoder_folder), "--workers", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (pack / "build" / "store.sqlite").exists():
            time.sleep(0.01)
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "the same command goes on" in process.stderr.read()
    assert verify_pack(pack).generation == 1
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert verify_pack(pack).counts.articles == len(FLAGS) + 600


def test_flags_are_where_they_were(pack, tiny_encoder):
    opened = Pack.open(pack, tiny_encoder)
    hits = opened.images.search(tiny_encoder.embed_images([flag("Spain")]), 1)
    assert opened.store.images(hits.ids[0].tolist())[int(hits.ids[0, 0])].titles == ("Spain",)
    opened.close()
