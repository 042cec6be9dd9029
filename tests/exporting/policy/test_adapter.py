import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gog_edge.errors import CheckpointError
from gog_edge.exporting.policy.adapter import Adapter
from gog_edge.exporting.policy.checkpoint import Checkpoint
from gog_edge.exporting.policy.export import export_policy
from gog_edge.exporting.policy.parity import measure_parity

RANK, ALPHA = 4, 6
TARGETS = ("language_model.layers.0.self_attn.q_proj", "language_model.layers.1.mlp.down_proj",
           "visual.blocks.0.attn.qkv")


def find_tensor(tensors, target):
    return next(name for name in tensors if name.endswith(f"{target.removeprefix('language_model.')}.weight"))


def write_adapter(folder, base, seed=0, **config):
    """Write a PEFT folder for three modules of a checkpoint; return the tensors of the merged model."""
    random = np.random.default_rng(seed)
    tensors = load_file(base / "model.safetensors")
    adapter, merged = {}, dict(tensors)
    for target in TARGETS:
        name = find_tensor(tensors, target)
        rows, columns = tensors[name].shape
        lora_a, lora_b = (random.normal(0, 0.3, shape).astype(np.float32) for shape in ((RANK, columns), (rows, RANK)))
        adapter |= {f"base_model.model.model.{target}.lora_{part}.weight": array
                    for part, array in (("A", lora_a), ("B", lora_b))}
        merged[name] = tensors[name] + ALPHA / (RANK**0.5 if config.get("use_rslora") else RANK) * lora_b @ lora_a
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "use_dora": False} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(adapter, folder / "adapter_model.safetensors")
    return merged


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_merged_adapter_agrees_with_the_merged_checkpoint(checkpoints, tmp_path, use_rslora):
    merged = write_adapter(tmp_path / "lora", checkpoints[True], use_rslora=use_rslora)
    shutil.copytree(checkpoints[True], tmp_path / "merged")
    save_file(merged, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    manifest = export_policy(checkpoints[True], tmp_path / "out", adapter=tmp_path / "lora", context=512)
    assert manifest.parity["passed"]
    assert measure_parity(tmp_path / "out", Checkpoint.open(tmp_path / "merged")).passed
    assert not measure_parity(tmp_path / "out", Checkpoint.open(checkpoints[True])).passed
    assert manifest.source_sha256 != Checkpoint.open(checkpoints[True]).sha256


def test_an_adapter_of_another_model_is_refused(checkpoints, tmp_path):
    write_adapter(tmp_path / "lora", checkpoints[True])
    with pytest.raises(CheckpointError, match="give the base model that the adapter was trained from"):
        export_policy(checkpoints[False], tmp_path / "out", adapter=tmp_path / "lora", context=512)
    path = tmp_path / "lora" / "adapter_model.safetensors"
    moved = {name.replace("layers.0", "layers.77"): array for name, array in load_file(path).items()}
    save_file(moved, path)
    with pytest.raises(CheckpointError, match=r"layers\.77.*which the base model does not have"):
        export_policy(checkpoints[True], tmp_path / "out", adapter=tmp_path / "lora", context=512)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [{"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"}])
def test_settings_that_cannot_be_merged_are_refused_by_name(checkpoints, tmp_path, config):
    write_adapter(tmp_path / "lora", checkpoints[True], **config)
    with pytest.raises(CheckpointError, match=next(iter(config))):
        Adapter.open(tmp_path / "lora")


def test_incomplete_adapters_are_refused(checkpoints, tmp_path):
    write_adapter(tmp_path / "lora", checkpoints[True])
    path = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({name: array for name, array in load_file(path).items() if "lora_A" in name}, path)
    with pytest.raises(CheckpointError, match="has no lora_B for "):
        export_policy(checkpoints[True], tmp_path / "out", adapter=tmp_path / "lora", context=512)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="copy it again"):
        Adapter.open(tmp_path / "lora")
    path.unlink()
    with pytest.raises(CheckpointError, match="does not exist; save the adapter as safetensors"):
        Adapter.open(tmp_path / "lora")


def test_ranks_and_scales_of_single_modules(tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "alpha_pattern": {"layers.1.mlp.down_proj": 8}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    names = [f"base_model.model.model.language_model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
    save_file({f"{name}.lora_{part}.weight": np.ones((2, 2), np.float32) for name in names for part in "AB"},
              folder / "adapter_model.safetensors")
    adapter, zeros = Adapter.open(folder), np.zeros((2, 2), np.float32)
    merged = [adapter.merge(f"language_model.layers.{layer}.mlp.down_proj.weight", zeros)[0, 0] for layer in (0, 1)]
    assert merged == [4 / 2 * 2, 8 / 2 * 2]
