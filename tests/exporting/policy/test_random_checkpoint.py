import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from gog_edge.errors import CheckpointError
from gog_edge.exporting.policy.checkpoint import Checkpoint
from gog_edge.exporting.policy.export import export_policy
from gog_edge.exporting.policy.random_checkpoint import SHAPES, SPECIAL, shape_of, write_random_checkpoint

PUBLISHED = {  # parameters, as the model pages state them
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
}
FAMILIES = ("qwen2.5-vl-7b", "qwen3-vl-2b")


def shrunk(name):
    """A released shape made small, with the same tensor names and special tokens."""
    shape = shape_of(name)
    text, vision = shape.config.text_config, shape.config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 64, 80, 2
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 4, 2, 16
    text.rope_parameters = text.rope_parameters | {"mrope_section": [2, 3, 3]}
    text.layer_types = ["full_attention"] * 2  # transformers set it for the true depth
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 2, 64, 96, 4
    vision.out_hidden_size = 64
    if name.startswith("qwen2.5"):
        vision.fullatt_block_indexes = [1]
        return replace(shape, processor=shape.processor | {"max_pixels": 78_400})
    vision.deepstack_visual_indexes = [0]
    return shape


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    for name in FAMILIES:
        write_random_checkpoint(shrunk(name), folder / name, shard_bytes=4 << 20)
    return folder


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_published_size(name):
    assert sum(tensor.numel() for tensor in shape_of(name).tensors().values()) == PUBLISHED[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_finds_every_weight(written, name):
    model, loading = shape_of(name).architecture.from_pretrained(written / name, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert model.config.image_token_id == SPECIAL["<|image_pad|>"]
    weight = model.model.language_model.layers[1].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16 and 0.018 < weight.float().std() < 0.022


def test_shards_have_the_requested_size(written):
    folder = written / "qwen2.5-vl-7b"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files == sorted(path.name for path in folder.glob("*.safetensors"))
    for name in files:
        with safe_open(folder / name, framework="pt") as shard:
            held = list(shard.keys())
            assert held and all(index["weight_map"][tensor] == name for tensor in held)
        assert (folder / name).stat().st_size < 5 << 20 or len(held) == 1
    assert "visual.merger.mlp.0.weight" in index["weight_map"] and "model.embed_tokens.weight" in index["weight_map"]


@pytest.mark.parametrize("name, tied", [("qwen2.5-vl-7b", False), ("qwen3-vl-2b", True)])
def test_random_checkpoints_can_be_exported(written, tmp_path, name, tied):
    manifest = export_policy(written / name, tmp_path / "policy", context=4096)
    assert manifest.parity["passed"] and manifest.parity["graphs"]["greedy_differ"] == 0
    assert manifest.text.tied is tied


def test_the_tokenizer_has_the_true_ids(written):
    tokenizer = Checkpoint.open(written / "qwen2.5-vl-7b").tokenizer
    assert {name: tokenizer.token_to_id(name) for name in SPECIAL} == SPECIAL
    assert tokenizer.get_vocab_size() == 1 + max(SPECIAL.values())
    text = "Which building is this? <answer>the tower</answer>\n"
    first, *others = tokenizer.encode(f"<|im_start|>{text}Größe 日本").ids
    assert first == SPECIAL["<|im_start|>"] and tokenizer.decode(others) == f"{text}Größe 日本"
    assert len(tokenizer.encode(text).ids) < 0.5 * len(text)


def test_a_seed_fixes_the_weights(written, tmp_path):
    write_random_checkpoint(shrunk("qwen3-vl-2b"), tmp_path / "again", shard_bytes=4 << 20)
    for path in sorted((written / "qwen3-vl-2b").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_an_incomplete_checkpoint_is_deleted(tmp_path):
    def broken(items):
        yield next(iter(items))
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        write_random_checkpoint(shrunk("qwen3-vl-2b"), tmp_path / "out", progress=broken)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 10**6))
    with pytest.raises(CheckpointError, match=r"0\.0 GB free, the checkpoint takes about 16\.6 GB"):
        write_random_checkpoint(shape_of("qwen2.5-vl-7b"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
