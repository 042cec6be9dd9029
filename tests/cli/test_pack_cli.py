"""`gog-edge pack`: inspect packs and change them."""

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
from tiny_text_encoder import write_tiny_text_encoder
from typer.testing import CliRunner

from gog_edge.cli import app
from gog_edge.indexing.build import build_pack
from gog_edge.indexing.commit import write_lock
from gog_edge.indexing.sources.base import ArticleRecord
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


def test_info_prints_the_contents(pack):
    done = run("info", pack)
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    for part in ("pack 'little', generation 1", "tiny, 24 dimensions", "recall@", "not calibrated", "torn.png", "MiB"):
        assert part in text, part


def test_info_as_json(pack):
    done = run("info", pack, "--json")
    assert done.exit_code == 0 and done.stdout.count("\n") == 1
    value = json.loads(done.stdout)
    assert value["name"] == "little" and value["counts"]["images"] == len(FLAGS) and "files" not in value
    (skipped,) = value["skipped"]
    assert skipped["count"] == 1 and skipped["examples"] == ["torn.png"]
    assert value["bytes"] == sum(entry.size for entry in read_manifest(pack).files) <= value["bytes_on_disk"]


def test_verify_accepts_a_valid_pack(pack):
    done = run("verify", pack)
    assert done.exit_code == 0, done.output
    assert "generation 1, is valid" in done.stdout and "comparing files" in done.stderr


def test_verify_reports_the_first_fault_with_exit_code_1(pack):
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
    assert "generation 3, has too few images and titles to be calibrated" in " ".join(done.stdout.split())

    done = run("compact", pack, "--encoder", tiny_encoder_folder)
    assert done.exit_code == 0, done.output
    assert "generation 4" in done.stdout and "MiB" in done.stdout
    assert verify_pack(pack).counts.articles == len(FLAGS) - 2
    opened = Pack.open(pack, tiny_encoder)
    assert opened.store.article_by_key("Spain.png") is not None and opened.store.article_by_key("Chad.png") is None
    opened.close()


def test_an_image_is_deleted_by_its_id(pack):
    assert "9 images left" in run("remove", pack, "--image", 3).stdout
    done = run("remove", pack, "--image", 3)
    assert done.exit_code == 1 and "the image 3 does not exist" in done.stderr


@pytest.mark.parametrize("words, code, message", [
    (("--article", "Portugl"), 1, "'Portugal'"), ((), 2, "nothing to delete"),
    (("--article", "xyzzy"), 1, "the article 'xyzzy' does not exist"),
])  # fmt: skip
def test_remove_reports_errors_in_one_line(pack, words, code, message):
    done = run("remove", pack, *words)
    assert done.exit_code == code and message in done.stderr and done.stderr.count("\n") == 1
    assert read_manifest(pack).generation == 1


def test_the_encoder_of_the_bundle_is_used(built, tmp_path, tiny_encoder_folder):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_encoder_folder, bundle / "encoder")
    pack = shutil.copytree(built, bundle / "packs" / "little")
    (bundle / "bundle.toml").write_text(
        'schema = 1\nname = "toy"\n[policy]\nurl = "http://127.0.0.1:9/v1"\nmodel = "m"\ndialect = "gog"\n'
        '[encoder]\npath = "encoder"\n[[packs]]\npath = "packs/little"\n')
    done = run("compact", pack)
    assert done.exit_code == 0, done.output
    assert read_manifest(pack).generation == 2


def test_vectors_on_a_server_may_be_missing_locally(built, tmp_path, tiny_encoder_folder):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_encoder_folder, bundle / "encoder")
    pack = shutil.copytree(built, bundle / "packs" / "little")
    toml = ('schema = 1\nname = "toy"\n[policy]\nurl = "http://127.0.0.1:9/v1"\nmodel = "m"\ndialect = "gog"\n'
            '[encoder]\npath = "encoder"\n[[packs]]\npath = "packs/little"\n')
    (bundle / "bundle.toml").write_text(toml + 'milvus = "http://10.0.0.5:19530"\n')
    assert "is valid\n" in run("verify", pack).stdout
    shutil.rmtree(pack / "vectors")
    done = run("verify", pack)
    assert done.exit_code == 0 and "its vectors are on http://10.0.0.5:19530" in done.stdout, done.output
    (bundle / "bundle.toml").write_text(toml)
    done = run("verify", pack)
    assert done.exit_code == 1 and "is missing" in done.stderr


def test_compact_prints_the_space_that_is_freed_later(pack, tiny_encoder_folder):
    run("remove", pack, "--article", "Chad")
    done = run("compact", pack, "--encoder", tiny_encoder_folder)
    assert done.exit_code == 0, done.output
    assert "belong to the previous generation and are freed by the next change" in done.stdout
    before = json.loads(run("info", pack, "--json").stdout)
    assert 0 < before["bytes_superseded"] <= before["bytes_on_disk"] - before["bytes"]
    assert "freed by the next change" in " ".join(run("info", pack).stdout.split())
    run("remove", pack, "--article", "Spain")
    after = json.loads(run("info", pack, "--json").stdout)
    assert after["bytes_on_disk"] < before["bytes_on_disk"] - before["bytes_superseded"] / 2


def test_a_pack_without_images_is_calibrated_without_an_encoder(tmp_path):
    groups = tuple((ArticleRecord(f"{chr(97 + n % 26) * 3}ton {n}", (("", "It lies by the sea."),), "CC0"),)
                   for n in range(60))
    build_pack(ListedSource(groups, 20), tmp_path / "texts", name="texts", encoder=None, workers=1)
    done = run("calibrate", tmp_path / "texts")
    assert done.exit_code == 0, done.output
    assert "text calibration: accepts" in done.stdout and "before: not calibrated" in done.stdout
    assert read_manifest(tmp_path / "texts").text_calibration is not None
    done = run("calibrate", tmp_path / "texts")
    assert "text calibration: accepts" in done.stdout and "as before" in done.stdout


def test_a_negative_number_of_workers_is_refused(pack, tmp_path, tiny_encoder_folder):
    done = run("add", pack, tmp_path, "--encoder", tiny_encoder_folder, "--workers", "-1")
    assert done.exit_code == 2 and "--workers" in done.stderr and "Traceback" not in done.stderr


def test_disk_errors_are_reported_in_one_line(pack, tmp_path, tiny_encoder_folder):
    done = run("add", pack, tmp_path / ("x" * 300), "--encoder", tiny_encoder_folder)
    assert done.exit_code == 1 and "cannot be used (File name too long)" in done.stderr, done.output
    assert done.stderr.strip().count("\n") == 0 and read_manifest(pack).generation == 1


def test_outside_of_a_bundle_the_encoder_is_required(pack):
    for words in (("compact", pack), ("calibrate", pack), ("add", pack, pack.parent)):
        done = run(*words)
        assert done.exit_code == 2 and "--encoder DIR" in done.stderr, done.output


def test_folders_that_are_not_packs_are_refused(tmp_path):
    for command in ("info", "verify", "remove", "compact", "calibrate"):
        done = run(command, tmp_path, *(["--article", "x"] if command == "remove" else []))
        assert done.exit_code == 1 and "right folder" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_older_schema_is_refused_with_advice(pack):
    (pack / MANIFEST).write_text('{"kind": "pack", "schema": 1}')
    done = run("info", pack)
    assert done.exit_code == 1 and "got 'pack' and 1" in done.stderr and "again" in done.stderr


def test_a_second_writer_is_refused(pack, tiny_encoder_folder):
    with write_lock(pack):
        for words in (("remove", pack, "--article", "Chad"), ("compact", pack, "--encoder", tiny_encoder_folder)):
            done = run(*words)
            assert done.exit_code == 1 and "written by another process" in done.stderr


@pytest.mark.parametrize("memory", ["2X", "", "-1G", "0"])
def test_an_invalid_size_is_refused(pack, tiny_encoder_folder, memory):
    done = run("compact", pack, "--encoder", tiny_encoder_folder, "--memory", memory)
    assert done.exit_code == 2 and "a size must be" in done.stderr


def test_a_missing_package_is_reported_with_its_extra(pack, tmp_path, tiny_encoder_folder):
    """On a machine without FAISS only the commands that need it fail."""
    (tmp_path / "bare" / "faiss").mkdir(parents=True)
    (tmp_path / "bare" / "faiss" / "__init__.py").write_text('raise ModuleNotFoundError("No module", name="faiss")')
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "bare")}
    command = [sys.executable, "-m", "gog_edge.cli", "pack"]
    done = subprocess.run([*command, "verify", str(pack)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "gog_edge[cpu]" in done.stderr
    done = subprocess.run([*command, "--help"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "compact" in done.stdout


def test_a_pack_is_built_by_the_command(tmp_path, tiny_encoder_folder):
    source = write_little_folder(tmp_path / "source")
    done = run("build", source, tmp_path / "pack", "--encoder", tiny_encoder_folder, "--workers", 1, "--name", "flags")
    assert done.exit_code == 0, done.output
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["name"] == "flags" and last["counts"]["images"] == len(FLAGS) and last["pack"] == str(tmp_path / "pack")
    assert verify_pack(tmp_path / "pack").counts.articles == len(FLAGS)


@pytest.mark.parametrize("words, message", [
    ((), "either --encoder DIR or --text-only"), (("--text-only", "--encoder", "x"), "either --encoder DIR or"),
    (("--text-only", "--stop-after", "embedding"), "must be 'reading', got 'embedding'"),
])  # fmt: skip
def test_usage_errors_of_a_build(tmp_path, words, message):
    source = write_little_folder(tmp_path / "source")
    done = run("build", source, tmp_path / "pack", *words)
    assert done.exit_code == 2 and message in " ".join(done.stderr.replace("\u2502", "").split())
    assert not (tmp_path / "pack").exists()


def test_a_build_that_stops_after_reading_is_completed_by_embed_ray_or_by_itself(tmp_path, tiny_encoder_folder):
    """The unfinished pack names the command that completes it."""
    source = write_little_folder(tmp_path / "source")
    words = ("build", source, tmp_path / "pack", "--encoder", tiny_encoder_folder, "--workers", 1, "--no-calibration")
    done = run(*words, "--stop-after", "reading")
    assert done.exit_code == 0 and json.loads(done.stdout)["stopped_after"] == "reading", done.output
    done = run("info", tmp_path / "pack")
    assert done.exit_code == 1
    assert f"gog-edge pack build {source} {tmp_path / 'pack'} --encoder {tiny_encoder_folder} " in done.stderr
    assert run(*words).exit_code == 0
    done = run("embed-ray", tmp_path / "pack", "--encoder", tiny_encoder_folder)
    assert done.exit_code == 1 and "does not contain an unfinished build" in done.stderr


@pytest.mark.parametrize("words, message", [
    (("embed-ray", "PACK", "--encoder", "E", "--workers", "0"), "must be at least 1, got 0 and 1"),
    (("export-parquet", "PACK", "out", "--dtype", "float64"), "one of float32, float16, got 'float64'"),
    (("load-milvus", "PACK", "m.db", "--index", "LSH"), "one of FLAT, IVF_FLAT, IVF_SQ8, IVF_RABITQ, HNSW, got 'LSH'"),
    (("load-milvus", "PACK", "m.db", "--search", "nprobe"), "must be NAME=NUMBER, got 'nprobe'"),
])  # fmt: skip
def test_invalid_values_are_reported(pack, words, message):
    done = run(*(str(pack) if word == "PACK" else word for word in words))
    assert done.exit_code in (1, 2) and message in " ".join(done.stderr.replace("\u2502", "").split()), done.stderr


@pytest.mark.parametrize("words, module, extra", [
    (("compact", "PACK", "--encoder", "ENCODER"), "sqlite_utils", "index"),
    (("build", "SOURCE", "OUT", "--text-only"), "sqlite_utils", "index"),
    (("embed-ray", "PACK", "--encoder", "ENCODER"), "ray", "ray"),
    (("export-parquet", "PACK", "OUT"), "pyarrow", "milvus"),
    (("load-milvus", "PACK", "m.db"), "pymilvus", "milvus"),
])  # fmt: skip
def test_missing_extras_are_named(pack, tmp_path, tiny_encoder_folder, words, module, extra):
    """Commands that do not write stores work without sqlite-utils."""
    (tmp_path / "bare" / module).mkdir(parents=True)
    (tmp_path / "bare" / module / "__init__.py").write_text(f'raise ModuleNotFoundError("No module", name="{module}")')
    source = write_little_folder(tmp_path / "source")
    run("build", source, tmp_path / "unfinished", "--encoder", tiny_encoder_folder, "--stop-after", "reading")
    paths = {"PACK": tmp_path / "unfinished" if module == "ray" else pack, "ENCODER": tiny_encoder_folder,
             "SOURCE": source, "OUT": tmp_path / "out"}
    command = [sys.executable, "-m", "gog_edge.cli", "pack", *(str(paths.get(word, word)) for word in words)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "bare")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode in (1, 2) and f"pip install 'gog_edge[{extra}]'" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    if module == "sqlite_utils":
        command[4:] = ["remove", str(pack), "--article", "Chad"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


def test_ctrl_c_during_an_addition(tmp_path, built, tiny_encoder_folder):
    """The message says how to resume the addition, and the same command does."""
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
        assert "run the same command again to resume" in process.stderr.read()
    assert verify_pack(pack).generation == 1
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert verify_pack(pack).counts.articles == len(FLAGS) + 600


def test_stored_images_are_found(pack, tiny_encoder):
    opened = Pack.open(pack, tiny_encoder)
    hits = opened.images.search(tiny_encoder.embed_images([flag("Spain")]), 1)
    assert opened.store.images(hits.ids[0].tolist())[int(hits.ids[0, 0])].titles == ("Spain",)
    opened.close()


# --- vectors of paragraphs ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    return write_tiny_text_encoder(tmp_path_factory.mktemp("text_encoder"))


@pytest.fixture
def texts(tmp_path, text_encoder):
    """A pack without pictures whose paragraphs have vectors."""
    source = write_little_folder(tmp_path / "source")
    done = run("build", source, tmp_path / "texts", "--text-only", "--text-encoder", text_encoder, "--workers", 1)
    assert done.exit_code == 0, done.output
    return tmp_path / "texts"


def test_texts_are_built_and_described_with_their_text_encoder(texts):
    manifest = read_manifest(texts)
    assert manifest.encoder is None and manifest.paragraphs.rows == manifest.counts.paragraphs > 0
    text = " ".join(run("info", texts).output.split())
    assert "tiny, 16 dimensions" in text and f"{manifest.paragraphs.rows} vectors" in text and "captions" not in text
    assert run("verify", texts).exit_code == 0


def test_changes_need_the_text_encoder(texts, text_encoder, tmp_path):
    more = tmp_path / "more"
    more.mkdir()
    write_flag(more / "peru.png", "France")
    (more / "peru.txt").write_text("The capital of Peru is Lima.")
    rows = read_manifest(texts).paragraphs.rows
    for words in (("add", texts, more), ("calibrate", texts), ("compact", texts)):
        done = run(*words)
        assert done.exit_code == 2 and "is not in a bundle with its text encoder 'tiny'; give --text-encoder" in \
            done.stderr
        done = run(*words, "--text-encoder", text_encoder)
        assert done.exit_code == 0, done.output
    assert read_manifest(texts).paragraphs.rows > rows and len(read_manifest(texts).segments) == 1


def test_a_text_encoder_for_a_pack_without_its_vectors_is_refused(pack, text_encoder, tiny_encoder_folder):
    done = run("compact", pack, "--encoder", tiny_encoder_folder, "--text-encoder", text_encoder)
    assert done.exit_code == 2 and "pack 'little' was built without a text encoder; omit --text-encoder" in done.stderr
