"""The manifest of a policy folder: files of this and of older versions are read, others rejected with the remedy."""

import json
import shutil

import pytest

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.errors import ArtifactError
from gog_edge.policy.manifest import MANIFEST, PolicyManifest, WeightFormats, WeightQuantization, read_manifest

ATLAS = DEFAULT_BUNDLE / "policy"


@pytest.fixture
def stored():
    return json.loads((ATLAS / MANIFEST).read_text())


def test_a_manifest_is_written_as_it_was_read(stored):
    assert json.loads(json.dumps(PolicyManifest.from_json(stored).to_json())) == stored


def test_a_manifest_of_an_older_version_is_read(stored):
    assert PolicyManifest.from_json(stored | {"lowering": "GroupQueryAttention"}) == PolicyManifest.from_json(stored)


def test_quantized_weights_are_read(stored):
    stored["weights"] |= {"decoder": {"bits": 4, "size": 128}, "vision": {"bits": 8, "size": None}}
    blocks, rows = WeightQuantization(4, 128), WeightQuantization(8, None)
    assert PolicyManifest.from_json(stored).weights == WeightFormats(decoder=blocks, vision=rows)


@pytest.mark.parametrize(("change", "message"), [
    ({"schema": 2}, "manifest has schema 2 and kind 'policy', expected 1 and 'policy'; export"),
    ({"kind": "encoder"}, "kind 'encoder', expected 1 and 'policy'"),
    ({"colour": "red"}, "does not match this version .*colour.*; export it again"),
    ({"weights": {"decoder": {"bits": 4}}}, "does not match this version .*size"),
])  # fmt: skip
def test_a_manifest_of_another_version_is_rejected(stored, change, message):
    with pytest.raises(ArtifactError, match=message):
        PolicyManifest.from_json(stored | change)


def test_a_manifest_without_a_field_is_rejected(stored):
    del stored["chat"]
    with pytest.raises(ArtifactError, match="does not match this version .*chat"):
        PolicyManifest.from_json(stored)


def test_altered_files_are_rejected(tmp_path):
    folder = shutil.copytree(ATLAS, tmp_path / "policy")
    assert read_manifest(folder, full=True) == read_manifest(ATLAS)
    path = folder / "dialect.toml"
    path.write_bytes(path.read_bytes().replace(b"atlas", b"atlus"))
    with pytest.raises(ArtifactError, match=r"dialect\.toml"):
        read_manifest(folder)
