import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from listed_source import ListedSource, little_groups
from little_world import FLAGS, SNAPSHOT

from gog_edge.errors import PackError
from gog_edge.indexing.build import build_pack
from gog_edge.indexing.distribution.parquet_export import GROUP_ROWS, export_parquet, read_export_info, read_vectors
from gog_edge.retrieval.manifest import read_manifest
from gog_edge.retrieval.pack import open_shards
from gog_edge.retrieval.vectors.milvus import Origin

REPOSITORY = Path(__file__).parents[3]


def test_each_vector_is_a_row_with_its_image(little_pack_folder, tiny_encoder, tmp_path):
    reported = []
    files = export_parquet(little_pack_folder, tmp_path / "out", on_progress=lambda *step: reported.append(step))
    assert [path.name for path in files] == ["images.parquet", "captions.parquet"]
    assert reported == [("images", 10, 10), ("captions", 10, 10)]
    manifest = read_manifest(little_pack_folder)
    for path, space in zip(files, (manifest.images, manifest.captions), strict=True):
        table = pq.read_table(path)
        stored = open_shards(little_pack_folder, space, tiny_encoder.dim)
        vectors = np.stack(table["vector"].to_numpy())
        assert vectors.dtype == np.float16
        np.testing.assert_array_equal(vectors.astype(np.float32), stored.take(np.arange(len(stored))))
        assert table["id"].to_pylist() == stored.ids_of(np.arange(len(stored))).tolist()
        assert table["row"].to_pylist() == list(range(len(FLAGS)))
        assert set(table["snapshot"].to_pylist()) == {SNAPSHOT.uuid} and set(table["generation"].to_pylist()) == {1}
    norway = next(row for row in pq.read_table(files[0]).to_pylist() if "Norway" in row["titles"])
    assert norway["titles"] == ["Norway", "Svalbard"] and len(norway["articles"]) == 2
    assert (norway["caption"], norway["licence"], norway["attribution"]) == ("Flag of Norway", "MIT", "us")


def test_the_metadata_identify_the_vectors(little_pack_folder, tmp_path):
    images, captions = export_parquet(little_pack_folder, tmp_path, dtype="float32")
    manifest = read_manifest(little_pack_folder)
    assert read_export_info(images).origin == Origin.of(manifest, "images") != Origin.of(manifest, "captions")
    assert (read_export_info(captions).rows, read_export_info(captions).dtype) == (10, "float32")
    parts = list(read_vectors(images, 4))
    assert [len(rows) for rows, _, _ in parts] == [4, 4, 2] and parts[0][2].dtype == np.float32
    assert parts[0][2].shape == (4, 24)


def test_deleted_images_are_left_out(tiny_encoder, tmp_path):
    build = {"name": "little", "encoder": tiny_encoder, "workers": 1}
    build_pack(ListedSource(little_groups()), tmp_path / "pack", **build)
    build_pack(ListedSource(little_groups(skip=["France", "Chad"])), tmp_path / "pack", update=True, **build)
    images, _ = export_parquet(tmp_path / "pack", tmp_path / "out")
    table = pq.read_table(images)
    titles = {title for own in table["titles"].to_pylist() for title in own}
    assert len(table) == 8 and not titles & {"France", "Chad"} and set(table["generation"].to_pylist()) == {2}
    assert table["row"].to_pylist() == list(range(8))


def test_memory_is_bounded_by_row_groups(little_pack_folder, tmp_path):
    """A pack with many rows is written in several row groups."""
    folder = shutil.copytree(little_pack_folder, tmp_path / "pack")
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    shard = manifest["images"]["shards"][0]
    times = 2 * GROUP_ROWS // 10 + 1
    for name, axes in ((shard["vectors"], (times, 1)), (shard["ids"], times)):
        np.save(folder / name, np.tile(np.load(folder / name), axes))
    entries = {entry["path"]: entry for entry in manifest["files"]}
    for name in (shard["vectors"], shard["ids"]):
        from gog_edge.files import describe_files

        entries[name] = describe_files(folder, [name])[0].to_json()
    manifest["files"], shard["rows"] = list(entries.values()), 10 * times
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    images, _ = export_parquet(folder, tmp_path / "out")
    metadata = pq.ParquetFile(images).metadata
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)][:2] == [GROUP_ROWS] * 2
    assert metadata.num_rows == 10 * times


def test_invalid_exports_are_refused(little_pack_folder, tmp_path):
    with pytest.raises(PackError, match="right folder"):
        export_parquet(tmp_path, tmp_path / "out")
    with pytest.raises(PackError, match="one of float32, float16, got 'float64'"):
        export_parquet(little_pack_folder, tmp_path / "out", dtype="float64")
    build_pack(ListedSource(little_groups()), tmp_path / "words", name="words", encoder=None, workers=1)
    with pytest.raises(PackError, match="has no vectors: it was built without an encoder"):
        export_parquet(tmp_path / "words", tmp_path / "out")
    (tmp_path / "truncated.parquet").write_bytes(b"PAR1")
    with pytest.raises(PackError, match="is not a Parquet file"):
        read_export_info(tmp_path / "truncated.parquet")
    pq.write_table(pq.read_table(export_parquet(little_pack_folder, tmp_path / "out")[0]).replace_schema_metadata(),
                   tmp_path / "other.parquet")
    with pytest.raises(PackError, match="has an invalid description"):
        read_export_info(tmp_path / "other.parquet")


def test_the_commands_export_and_load_a_pack(little_pack_folder, tmp_path):
    def run(module, *arguments):
        done = subprocess.run([sys.executable, "-m", module, *map(str, arguments)], cwd=REPOSITORY, text=True,
                              capture_output=True, timeout=120)
        return done.returncode, done.stdout.splitlines()[-1:], done.stderr

    code, (line,), _ = run("index.export_parquet", little_pack_folder, tmp_path / "out")
    assert code == 0 and json.loads(line)["rows"] == {"images.parquet": 10, "captions.parquet": 10}
    code, (line,), error = run("index.load_milvus", little_pack_folder, tmp_path / "m.db", "--search", "nprobe=8")
    assert code == 0, error
    aliases = json.loads(line)["aliases"]
    assert aliases["little_images"]["holding"]["search"] == {"nprobe": 8}
    assert aliases["little_captions"]["collection"] == "little_captions_000001_ivf_flat"
    code, _, error = run("index.load_milvus", tmp_path, tmp_path / "m.db")
    assert code == 1 and "error: '" in error and "does not contain images.parquet" in error
