"""Tiny random open_clip models, exported and run by the runtime's encoder."""

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from gog_edge.errors import CheckpointError
from gog_edge.exporting.clip import checkpoint as clip_checkpoint
from gog_edge.exporting.clip import export as clip
from gog_edge.exporting.clip.checkpoint import load_clip
from gog_edge.exporting.clip.export import export_clip, tokenize
from gog_edge.exporting.torchvision_shim import import_torchvision
from gog_edge.files import verify_files
from gog_edge.retrieval.encoder import Encoder

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 16}
VIT = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
PREPROCESS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "squash"}


def write_checkpoint(folder, vision, text=TEXT, seed=0, **more):
    """Write a checkpoint folder of open_clip with random weights."""
    import_torchvision()
    from open_clip.model import CLIP

    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    model_cfg = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    config = {"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS} | more
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = CLIP(**model_cfg).eval()
    for module in model.modules():  # statistics as after training, to detect a wrong mode
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """The model, its exported folder, the manifest, and the output of the command."""
    from export.export_clip import main

    root = tmp_path_factory.mktemp("resnet")
    model = write_checkpoint(root / "model", RESNET, name="tiny")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([str(root / "model"), str(root / "out")]) == 0
    return model, root / "out", json.loads((root / "out" / "manifest.json").read_text()), printed.getvalue()


def pictures():
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((40, 50, 3), (32, 32, 3), (7, 90, 3))]


def test_the_runtime_embeds_pictures_as_open_clip_does(resnet):
    from open_clip.transform import image_transform

    model, folder, *_ = resnet
    transform = image_transform(
        32, is_train=False, mean=tuple(PREPROCESS["mean"]), std=tuple(PREPROCESS["std"]), resize_mode="squash"
    )
    with torch.inference_mode():
        expected = model.encode_image(torch.stack([transform(Image.fromarray(p)) for p in pictures()]), normalize=True)
    vectors = Encoder.open(folder, threads=1).embed_images(pictures())
    np.testing.assert_allclose(vectors, expected.numpy(), atol=1e-4)


def test_the_runtime_embeds_texts_as_open_clip_does(resnet):
    import open_clip

    model, folder, *_ = resnet
    texts = ["the flag of France", "", "Ünïcode & <b>tags</b>", "long " * 50]
    with torch.inference_mode():
        expected = model.encode_text(open_clip.SimpleTokenizer(context_length=16)(texts), normalize=True).numpy()
    encoder = Encoder.open(folder, threads=1)
    np.testing.assert_allclose(encoder.embed_texts(texts), expected, atol=1e-4)
    for row, text in enumerate(texts):
        np.testing.assert_allclose(encoder.embed_texts([text])[0], expected[row], atol=1e-4)


def test_the_manifest_describes_the_folder(resnet):
    model, folder, manifest, _ = resnet
    assert (manifest["name"], manifest["kind"], manifest["dim"]) == ("tiny", "encoder", 24)
    assert manifest["image"]["mean"] == PREPROCESS["mean"]
    assert manifest["image"]["resize"] == "squash"
    assert manifest["text"] == {"context_length": 16, "pad_id": 0}
    assert manifest["logit_scale"] == pytest.approx(float(model.logit_scale.detach().exp()))
    assert max(manifest["parity"][tower]["max_abs"] for tower in ("image", "text")) < 1e-5
    verify_files(folder, manifest["files"], what="encoder", full=True)
    assert {entry["path"] for entry in manifest["files"]} == {"image.onnx", "text.onnx", "tokenizer.json"}


def test_a_vision_transformer_with_its_own_tokenizer(tmp_path):
    tokenizer = little_tokenizer()
    text = TEXT | {"vocab_size": 300, "pad_id": 0, "eos_id": 2, "pool_type": "eos", "hf_tokenizer_name": "own"}
    model = write_checkpoint(tmp_path, VIT, text)
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        load_clip(str(tmp_path))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    checkpoint = load_clip(str(tmp_path))
    export_clip(checkpoint, tmp_path / "out")
    tokens = tokenize(checkpoint.tokenizer, ["A  flag", "a flag"], 16, 0)
    assert (tokens[0] == tokens[1]).all()  # open_clip collapses white space before its tokenizers
    with torch.inference_mode():
        expected = model.encode_text(torch.from_numpy(tokens), normalize=True).numpy()
    encoder = Encoder.open(tmp_path / "out", threads=1)
    np.testing.assert_allclose(encoder.embed_texts(["A flag"]), expected[:1], atol=1e-4)


def little_tokenizer():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the flag of france"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def test_unknown_models_are_refused_with_what_exists(tmp_path):
    with pytest.raises(CheckpointError, match="ViT-B-32") as caught:
        load_clip("ViT-B-23", weights=tmp_path / "w.safetensors")
    assert "neither a folder nor" in str(caught.value)


def test_nothing_is_downloaded(tmp_path):
    with pytest.raises(CheckpointError, match="--weights"):
        load_clip("ViT-B-32")
    with pytest.raises(CheckpointError, match="the weights file .* does not exist"):
        load_clip("ViT-B-32", weights=tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        load_clip("ViT-B-16-SigLIP", weights=_some_file(tmp_path))
    with pytest.raises(CheckpointError, match="downloaded"):
        load_clip("roberta-ViT-B-32", weights=_some_file(tmp_path))


def test_an_unknown_tag_is_refused_with_those_that_exist(tmp_path):
    with pytest.raises(CheckpointError, match="laion2b_s34b_b79k"):
        load_clip("ViT-B-32", weights=_some_file(tmp_path), tag="best")


def test_a_tag_selects_activation_and_preprocessing():
    import_torchvision()
    config = clip_checkpoint._named_config("ViT-B-32", "openai")
    assert config["model_cfg"]["quick_gelu"] is True
    assert config["preprocess_cfg"]["mean"] != [0.5, 0.5, 0.5]


def _some_file(folder):
    path = folder / "weights.safetensors"
    path.write_bytes(b"none")
    return path


def test_incomplete_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="open_clip_config.json"):
        load_clip(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 8}}')
    with pytest.raises(CheckpointError, match="no weights"):
        load_clip(str(tmp_path))
    with pytest.raises(CheckpointError, match="vision_cfg"):
        load_clip(str(tmp_path), weights=_some_file(tmp_path))


def test_weights_of_another_model_are_refused(tmp_path):
    write_checkpoint(tmp_path / "a", RESNET)
    write_checkpoint(tmp_path / "b", VIT)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_clip(str(tmp_path / "a"), weights=tmp_path / "b" / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_clip(str(tmp_path / "a"), weights=_some_file(tmp_path))


def test_a_graph_that_differs_from_pytorch_is_refused(tmp_path, monkeypatch, resnet):
    write_checkpoint(tmp_path / "model", RESNET, seed=1)
    monkeypatch.setattr(
        clip, "_export_tower", lambda tower, example, name, path: shutil.copy(resnet[1] / path.name, path)
    )
    with pytest.raises(CheckpointError, match="differs from PyTorch"):
        export_clip(load_clip(str(tmp_path / "model")), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_command_prints_a_table_and_a_line_of_json(resnet, tmp_path, capsys):
    from export.export_clip import main

    lines = resnet[3].strip().splitlines()
    assert json.loads(lines[-1])["dim"] == 24
    assert any("image.onnx" in line for line in lines[:-1])
    assert main([str(tmp_path / "none"), str(tmp_path / "out")]) == 1
    assert "neither a folder" in capsys.readouterr().err
