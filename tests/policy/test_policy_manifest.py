"""The manifest of a policy folder: files of this and of older versions are read, others rejected with the remedy."""

import json
import shutil

import pytest

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.errors import ArtifactError
from gog_edge.policy.manifest import MANIFEST, PolicyManifest, WeightFormats, WeightQuantization, read_manifest
from gog_edge.policy.model import EmbeddingTable, PolicyModel

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
    ({"colour": "red"}, "invalid manifest; export it again: .*unknown key 'colour'"),
    ({"weights": {"decoder": {"bits": 4}}}, "invalid manifest; export it again: .*requires the key 'size'"),
])  # fmt: skip
def test_a_manifest_of_another_version_is_rejected(stored, change, message):
    with pytest.raises(ArtifactError, match=message):
        PolicyManifest.from_json(stored | change)


@pytest.mark.parametrize(("part", "change", "message"), [
    ("text", {"heads": 5}, "'heads' must be a multiple of 'kv_heads', got 5 and 2"),
    ("text", {"mrope_section": [2, 2, 11]}, "must sum to half of 'head_dim'"), ("text", {"kv_heads": 0}, "at least 1"),
    ("text", {"mrope_section": [2, 14]}, "a list of 3 values"), ("text", {"layers": 2**40}, "at most 16777216"),
    ("text", {"rope_theta": 0}, "greater than 0"), ("text", {"tied": 1}, "must be true or false, got 1"),
    ("text", {"vocab": 5}, "'image_token' and 'eos' must be below the vocabulary of 5"),
    ("vision", {"heads": 3}, "'hidden' must be a multiple of 'heads', got 128 and 3"),
    ("vision", {"patch": 0}, "at least 1"),
    ("vision", {"out_hidden": 191}, "'out_hidden' must be the 'hidden' of"),
    ("vision", {"window": 27}, "at least 28 pixels"),
    ("vision", {"max_pixels": 3135}, "must be at least 'min_pixels'"), ("vision", {"std": [1, 1, 0]}, "greater than 0"),
    ("vision", {"deepstack": [1]}, "must have the 0 items"), ("chat", {"eos": None}, "must be a string, got None"),
    ("generation", {"top_p": 1.1}, "at most 1, got 1.1"), ("generation", {"temperature": -1}, "at least 0"),
])  # fmt: skip
def test_values_that_no_graph_can_have_are_refused(stored, part, change, message):
    with pytest.raises(ArtifactError, match=f"invalid manifest; export it again: .*{message}"):
        PolicyManifest.from_json(stored | {part: stored[part] | change})


@pytest.mark.parametrize("change", [
    {"eos": []}, {"eos": [-1]}, {"eos": 2}, {"max_context": 0}, {"max_context": 2**62}, {"image_token": None},
    {"name": ""},
    {"files": [{"path": "a"}]}, {"files": None}, {"weights": {"decoder": {"bits": 0, "size": 32}}}, {"vision": []},
])  # fmt: skip
def test_invalid_fields_are_refused(stored, change):
    with pytest.raises(ArtifactError, match="invalid manifest; export it again"):
        PolicyManifest.from_json(stored | change)


def test_a_decoder_of_other_dimensions_than_its_manifest_is_refused(tmp_path, stored):
    folder = shutil.copytree(ATLAS, tmp_path / "policy")
    (folder / MANIFEST).write_text(json.dumps(stored | {"text": stored["text"] | {"layers": 5}}))
    with pytest.raises(ArtifactError, match="the decoder has 'layers' 6, its manifest says 5; export the policy again"):
        PolicyModel.open(folder, threads=1)


def test_a_damaged_embedding_table_is_refused(tmp_path, stored):
    folder = shutil.copytree(ATLAS, tmp_path / "policy")
    table = (folder / "embed_tokens.npy").read_bytes()
    for data in (table[:-1], table[:50], table.replace(b"(4096, 192)", b"(192, 4096)", 1),
                 table.replace(b"<f4", b"<i4", 1)):  # fmt: skip
        (folder / "embed_tokens.npy").write_bytes(data)
        with pytest.raises(ArtifactError, match="policy: '.*embed_tokens.npy'"):
            EmbeddingTable.open(folder, PolicyManifest.from_json(stored))


def test_a_manifest_without_a_field_is_rejected(stored):
    del stored["chat"]
    with pytest.raises(ArtifactError, match="invalid manifest; export it again: .*requires the key 'chat'"):
        PolicyManifest.from_json(stored)


def test_altered_files_are_rejected(tmp_path):
    folder = shutil.copytree(ATLAS, tmp_path / "policy")
    assert read_manifest(folder, full=True) == read_manifest(ATLAS)
    path = folder / "dialect.toml"
    path.write_bytes(path.read_bytes().replace(b"atlas", b"atlus"))
    with pytest.raises(ArtifactError, match=r"dialect\.toml"):
        read_manifest(folder)
