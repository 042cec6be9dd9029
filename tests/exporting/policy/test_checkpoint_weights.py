"""Which tensors of a checkpoint folder are used, under which names, and which folders are refused."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from typer.testing import CliRunner

from gog_edge.cli import app
from gog_edge.errors import CheckpointError
from gog_edge.exporting.policy.checkpoint import Checkpoint
from gog_edge.exporting.policy.export import export_policy
from gog_edge.exporting.policy.weights import INDEX, SINGLE, model_name

NORM, UP = "language_model.norm.weight", "language_model.layers.1.mlp.up_proj.weight"


def rewritten(checkpoint, folder, rename=lambda name: name, change=None):
    """Copy a checkpoint with its tensors renamed and changed."""
    shutil.copytree(checkpoint, folder)
    tensors = {rename(name): array for name, array in load_file(folder / SINGLE).items()}
    save_file({**tensors, **(change(tensors) if change else {})}, folder / SINGLE, metadata={"format": "pt"})
    return folder


def sharded(checkpoint, folder, parts=2):
    """Copy a checkpoint in several files with an index; return the folder and the index."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    weight_map = {}
    for number in range(parts):
        file = f"model-{number + 1:05d}-of-{parts:05d}.safetensors"
        names = sorted(tensors)[number::parts]
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    write_index(folder, weight_map)
    return folder, weight_map


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_equal(folder, checkpoint):
    """Assert that two folders have the same weights; return the opened first one."""
    one, other = Checkpoint.open(folder), Checkpoint.open(checkpoint)
    assert one.weights.tensors.keys() == other.weights.tensors.keys()
    assert all(np.array_equal(one.tensor(name), other.tensor(name)) for name in other.weights.tensors)
    return one


# --- names ---------------------------------------------------------------------------------------


RENAMES = {  # from what the fixtures have: "model.layers" and "visual" (Qwen2.5-VL), "model.language_model" (Qwen3-VL)
    "transformers 4.52": lambda name: re.sub(r"^visual", "model.visual", re.sub(
        r"^model\.(?=layers|embed|norm)", "model.language_model.", name)),
    "transformers 4.49": lambda name: name.replace("model.language_model.", "model.").replace("model.visual", "visual"),
    "language_model.model": lambda name: re.sub(
        r"^model\.(language_model\.)?(?=layers|embed|norm)", "language_model.model.", name).replace(
        "lm_head", "language_model.lm_head").replace("model.visual", "visual"),
    "bare": lambda name: re.sub(r"^model\.(language_model\.)?", "", name),
    "without a head": lambda name: re.sub(r"^model\.(language_model\.)?(?=layers|embed|norm)", "language_model.", name),
    "peft": lambda name: f"base_model.model.{name}",
    "ddp": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "ddp and peft": lambda name: f"module.base_model.model.{name}",
}  # fmt: skip


@pytest.mark.parametrize("layout", RENAMES)
@pytest.mark.parametrize("qwen3", [False, True], ids=["qwen2.5", "qwen3"])
def test_names_of_every_layout(checkpoints, qwen3_checkpoints, tmp_path, layout, qwen3):
    base = (qwen3_checkpoints if qwen3 else checkpoints)[False]
    folder = rewritten(base, tmp_path / "other", RENAMES[layout])
    assert_equal(folder, base)
    if layout in ("bare", "ddp and peft"):
        assert export_policy(folder, tmp_path / "out", context=512).parity["passed"]


@pytest.mark.parametrize("stored, name", [
    ("model.language_model.layers.3.mlp.up_proj.weight", "language_model.layers.3.mlp.up_proj.weight"),
    ("base_model.model.model.layers.3.mlp.up_proj.weight", "language_model.layers.3.mlp.up_proj.weight"),
    ("model.visual.blocks.1.norm1.weight", "visual.blocks.1.norm1.weight"), ("lm_head.weight", "lm_head.weight"),
    ("embed_tokens.weight", "language_model.embed_tokens.weight"), ("v_head.summary.weight", None),
    ("model.layersX.weight", None), ("", None),
])  # fmt: skip
def test_names_within_the_model(stored, name):
    assert model_name(stored) == name


def test_the_same_weight_under_two_names_is_refused(checkpoints, tmp_path):
    def twice(tensors):
        return {"language_model.model.norm.weight": tensors["model.norm.weight"]}

    folder = rewritten(checkpoints[True], tmp_path / "twice", change=twice)
    with pytest.raises(CheckpointError, match="the same weight twice, as .*norm.weight.* and as .*norm.weight"):
        Checkpoint.open(folder)


def test_tensors_of_other_parts_are_ignored_and_told(checkpoints, tmp_path):
    folder = rewritten(checkpoints[True], tmp_path / "more", change=lambda _: {"v_head.weight": np.ones(3, np.float32)})
    checkpoint = assert_equal(folder, checkpoints[True])
    assert checkpoint.notes == ("ignored 1 tensor of no known part of the model: v_head.weight",)


# --- files ---------------------------------------------------------------------------------------


def test_leftovers_beside_an_index_are_ignored_and_told(checkpoints, tmp_path):
    folder, _ = sharded(checkpoints[False], tmp_path / "sharded")
    wrong = {name: array + 1 for name, array in load_file(checkpoints[False] / SINGLE).items()}
    for file in (SINGLE, "model-00001-of-00003.safetensors", "zz.safetensors"):
        save_file(wrong, folder / file)
    notes = []
    manifest = export_policy(folder, tmp_path / "out", context=512, notice=notes.append)
    assert manifest.parity["passed"]
    assert notes == ["ignored 3 files beside those of the checkpoint: "
                     "model-00001-of-00003.safetensors, model.safetensors, zz.safetensors"]  # fmt: skip
    assert_equal(folder, checkpoints[False])


def test_files_beside_model_safetensors_are_ignored_and_told(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints[True], tmp_path / "copy")
    save_file({"model.norm.weight": np.zeros(96, np.float32)}, folder / "consolidated.safetensors")
    assert assert_equal(folder, checkpoints[True]).notes == (
        "ignored 1 file beside those of the checkpoint: consolidated.safetensors",
    )


def test_an_adapter_beside_the_weights_is_told(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints[True], tmp_path / "copy")
    save_file({"base_model.model.lm_head.lora_A.weight": np.ones((2, 2), np.float32)},
              folder / "adapter_model.safetensors")  # fmt: skip
    assert assert_equal(folder, checkpoints[True]).notes == (
        "adapter_model.safetensors in this folder is not merged; give the folder with --adapter to merge it",
    )


def test_a_tensor_that_the_index_does_not_list_is_ignored_and_told(checkpoints, tmp_path):
    folder, weight_map = sharded(checkpoints[False], tmp_path / "sharded")
    file = weight_map["model.norm.weight"]
    other = next(one for one in weight_map.values() if one != file)
    save_file(load_file(folder / other) | {"model.norm.weight": np.zeros(64, np.float32)}, folder / other)
    assert assert_equal(folder, checkpoints[False]).notes == (
        f"ignored 1 tensor missing from {INDEX}: model.norm.weight",
    )


def test_shards_without_an_index_must_be_complete_and_disjoint(checkpoints, tmp_path):
    folder, weight_map = sharded(checkpoints[False], tmp_path / "sharded")
    (folder / INDEX).unlink()
    assert_equal(folder, checkpoints[False])
    second = folder / "model-00002-of-00002.safetensors"
    save_file(load_file(second) | load_file(folder / "model-00001-of-00002.safetensors"), second)
    with pytest.raises(CheckpointError, match="in both model-00001-of-00002.safetensors and model-00002-of-00002"):
        Checkpoint.open(folder)
    second.unlink()
    with pytest.raises(CheckpointError, match="it has model-00001-of-00002.safetensors, but not model-00002-of-00002"):
        Checkpoint.open(folder)


def test_an_index_that_disagrees_with_its_files_is_refused(checkpoints, tmp_path):
    folder, weight_map = sharded(checkpoints[False], tmp_path / "sharded")
    norm, files = weight_map["model.norm.weight"], sorted(set(weight_map.values()))
    other = files[1 - files.index(norm)]
    write_index(folder, weight_map | {"model.norm.weight": other})
    with pytest.raises(CheckpointError, match=f"places 'model.norm.weight' in {other}, but it is in {norm}"):
        Checkpoint.open(folder)
    write_index(folder, weight_map | {"model.extra.weight": other})
    with pytest.raises(CheckpointError, match=r"'model.extra.weight' in .*that file does not contain it"):
        Checkpoint.open(folder)
    write_index(folder, {name: file for name, file in weight_map.items() if name != "model.norm.weight"})
    with pytest.raises(CheckpointError, match=f"has no tensor '{NORM}'"):
        Checkpoint.open(folder)
    write_index(folder, weight_map)
    (folder / files[1]).unlink()
    with pytest.raises(CheckpointError, match=f"incomplete.*{files[1]}; copy these files too"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("file", ["/etc/model.safetensors", "../model.safetensors", "a/../../model.safetensors", "",
                                  "model.bin", "..", 7, None, "c:model.safetensors", "a\\model.safetensors"])
def test_an_index_names_files_of_its_folder(checkpoints, tmp_path, file):
    folder, weight_map = sharded(checkpoints[False], tmp_path / "sharded")
    write_index(folder, weight_map | {"model.norm.weight": file})
    with pytest.raises(CheckpointError, match="it must be the name of a .safetensors file in the same folder"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", "{", '{"a": 1e999}'])
def test_a_damaged_index_is_refused(checkpoints, tmp_path, content):
    folder, _ = sharded(checkpoints[False], tmp_path / "sharded")
    (folder / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX):
        Checkpoint.open(folder)


@pytest.mark.parametrize("damage", ["truncated", "header length", "overlap", "json", "directory", "empty"])
def test_damaged_files_are_refused(checkpoints, tmp_path, damage):
    folder = shutil.copytree(checkpoints[True], tmp_path / "copy")
    path = folder / SINGLE
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if damage == "overlap":
        first, second = list(header)[1:3]
        header[second]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header).encode()
    path.unlink()
    if damage == "directory":
        path.mkdir()
    else:
        path.write_bytes({
            "truncated": data[: len(data) // 2], "header length": (2**40).to_bytes(8, "little") + data[8:],
            "overlap": len(text).to_bytes(8, "little") + text + data[8 + size :],
            "json": data[:8] + b"!" * size + data[8 + size :], "empty": b"",
        }[damage])  # fmt: skip
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors' as safetensors.*copy it again"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("file, message", [
    ("pytorch_model.bin", "pytorch_model.bin may contain code, which is never run.*safe_serialization=True"),
    ("adapter_config.json", "it is a PEFT adapter: give the base model as CHECKPOINT, and this folder with --adapter"),
    ("notes.txt", "has no .safetensors file; save the checkpoint in that format"),
])  # fmt: skip
def test_a_folder_without_safetensors_is_refused_with_advice(checkpoints, tmp_path, file, message):
    folder = shutil.copytree(checkpoints[True], tmp_path / "copy")
    (folder / SINGLE).unlink()
    if file == "adapter_config.json":
        (folder / "config.json").unlink()
    (folder / file).write_bytes(b"\x80\x04cposix\nsystem\n")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


@pytest.mark.parametrize("suffix, method", [
    ("qweight", "GPTQ or AWQ"), ("weight.absmax", "bitsandbytes"), ("SCB", "bitsandbytes"),
    ("weight_scale_inv", "FP8"), ("weight_packed", "compressed-tensors"),
])  # fmt: skip
def test_quantized_weights_are_refused_by_name(checkpoints, tmp_path, suffix, method):
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    folder = rewritten(checkpoints[True], tmp_path / "q", change=lambda _: {name: np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match=rf"already quantized \({method}: '{re.escape(name)}'\)"):
        Checkpoint.open(folder)


def test_fp8_weights_are_refused_by_name(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints[True], tmp_path / "fp8")
    tensors = {name: torch.from_numpy(array) for name, array in load_file(folder / SINGLE).items()}
    name = "model.layers.0.mlp.up_proj.weight"
    save_torch(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"already quantized \(FP8"):
        Checkpoint.open(folder)


def test_an_adapter_that_was_not_merged_is_refused(checkpoints, tmp_path):
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    folder = rewritten(checkpoints[True], tmp_path / "u", change=lambda _: {name: np.ones((2, 96), np.float32)})
    with pytest.raises(CheckpointError, match=r"an adapter that was not merged .*lora_A.*merge_and_unload"):
        Checkpoint.open(folder)


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_floating_point_type_is_read(checkpoints, tmp_path, dtype):
    folder = shutil.copytree(checkpoints[False], tmp_path / "copy")
    tensors = {name: torch.from_numpy(array).to(dtype) for name, array in load_file(folder / SINGLE).items()}
    save_torch(tensors, folder / SINGLE, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    assert np.array_equal(checkpoint.tensor(UP), tensors["model.layers.1.mlp.up_proj.weight"].float().numpy())
    assert export_policy(folder, tmp_path / "out", context=512).parity["passed"]


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "visual.merger.mlp.2.bias", "model.norm.weight",
                                  "model.embed_tokens.weight"])  # fmt: skip
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_value_that_is_not_finite_is_refused_by_name(checkpoints, tmp_path, name, value):
    def damaged(tensors):
        array = tensors[name].copy()
        array.reshape(-1)[-1] = value
        return {name: array}

    folder = rewritten(checkpoints[True], tmp_path / "nan", change=damaged)
    with pytest.raises(CheckpointError, match=rf"'{re.escape(name)}' has 1 of \d+ values that are NaN or infinite"):
        export_policy(folder, tmp_path / "out", parity=False)
    assert not (tmp_path / "out").exists()


def test_values_beyond_the_range_of_a_type_are_refused_by_name(checkpoints, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = rewritten(checkpoints[True], tmp_path / "large", change=lambda old: {name: old[name] * 0 + 70_000})
    with pytest.raises(CheckpointError, match=r"'layers.1.mlp.up_proj.weight' has values up to 7e\+04, which fp16"):
        export_policy(folder, tmp_path / "out", precision="fp16", parity=False)
    table = rewritten(checkpoints[True], tmp_path / "table", change=lambda old: {
        "model.embed_tokens.weight": old["model.embed_tokens.weight"] - 1e6})  # fmt: skip
    with pytest.raises(CheckpointError, match=r"'embed_tokens.weight' has values up to 1e\+06, which fp16 stores"):
        export_policy(table, tmp_path / "out", precision="fp16", parity=False)
    double = rewritten(checkpoints[True], tmp_path / "double", change=lambda old: {
        name: old[name].astype(np.float64) * 1e300})  # fmt: skip
    with pytest.raises(CheckpointError, match=rf"'{re.escape(name)}' has \d+ of \d+ values that are NaN or infinite"):
        export_policy(double, tmp_path / "out", parity=False)


@pytest.mark.parametrize("change, message", [
    (lambda old: {"model.norm.weight": old["model.norm.weight"][:-1]}, r"has shape \[95\], config.json implies \[96\]"),
    (lambda old: {"visual.patch_embed.proj.weight": old["visual.patch_embed.proj.weight"].reshape(64, -1)},
     r"patch_embed.proj.weight' has shape \[64, 1176\], config.json implies \[64, 3, 2, 14, 14\]"),
    (lambda old: {"model.layers.7.mlp.up_proj.weight": np.ones((80, 96), np.float32)},
     "has the tensor 'language_model.layers.7.mlp.up_proj.weight', which config.json does not describe"),
])  # fmt: skip
def test_tensors_that_contradict_the_config_are_refused(checkpoints, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(rewritten(checkpoints[True], tmp_path / "other", change=change))


# --- the head ------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [True, False, None])
@pytest.mark.parametrize("inner", [True, False, None])
@pytest.mark.parametrize("saved", ["none", "equal", "other"])
def test_a_saved_head_wins_over_the_config(checkpoints, tmp_path, outer, inner, saved):
    def head(tensors):
        table = tensors["model.embed_tokens.weight"]
        return {} if saved == "none" else {"lm_head.weight": table.copy() if saved == "equal" else table[::-1].copy()}

    folder = rewritten(checkpoints[True], tmp_path / "head", change=head)
    config = json.loads((folder / "config.json").read_text())
    for section, value in ((config, outer), (config["text_config"], inner)):
        section.pop("tie_word_embeddings", None)
        section |= {} if value is None else {"tie_word_embeddings": value}
    (folder / "config.json").write_text(json.dumps(config))
    asks = bool(outer or inner)
    if saved == "none" and not asks:
        with pytest.raises(CheckpointError, match="has no tensor 'lm_head.weight'"):
            Checkpoint.open(folder)
        return
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.text.tied is (asks and saved != "other")
    if (outer, inner) in ((True, False), (False, True), (True, None)):
        assert export_policy(folder, tmp_path / "out", context=512).parity["passed"]


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_notes_and_refusals_as_lines(checkpoints, tmp_path):
    folder, weight_map = sharded(checkpoints[False], tmp_path / "sharded")
    save_file({"x": np.ones(1, np.float32)}, folder / "zz.safetensors")
    arguments = ["export", "policy", str(folder), str(tmp_path / "out"), "--no-parity"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert "note: ignored 1 file beside those of the checkpoint: zz.safetensors" in done.stderr.splitlines()
    (folder / next(iter(weight_map.values()))).write_bytes(b"")
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1 and "cannot read" in done.stderr and len(done.stderr.splitlines()) == 1
    assert isinstance(done.exception, SystemExit)
