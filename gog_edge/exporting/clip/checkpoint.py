"""Loading of open_clip models from local files: weights, preprocessing and tokenizer."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from tokenizers import Tokenizer
from torch import nn

from gog_edge.errors import CheckpointError
from gog_edge.exporting.clip.tokenizer import check_tokenizer, convert_hf_tokenizer, convert_simple_tokenizer
from gog_edge.exporting.torchvision_shim import import_torchvision
from gog_edge.files import read_json
from gog_edge.retrieval.encoder import rgb_floats

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, slots=True)
class ImagePreprocessing:
    """How a picture is converted to the image graph's input; the fields are keys of the manifest."""

    width: int
    height: int
    mean: tuple[float, float, float]  # of pixels scaled to 0..1
    std: tuple[float, float, float]
    interpolation: str  # "bicubic" or "bilinear"
    resize: str  # "squash", "shortest" or "longest"
    fill: int  # 0..255, colour of the padding with "longest"


@dataclass(frozen=True, slots=True)
class ClipCheckpoint:
    """A loaded open_clip model with its preprocessing and tokenizer."""

    name: str
    model: nn.Module
    dim: int
    image: ImagePreprocessing
    tokenizer: Tokenizer
    context_length: int
    pad_id: int
    weights: Path


def load_clip(model: str, *, weights: Path | None = None, tag: str | None = None) -> ClipCheckpoint:
    """Load an open_clip model from local files, without downloads.

    Args:
        model: a folder with `open_clip_config.json` and weights, or the name of a configuration that open_clip ships.
        weights: the weights (.safetensors, .bin, .pt); required with a name.
        tag: with a name, open_clip's tag of these weights, which selects their preprocessing and activation.

    Raises:
        CheckpointError: the model, weights or tag do not exist, or this kind of model cannot be exported.
    """
    import_torchvision()
    folder = Path(model)
    if folder.is_dir():
        config = read_json(folder / CONFIG_FILE, what="open_clip model", error=CheckpointError)
        found = weights or _weights_in(folder)
        return _load(str(config.get("name", folder.resolve().name)), config, found, folder)
    config = _named_config(model, tag)
    if weights is None:
        raise CheckpointError(
            f"open_clip model '{model}': no weights were given, and nothing is downloaded; give a local file with "
            "--weights"
        )
    return _load(model, config, weights, weights.parent)


def _weights_in(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"open_clip model '{folder}': no weights; expected one of {', '.join(WEIGHT_FILES)}, or give a file with "
        "--weights"
    )


def _named_config(name: str, tag: str | None) -> dict[str, Any]:
    """Return a configuration that open_clip ships, in the format of `open_clip_config.json`."""
    import open_clip

    known = open_clip.list_models()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.3) or known[:5]
        raise CheckpointError(
            f"'{name}' is neither a folder nor an open_clip model; similar names are {', '.join(close)} "
            f"(open_clip.list_models() lists all {len(known)})"
        )
    config = open_clip.get_model_config(name)
    preprocess: dict[str, Any] = {}
    if tag is not None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        if tag not in tags:
            raise CheckpointError(
                f"open_clip model '{name}' has no tag '{tag}'; available: {', '.join(tags) or 'none'}"
            )
        pretrained = open_clip.get_pretrained_cfg(name, tag)
        config["quick_gelu"] = pretrained.get("quick_gelu", config.get("quick_gelu", False))
        keys = ("mean", "std", "interpolation", "resize_mode", "fill_color")
        preprocess = {key: pretrained[key] for key in keys if pretrained.get(key) is not None}
    return {"model_cfg": config, "preprocess_cfg": preprocess}


def _load(name: str, config: Mapping[str, Any], weights: Path, folder: Path) -> ClipCheckpoint:
    model_config = config.get("model_cfg")
    if not isinstance(model_config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model_config.keys():
        raise CheckpointError(
            f"open_clip model '{name}': its configuration has no model_cfg with embed_dim, vision_cfg and text_cfg"
        )
    if not weights.is_file():
        raise CheckpointError(f"open_clip model '{name}': the weights file '{weights}' does not exist")
    text = model_config["text_cfg"]
    if text.get("hf_model_name"):
        raise CheckpointError(
            f"open_clip model '{name}': its text tower is the hub model '{text['hf_model_name']}', which would have to "
            "be downloaded; such models cannot be exported"
        )
    length = int(text.get("context_length", 77))
    tokenizer, pad_id = _tokenizer(name, text, folder, length)
    model = _build(name, model_config, weights)
    image = preprocessing_of(model_config["vision_cfg"], config.get("preprocess_cfg", {}))
    dim = int(model_config["embed_dim"])
    return ClipCheckpoint(name, model, dim, image, tokenizer, length, pad_id, weights)


def _build(name: str, config: Mapping[str, Any], weights: Path) -> nn.Module:
    """Return the model with its weights, in evaluation mode."""
    from open_clip.factory import load_checkpoint
    from open_clip.model import CLIP, CustomTextCLIP
    from safetensors import SafetensorError

    settings = {key: value for key, value in config.items() if key not in ("custom_text", "multimodal_cfg")}
    custom = bool(config.get("custom_text")) or "timm_model_name" in config["vision_cfg"]
    if "multimodal_cfg" in config:
        raise CheckpointError(
            f"open_clip model '{name}' is a captioning model (CoCa); only two-tower models can be exported"
        )
    try:
        model: nn.Module = CustomTextCLIP(**settings) if custom else CLIP(**settings)
        load_checkpoint(model, str(weights), weights_only=True)
    except (RuntimeError, KeyError, TypeError, ValueError, SafetensorError, UnpicklingError) as exc:
        reason = str(exc).splitlines()[0]
        raise CheckpointError(
            f"open_clip model '{name}': '{weights}' cannot be loaded into this configuration ({reason}); give the "
            "weights of this model"
        ) from exc
    return model.eval().requires_grad_(False)


def _tokenizer(name: str, text: Mapping[str, Any], folder: Path, length: int) -> tuple[Tokenizer, int]:
    """Return the tokenizer as a `tokenizers` object, and its padding id."""
    import open_clip

    options = dict(text.get("tokenizer_kwargs") or {})
    clean = options.pop("clean", None)
    if options or text.get("tokenizer_mode"):
        raise CheckpointError(
            f"open_clip model '{name}': tokenizer options {sorted(options) or text['tokenizer_mode']} cannot be "
            "exported; only 'clean' can"
        )
    hub = text.get("hf_tokenizer_name") or ("a SigLIP vocabulary" if "siglip" in name.lower() else None)
    if not hub:
        original = open_clip.SimpleTokenizer(context_length=length, clean=clean or "lower")
        tokenizer = convert_simple_tokenizer(original, clean=clean or "lower")
        check_tokenizer(tokenizer, original, length)
        return tokenizer, 0
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"open_clip model '{name}' uses the tokenizer '{hub}', but '{file}' does not exist; copy its "
            "tokenizer.json there"
        )
    fallback = "canonicalize" if "siglip" in name.lower() else "whitespace"
    return convert_hf_tokenizer(file, clean=clean or fallback), _pad_id(file, text)


def _pad_id(file: Path, text: Mapping[str, Any]) -> int:
    """Return the padding id of tokenizer.json, of tokenizer_config.json, or of the model's configuration."""
    tokenizer = Tokenizer.from_file(str(file))
    if tokenizer.padding:
        return int(tokenizer.padding["pad_id"])
    config = file.with_name("tokenizer_config.json")
    token = json.loads(config.read_text(encoding="utf-8")).get("pad_token") if config.is_file() else None
    if isinstance(token, dict):
        token = token.get("content")
    found = tokenizer.token_to_id(token) if token else None
    return int(text.get("pad_id", 0)) if found is None else int(found)


def preprocessing_of(vision: Mapping[str, Any], given: Mapping[str, Any]) -> ImagePreprocessing:
    """Return open_clip's preprocessing of a model; fields that are not given have open_clip's defaults."""
    from open_clip.transform import PreprocessCfg

    settings = {key: value for key, value in given.items() if value is not None and key != "size"}
    full = asdict(PreprocessCfg(size=vision.get("image_size", 224), **settings))
    size = full["size"]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    # In evaluation, open_clip reads "random" as bicubic, and always uses bicubic to cover a rectangle.
    covers_rectangle = full["resize_mode"] == "shortest" and height != width
    is_bicubic = covers_rectangle or full["interpolation"] == "random"
    interpolation = "bicubic" if is_bicubic else str(full["interpolation"])
    return ImagePreprocessing(
        width=int(width),
        height=int(height),
        mean=rgb_floats(full["mean"]),
        std=rgb_floats(full["std"]),
        interpolation=interpolation,
        resize=str(full["resize_mode"]),
        fill=int(full["fill_color"]),
    )
