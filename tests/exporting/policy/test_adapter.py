import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_adapters import ALPHA, RANK, merged_by_peft, peft_model, write_peft_adapter

from gog_edge.errors import CheckpointError
from gog_edge.exporting.policy import merging
from gog_edge.exporting.policy.adapter import Adapter
from gog_edge.exporting.policy.checkpoint import Checkpoint
from gog_edge.exporting.policy.export import export_policy
from gog_edge.exporting.policy.parity import measure_parity
from gog_edge.exporting.policy.reference import Reference
from gog_edge.exporting.policy.weights import StoredTensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# Settings of LoraConfig, and whether the head of a tied base model is still tied afterwards.
KINDS = {
    "plain": ({}, True),
    "rslora": ({"use_rslora": True}, True),
    "dora": ({"use_dora": True}, True),
    "pissa": ({"init_lora_weights": "pissa"}, True),
    "pissa and dora": ({"init_lora_weights": "pissa", "use_dora": True}, True),
    "olora": ({"init_lora_weights": "olora"}, True),
    "gaussian": ({"init_lora_weights": "gaussian"}, True),
    "mica": ({"init_lora_weights": "mica"}, True),
    "full names": ({"alpha_pattern": {"model.language_model.layers.0.self_attn.q_proj": 32}}, True),
    "anchored": ({"alpha_pattern": {r"^model\.language_model\.layers\.1\..*": 24},
                  "rank_pattern": {r"^model\.language_model\.layers\.0\.mlp\.down_proj": 2}}, True),
    "tower": ({"target_modules": ["attn.qkv", "attn.proj"],
               "alpha_pattern": {"model.visual.blocks.0.attn.qkv": 24}}, True),
    "ends of names": ({"alpha_pattern": {"down_proj": 24}, "rank_pattern": {"layers.1.self_attn.q_proj": 2}}, True),
    "all linear": ({"target_modules": "all-linear"}, True),
    "regular expression": ({"target_modules": r"^model\.language_model.*\.(q_proj|k_proj)$"}, True),
    "one layer": ({"layers_to_transform": [1]}, True),
    "merger": ({"modules_to_save": ["merger"]}, True),
    "saved head": ({"modules_to_save": ["lm_head"]}, False),
    "saved embeddings": ({"modules_to_save": ["embed_tokens"]}, False),
    "saved both": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, False),
    "embeddings, tied": ({"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, True),
    "saved embeddings, tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "head": ({"target_modules": ["lm_head", "q_proj"]}, False),
    "tokens": ({"trainable_token_indices": [3, 5, 9]}, True),
    "convolution": ({"target_modules": ["patch_embed.proj", "q_proj"]}, True),
    "convolution and dora": ({"target_modules": ["patch_embed.proj"], "use_dora": True}, True),
    "all biases": ({"bias": "all", "target_modules": ["q_proj", "attn.qkv"]}, True),
    "biases of its modules": ({"bias": "lora_only", "target_modules": ["q_proj", "attn.qkv"]}, True),
    "bias of the factors": ({"lora_bias": True, "target_modules": ["attn.qkv"]}, True),
    "transposed": ({"fan_in_fan_out": True}, True),
}


def assert_merged(base, adapter, expected):
    """Compare every tensor with PEFT's merge; return the checkpoint."""
    checkpoint = Checkpoint.open(base, adapter)
    tied = checkpoint.text.tied
    for name in checkpoint.model.tensor_shapes(tied=tied):
        assert np.abs(checkpoint.tensor(name) - expected[name]).max() < 1e-6, name
    if tied:
        assert np.array_equal(expected["lm_head.weight"], expected["language_model.embed_tokens.weight"])
    return checkpoint


def changed_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.fixture(scope="module")
def plain(checkpoints, tmp_path_factory):
    """A plain adapter of the Qwen2.5-VL checkpoint with a tied head; read-only."""
    return write_peft_adapter(tmp_path_factory.mktemp("adapter") / "plain", checkpoints[True])


# --- against PEFT --------------------------------------------------------------------------------


QWEN3_KINDS = ("plain", "dora", "pissa", "olora", "anchored", "tower", "all linear", "merger", "head", "all biases")


@pytest.mark.parametrize("kind, qwen3", [*((kind, False) for kind in KINDS), *((kind, True) for kind in QWEN3_KINDS)])
def test_merged_weights_are_those_of_peft(checkpoints, qwen3_checkpoints, tmp_path, kind, qwen3):
    base, (settings, stays_tied) = (qwen3_checkpoints if qwen3 else checkpoints)[True], KINDS[kind]
    adapter = write_peft_adapter(tmp_path / "adapter", base, **settings)
    expected = merged_by_peft(base, adapter)
    unchanged = Checkpoint.open(base)
    assert any(np.abs(unchanged.tensor(name) - expected[name]).max() > 0.05 for name in unchanged.weights.tensors)
    checkpoint = assert_merged(base, adapter, expected)
    assert checkpoint.text.tied is stays_tied and checkpoint.notes == ()


@pytest.mark.parametrize("kind, tied", [
    *((kind, True) for kind in ("anchored", "dora", "pissa", "olora", "embeddings", "head", "saved embeddings",
                                "tokens", "convolution", "all biases", "merger")),
    *((kind, False) for kind in ("pissa", "head", "tokens")),
])  # fmt: skip
def test_exported_graphs_agree_with_the_unmerged_model(checkpoints, tmp_path, kind, tied):
    adapter = write_peft_adapter(tmp_path / "adapter", checkpoints[tied], **KINDS[kind][0])
    manifest = export_policy(checkpoints[tied], tmp_path / "out", adapter=adapter, context=512)
    assert manifest.parity["passed"] and manifest.parity["graphs"]["logits_max_abs"] < 5e-4
    assert manifest.parity["adapter"] is None  # nothing was merged in the reference
    assert manifest.text.tied is (tied and KINDS[kind][1])
    assert not measure_parity(tmp_path / "out", Checkpoint.open(checkpoints[tied])).passed  # without the adapter
    assert manifest.source_sha256 != Checkpoint.open(checkpoints[tied]).sha256


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_rounded_graphs_agree_with_peft(qwen3_checkpoints, tmp_path, precision):
    adapter = write_peft_adapter(tmp_path / "adapter", qwen3_checkpoints[True], target_modules=["lm_head", "qkv"])
    manifest = export_policy(
        qwen3_checkpoints[True], tmp_path / "out", adapter=adapter, precision=precision, block=32, context=512
    )
    assert manifest.parity["passed"] and 0 < manifest.parity["adapter"] < 1e-3
    other = write_peft_adapter(tmp_path / "other", qwen3_checkpoints[True], target_modules=["lm_head", "qkv"], seed=1)
    assert not measure_parity(tmp_path / "out", Checkpoint.open(qwen3_checkpoints[True], other)).passed


def test_the_reference_is_the_unmerged_model(checkpoints, policies, tmp_path):
    from gog_edge.policy.manifest import read_manifest

    adapter = write_peft_adapter(tmp_path / "adapter", checkpoints[True], target_modules=["lm_head", "q_proj"])
    reference = Reference(Checkpoint.open(checkpoints[True], adapter), read_manifest(policies[True]))
    tokens = list(range(20, 60))
    import torch

    expected = peft_model(checkpoints[True], adapter)(input_ids=torch.tensor([tokens])).logits[0].detach().numpy()
    unmerged = reference.logits(tokens, [])
    assert np.abs(unmerged - expected).max() < 1e-5
    reference.merge_adapter()
    assert np.abs(reference.logits(tokens, []) - unmerged).max() < 1e-3


@pytest.mark.parametrize("fault", ["alpha", "init", "head"])
def test_a_wrong_merge_fails_the_parity_check(checkpoints, tmp_path, monkeypatch, fault):
    settings = {"alpha": KINDS["full names"][0], "init": KINDS["pissa"][0], "head": KINDS["head"][0]}[fault]
    adapter = write_peft_adapter(tmp_path / "adapter", checkpoints[True], **settings)
    right = merging.Merger._config_for

    def wrong(self, module):
        config = right(self, module)
        config.alpha_pattern = {}
        config.init_lora_weights = True
        return config

    monkeypatch.setattr(merging.Merger, "_config_for", wrong)
    if fault == "head":  # merged into the weight that head and embeddings share
        monkeypatch.setattr(merging.Merger, "is_tied", True)
    with pytest.raises(CheckpointError, match="differ from transformers by more than fp32 allows"):
        export_policy(checkpoints[True], tmp_path / "out", adapter=adapter, context=512)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_adapters_that_peft_converted_to_plain_lora(checkpoints, tmp_path, init):
    base = checkpoints[False]
    adapter = write_peft_adapter(tmp_path / "adapter", base, init_lora_weights=init, convert=tmp_path / "initial")
    assert json.loads((adapter / CONFIG).read_text())["init_lora_weights"] is True
    assert_merged(base, adapter, merged_by_peft(base, adapter))


def test_the_memory_holds_one_module(checkpoints, tmp_path, monkeypatch):
    adapter = write_peft_adapter(tmp_path / "adapter", checkpoints[True])
    checkpoint, read = Checkpoint.open(checkpoints[True], adapter), []
    read_tensor = StoredTensor.read
    monkeypatch.setattr(StoredTensor, "read", lambda self: read.append(self.name) or read_tensor(self))
    checkpoint.tensor("language_model.layers.1.mlp.down_proj.weight")
    module = "base_model.model.model.language_model.layers.1.mlp.down_proj"
    assert read == ["model.layers.1.mlp.down_proj.weight", f"{module}.lora_A.weight", f"{module}.lora_B.weight"]
    checkpoint.tensor("language_model.norm.weight")
    assert read[3:] == ["model.norm.weight"]


# --- other layouts of names ----------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["transformers 4.49", "language_model.model", "ddp", "adapter name", "no prefix"])
def test_names_of_other_layouts(checkpoints, tmp_path, layout):
    base, new = checkpoints[False], "model.language_model."
    adapter = write_peft_adapter(
        tmp_path / "adapter", base, target_modules=r"^model\.(language_model|visual).*\.(q_proj|qkv|down_proj)$",
        alpha_pattern={r"^model\.language_model\.layers\.0\..*": 20, "model.visual.blocks.1.attn.qkv": 9},
        rank_pattern={"model.language_model.layers.1.mlp.down_proj": 2}, modules_to_save=["lm_head", "merger"],
    )  # fmt: skip
    expected = merged_by_peft(base, adapter)
    rename = {
        "transformers 4.49": lambda name: name.replace(new, "model.").replace("model.visual.", "visual."),
        "language_model.model": lambda name: name.replace(new, "language_model.model.").replace(
            "model.visual.", "visual."),
        "ddp": lambda name: f"module.{name}",
        "adapter name": lambda name: re.sub(r"(lora_[AB])\.", r"\1.default.", name),
        "no prefix": lambda name: name.removeprefix("base_model.model."),
    }[layout]
    tensors = load_file(adapter / WEIGHTS)
    save_file({rename(name): array for name, array in tensors.items()}, adapter / WEIGHTS)
    if layout in ("transformers 4.49", "language_model.model"):  # the settings name the modules of their time, too
        text = "model." if layout == "transformers 4.49" else "language_model.model."
        changed_config(
            adapter, target_modules=rf"^{re.escape(text)}.*\.(q_proj|down_proj)$|^visual.*qkv$",
            alpha_pattern={rf"^{re.escape(text)}layers\.0\..*": 20, "visual.blocks.1.attn.qkv": 9},
            rank_pattern={f"{text}layers.1.mlp.down_proj": 2}, modules_to_save=["lm_head", "visual.merger"],
        )  # fmt: skip
    assert_merged(base, adapter, expected)
    assert export_policy(base, tmp_path / "out", adapter=adapter, context=512).parity["passed"]


def test_an_adapter_without_target_modules_changes_the_modules_of_its_tensors(checkpoints, plain, tmp_path):
    adapter = changed_config(shutil.copytree(plain, tmp_path / "adapter"), target_modules=None)
    assert_merged(checkpoints[True], adapter, merged_by_peft(checkpoints[True], plain))


def test_biases_as_old_releases_of_peft_name_them(checkpoints, tmp_path):
    adapter = write_peft_adapter(tmp_path / "adapter", checkpoints[True], bias="lora_only", target_modules=["q_proj"])
    expected = merged_by_peft(checkpoints[True], adapter)
    tensors = load_file(adapter / WEIGHTS)
    assert any(".base_layer.bias" in name for name in tensors)
    save_file({name.replace(".base_layer", ""): array for name, array in tensors.items()}, adapter / WEIGHTS)
    assert_merged(checkpoints[True], adapter, expected)


def test_patterns_that_match_nothing_are_told(checkpoints, plain, tmp_path):
    adapter = changed_config(shutil.copytree(plain, tmp_path / "adapter"), alpha_pattern={"^model.layers.0.q_proj": 64})
    notes = []
    export_policy(checkpoints[True], tmp_path / "out", adapter=adapter, parity=False, notice=notes.append)
    assert notes == ["alpha_pattern '^model.layers.0.q_proj' of the adapter matches no module, as in its training"]


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, message", [
    ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
    ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
    ({"peft_type": None}, "peft_type = None"),
    ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16.*path_initial_model_for_weight_conversion"),
    ({"init_lora_weights": "corda"}, "corda"),
    ({"init_lora_weights": "loftq"}, "loftq"),
    ({"init_lora_weights": "lora_ga"}, "lora_ga"),
    ({"init_lora_weights": "wavelets"}, "wavelets"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    ({"target_parameters": ["q_proj.weight"]}, "target_parameters"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ({"use_qalora": True}, "use_qalora"),
    ({"kasa_config": {"beta": 1e-4, "gamma": 1e-3}}, "kasa_config"),
    ({"use_hyper_lora": True}, "use_hyper_lora.*does not know"),
    ({"lora_alpha": None, "alpha_pattern": {"q_proj": "big"}}, "alpha_pattern must be an object of positive numbers"),
    ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern must be an object of positive integers"),
    ({"alpha_pattern": ["q_proj"]}, "alpha_pattern must be an object"),
    ({"alpha_pattern": {"(": 2}}, "alpha_pattern has '\\(', which is no regular expression"),
    ({"target_modules": "*"}, "target_modules has '\\*', which is no regular expression"),
    ({"target_modules": [1]}, "target_modules must be a list of names"),
    ({"r": "8"}, "r must be a positive number, got '8'"),
    ({"r": 0}, "r must be a positive number, got 0"),
    ({"lora_alpha": 10**30}, "lora_alpha must be a positive number"),
    ({"bias": "some"}, "bias must be none, all or lora_only"),
    ({"use_dora": "yes"}, "use_dora must be true or false"),
    ({"trainable_token_indices": {"embed_tokens": [-1]}}, "trainable_token_indices must be a list of token ids"),
    ({"layers_to_transform": "1"}, "layers_to_transform must be a list of integers"),
])  # fmt: skip
def test_settings_that_cannot_be_merged_are_refused_by_name(plain, tmp_path, changes, message):
    adapter = changed_config(shutil.copytree(plain, tmp_path / "adapter"), **changes)
    with pytest.raises(CheckpointError, match=message):
        Adapter.open(adapter)


def test_settings_of_other_trainers_are_of_no_effect(checkpoints, plain, tmp_path):
    adapter = changed_config(shutil.copytree(plain, tmp_path / "adapter"), lora_dtype="bf16", lorap_lr_ratio=16.0,
                             loraplus_unknown=None)  # fmt: skip
    assert_merged(checkpoints[True], adapter, merged_by_peft(checkpoints[True], plain))


def test_an_adapter_of_another_model_is_refused(checkpoints, plain, tmp_path):
    with pytest.raises(CheckpointError, match="give the base model that the adapter was trained from"):
        export_policy(checkpoints[False], tmp_path / "out", adapter=plain, context=512)
    adapter = shutil.copytree(plain, tmp_path / "adapter")
    moved = {name.replace("layers.0", "layers.77"): array for name, array in load_file(plain / WEIGHTS).items()}
    save_file(moved, adapter / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"layers\.77.*which the base model does not have"):
        export_policy(checkpoints[True], tmp_path / "out", adapter=adapter, context=512)
    save_file({"base_model.model.transformer.h.0.attn.lora_A.weight": np.ones((2, 2), np.float32)}, adapter / WEIGHTS)
    with pytest.raises(CheckpointError, match="not a module of Qwen2.5-VL or Qwen3-VL"):
        Adapter.open(adapter)
    assert not (tmp_path / "out").exists()


def test_incomplete_adapters_are_refused(checkpoints, plain, tmp_path):
    adapter = shutil.copytree(plain, tmp_path / "adapter")
    path, tensors = adapter / WEIGHTS, load_file(plain / WEIGHTS)
    save_file({name: array for name, array in tensors.items() if "lora_A" in name}, path)
    with pytest.raises(CheckpointError, match="has no lora_B for "):
        Checkpoint.open(checkpoints[True], adapter)
    save_file({name: array for name, array in tensors.items() if "layers.1" not in name}, path)
    with pytest.raises(CheckpointError, match=r"has no lora_A for model\.language_model\.layers\.1"):
        Checkpoint.open(checkpoints[True], adapter)
    save_file({name: array[:2] for name, array in tensors.items()}, path)
    with pytest.raises(CheckpointError, match="size mismatch"):
        Checkpoint.open(checkpoints[True], adapter)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="copy it again"):
        Adapter.open(adapter)
    path.unlink()
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(CheckpointError, match="does not exist; save the adapter as safetensors"):
        Adapter.open(adapter)
    (adapter / CONFIG).unlink()
    with pytest.raises(CheckpointError, match="adapter_config.json' does not exist"):
        Adapter.open(adapter)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_name(checkpoints, plain, tmp_path, value):
    adapter = shutil.copytree(plain, tmp_path / "adapter")
    tensors = load_file(plain / WEIGHTS)
    name = next(name for name in tensors if "layers.1.mlp.down_proj.lora_B" in name)
    tensors[name][3, 1] = value
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}' has 1 of .* NaN or infinite"):
        export_policy(checkpoints[True], tmp_path / "out", adapter=adapter, parity=False)


def test_a_product_that_overflows_is_refused_by_name(checkpoints, plain, tmp_path):
    adapter = shutil.copytree(plain, tmp_path / "adapter")
    tensors = {name: np.full_like(array, 1e30) for name, array in load_file(plain / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"merged into .*'visual\.blocks\.0\.mlp\.down_proj\.weight'"):
        export_policy(checkpoints[True], tmp_path / "out", adapter=adapter, parity=False)


def test_tokens_beyond_the_vocabulary_are_refused(checkpoints, tmp_path):
    adapter = write_peft_adapter(tmp_path / "adapter", checkpoints[True], trainable_token_indices=[3, 5])
    changed_config(adapter, trainable_token_indices=[3, 5000])
    with pytest.raises(CheckpointError, match="5000"):
        Checkpoint.open(checkpoints[True], adapter)


def test_ranks_and_scales_of_a_written_adapter(plain):
    adapter = Adapter.open(plain)
    assert (adapter.config.r, adapter.config.lora_alpha) == (RANK, ALPHA) and adapter.is_standard
    assert adapter.files == (plain / CONFIG, plain / WEIGHTS)
