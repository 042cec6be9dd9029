"""Checkpoints of open_clip that are refused: damaged files, impossible configurations, weights that are not finite."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_clip import write_tiny_clip

from gog_edge.errors import CheckpointError
from gog_edge.exporting.clip.checkpoint import load_clip
from gog_edge.exporting.clip.export import export_clip

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


@pytest.fixture
def folder(tmp_path):
    write_tiny_clip(tmp_path / "model")
    return tmp_path / "model"


def change(folder, *path, value):
    """Set a value of the configuration by its path."""
    config = json.loads((folder / CONFIG).read_text())
    *outer, key = path
    target = config
    for name in outer:
        target = target[name]
    target[key] = value
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize("name, value", [("visual.conv1.weight", np.nan), ("token_embedding.weight", np.inf),
                                         ("logit_scale", -np.inf)])  # fmt: skip
def test_weights_that_are_not_finite_are_refused_by_name(folder, name, value):
    tensors = load_file(folder / WEIGHTS)
    array = tensors[name].copy()
    array.reshape(-1)[-1] = value
    save_file(tensors | {name: array}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"'{name}' has values that are NaN or infinite"):
        load_clip(str(folder))


def test_a_logit_scale_that_overflows_is_refused(folder, tmp_path):
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"logit_scale": np.full_like(tensors["logit_scale"], 1000.0)}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="logit_scale is e to the power of"):
        export_clip(load_clip(str(folder)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path, value, message", [
    (("model_cfg",), 3, "has no model_cfg"),
    (("model_cfg", "embed_dim"), "wide", "'embed_dim' must be an integer"),
    (("model_cfg", "embed_dim"), -1, "'embed_dim' must be at least 1"),
    (("model_cfg", "vision_cfg"), "ViT", "'vision_cfg' must be a table"),
    (("model_cfg", "text_cfg"), [1], "'text_cfg' must be a table"),
    (("model_cfg", "vision_cfg", "width"), 10**9, "vision_cfg.width must be at most"),
    (("model_cfg", "vision_cfg", "layers"), 10**6, "vision_cfg.layers must be at most 1024"),
    (("model_cfg", "vision_cfg", "layers"), 1000, "cannot be loaded into this configuration"),
    (("model_cfg", "vision_cfg", "width"), 2**20, "it describes a model of"),
    (("model_cfg", "vision_cfg", "patch_size"), "eight", "cannot be loaded into this configuration"),
    (("model_cfg", "vision_cfg", "layers"), None, "cannot be loaded into this configuration"),
    (("model_cfg", "vision_cfg", "head_width"), 0, "cannot be loaded into this configuration"),
    (("model_cfg", "vision_cfg", "image_size"), "large", "image_size, mean and std must be numbers"),
    (("model_cfg", "vision_cfg", "unknown"), 1, "cannot be loaded into this configuration"),
    (("model_cfg", "text_cfg", "context_length"), "long", "'context_length' must be an integer"),
    (("model_cfg", "text_cfg", "context_length"), 0, "'context_length' must be at least 1"),
    (("model_cfg", "text_cfg", "tokenizer_kwargs"), {"clean": 3}, "'clean' must be text"),
    (("model_cfg", "text_cfg", "tokenizer_kwargs"), {"clean": "dry"}, "clean"),
    (("preprocess_cfg",), 3, "preprocess_cfg must be an object, got 3"),
    (("preprocess_cfg", "mean"), "grey", "must be numbers"),
    (("preprocess_cfg", "mean"), [0.5, 0.5], "preprocessing is not possible"),
    (("preprocess_cfg", "std"), [0, 0, 0], "preprocessing is not possible"),
    (("preprocess_cfg", "resize_mode"), "stretch", "preprocessing is not possible"),
    (("preprocess_cfg", "colour"), 1, "preprocessing is not possible"),
    (("preprocess_cfg", "fill_color"), 999, "preprocessing is not possible"),
])  # fmt: skip
def test_impossible_configurations_are_refused(folder, path, value, message):
    change(folder, *path, value=value)
    with pytest.raises(CheckpointError, match=message):
        load_clip(str(folder))


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model_cfg": NaN}', "[" * 5000])
def test_configurations_that_are_not_json_are_refused(folder, content):
    (folder / CONFIG).write_text(content)
    with pytest.raises(CheckpointError, match=CONFIG):
        load_clip(str(folder))


@pytest.mark.parametrize("size", [0, 5, 100, 5000])
def test_truncated_weights_are_refused(folder, size):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])
    with pytest.raises(CheckpointError, match="cannot be loaded .*copy it again"):
        load_clip(str(folder))


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "weights.pt"])
def test_pickled_weights_are_never_read(folder, name):
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(b"\x80\x04cposix\nsystem\n")
    given = folder / name if name.endswith(".pt") else None
    with pytest.raises(CheckpointError, match=rf"{name}' is not a safetensors file: .*weights_only=True"):
        load_clip(str(folder), weights=given)


def test_a_damaged_tokenizer_is_refused(folder):
    change(folder, "model_cfg", "text_cfg", "hf_tokenizer_name", value="some/tokenizer")
    (folder / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json' as a tokenizer"):
        load_clip(str(folder))
