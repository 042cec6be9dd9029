"""Loading of open_clip models from local files: weights, preprocessing and tokenizer."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import nn

from gog_edge.errors import ArtifactError, CheckpointError
from gog_edge.exporting.clip.tokenizer import check_tokenizer, convert_hf_tokenizer, convert_simple_tokenizer
from gog_edge.exporting.torchvision_shim import import_torchvision
from gog_edge.files import open_tokenizer, read_json
from gog_edge.retrieval.encoder import parse_image_spec, rgb_floats
from gog_edge.tables import Dimension, build, shown

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "model.safetensors")
PICKLED = ("open_clip_pytorch_model.bin", "pytorch_model.bin")
MAX_NUMBER = 2**24  # of a configuration: sizes, token ids
MAX_LAYERS = 1024
SIZE_RATIO = 8  # of a model in fp32 to its file, which may hold fp16
SMALL_BYTES = 2**28  # models up to this size are not compared with their file


@dataclass(frozen=True, slots=True)
class TextFields:
    """The keys of `text_cfg` that this package reads."""

    context_length: Annotated[int, Ge(1), Le(65_536)] = 77
    pad_id: Annotated[int, Ge(0), Le(MAX_NUMBER)] = 0
    hf_model_name: str = ""
    hf_tokenizer_name: str = ""
    tokenizer_mode: str = ""
    tokenizer_kwargs: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ModelFields:
    """The keys of `model_cfg` that this package reads."""

    embed_dim: Dimension
    vision_cfg: Mapping[str, Any]
    text_cfg: Mapping[str, Any]


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
        weights: the weights, a safetensors file; required with a name.
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
    pickled = next((name for name in PICKLED if (folder / name).is_file()), None)
    if pickled is not None:
        raise CheckpointError(_pickle_advice(folder / pickled))
    raise CheckpointError(
        f"open_clip model '{folder}': no weights; expected one of {', '.join(WEIGHT_FILES)}, or give a file with "
        "--weights"
    )


def _pickle_advice(path: Path) -> str:
    return (
        f"'{path}' is not a safetensors file: pickled weights may contain code and are not read; where you trust it, "
        "convert it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'open_clip_model.safetensors')"
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
    model_config, where = config.get("model_cfg"), f"open_clip model '{name}': its configuration"
    if not isinstance(model_config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model_config.keys():
        raise CheckpointError(
            f"open_clip model '{name}': its configuration has no model_cfg with embed_dim, vision_cfg and text_cfg"
        )
    fields = build(ModelFields, model_config, "model_cfg", error=CheckpointError, where=where, known_only=True)
    given = {key: value for key, value in fields.text_cfg.items() if value is not None}
    text = build(TextFields, given, "text_cfg", error=CheckpointError, where=where, known_only=True)
    for path, value in _numbers(model_config):
        limit = MAX_LAYERS if path[-1] == "layers" else MAX_NUMBER
        if not math.isfinite(value) or abs(value) > limit:
            raise CheckpointError(f"{where}: {'.'.join(path)} must be at most {limit}, got {shown(value)}")
    if not weights.is_file():
        raise CheckpointError(f"open_clip model '{name}': the weights file '{weights}' does not exist")
    if weights.suffix != ".safetensors":
        raise CheckpointError(_pickle_advice(weights))
    if text.hf_model_name:
        raise CheckpointError(
            f"open_clip model '{name}': its text tower is the hub model '{text.hf_model_name}', which would have to "
            "be downloaded; such models cannot be exported"
        )
    preprocess = config.get("preprocess_cfg", {})
    if not isinstance(preprocess, Mapping):
        raise CheckpointError(f"{where}: preprocess_cfg must be an object, got {shown(preprocess)}")
    image = _checked_preprocessing(where, fields.vision_cfg, preprocess)
    tokenizer, pad_id = _tokenizer(name, text, folder)
    model = _build(name, model_config, weights)
    return ClipCheckpoint(name, model, fields.embed_dim, image, tokenizer, text.context_length, pad_id, weights)


def _numbers(value: Any, path: tuple[str, ...] = ("model_cfg",)) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield the numbers in a configuration with their paths."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, (*path, str(key)))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, path)
    elif isinstance(value, (int, float)):
        yield path, value


def _build(name: str, config: Mapping[str, Any], weights: Path) -> nn.Module:
    """Return the model with its weights, in evaluation mode."""
    from open_clip.factory import load_checkpoint
    from open_clip.model import CLIP, CustomTextCLIP

    settings = {key: value for key, value in config.items() if key not in ("custom_text", "multimodal_cfg")}
    custom = bool(config.get("custom_text")) or "timm_model_name" in config["vision_cfg"]
    if "multimodal_cfg" in config:
        raise CheckpointError(
            f"open_clip model '{name}' is a captioning model (CoCa); only two-tower models can be exported"
        )
    architecture = CustomTextCLIP if custom else CLIP
    try:
        with safe_open(weights, framework="np"):
            pass
        with torch.device("meta"):
            needed = 4 * sum(parameter.numel() for parameter in architecture(**settings).parameters())
        if needed > max(SMALL_BYTES, SIZE_RATIO * weights.stat().st_size):
            raise ValueError(f"it describes a model of {needed / 2**20:.0f} MiB")
        model: nn.Module = architecture(**settings)
        load_checkpoint(model, str(weights), weights_only=True)
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"open_clip model '{name}': '{weights}' cannot be loaded ({exc}); copy it again") from exc
    except Exception as exc:  # open_clip, timm and torch raise many kinds
        reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        raise CheckpointError(
            f"open_clip model '{name}': '{weights}' cannot be loaded into this configuration ({reason}); give the "
            "weights of this model"
        ) from exc
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"'{weights}': '{key}' has values that are NaN or infinite; give other weights")
    return model.eval().requires_grad_(False)


def _tokenizer(name: str, text: TextFields, folder: Path) -> tuple[Tokenizer, int]:
    """Return the tokenizer as a `tokenizers` object, and its padding id."""
    import open_clip

    options = dict(text.tokenizer_kwargs or {})
    clean = options.pop("clean", None)
    if options or text.tokenizer_mode:
        raise CheckpointError(
            f"open_clip model '{name}': tokenizer options {sorted(options) or text.tokenizer_mode} cannot be "
            "exported; only 'clean' can"
        )
    if clean is not None and not isinstance(clean, str):
        raise CheckpointError(f"open_clip model '{name}': tokenizer option 'clean' must be text, got {shown(clean)}")
    hub = text.hf_tokenizer_name or ("a SigLIP vocabulary" if "siglip" in name.lower() else None)
    if not hub:
        try:
            original = open_clip.SimpleTokenizer(context_length=text.context_length, clean=clean or "lower")
        except Exception as exc:  # asserts, and KeyError for another mode
            raise CheckpointError(f"open_clip model '{name}': tokenizer option 'clean' = {clean!r} ({exc!r})") from exc
        tokenizer = convert_simple_tokenizer(original, clean=clean or "lower")
        check_tokenizer(tokenizer, original, text.context_length)
        return tokenizer, 0
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"open_clip model '{name}' uses the tokenizer '{hub}', but '{file}' does not exist; copy its "
            "tokenizer.json there"
        )
    fallback = "canonicalize" if "siglip" in name.lower() else "whitespace"
    return convert_hf_tokenizer(file, clean=clean or fallback), _pad_id(file, text)


def _pad_id(file: Path, text: TextFields) -> int:
    """Return the padding id of tokenizer.json, of tokenizer_config.json, or of the model's configuration."""
    tokenizer = open_tokenizer(file, what="open_clip model", error=CheckpointError)
    if tokenizer.padding:
        return int(tokenizer.padding["pad_id"])
    path = file.with_name("tokenizer_config.json")
    config = read_json(path, what="open_clip model", error=CheckpointError) if path.is_file() else {}
    token = config.get("pad_token")
    if isinstance(token, dict):
        token = token.get("content")
    found = tokenizer.token_to_id(token) if isinstance(token, str) else None
    return text.pad_id if found is None else int(found)


def _checked_preprocessing(where: str, vision: Mapping[str, Any], given: Mapping[str, Any]) -> ImagePreprocessing:
    """Return `preprocessing_of`. Raises CheckpointError for values that no encoder can have."""
    try:
        image = preprocessing_of(vision, given)
        parse_image_spec(asdict(image))
    except (ArtifactError, TypeError, ValueError, AttributeError, OverflowError) as exc:
        raise CheckpointError(f"{where} of the preprocessing is not possible ({exc})") from exc
    return image


def preprocessing_of(vision: Mapping[str, Any], given: Mapping[str, Any]) -> ImagePreprocessing:
    """Return open_clip's preprocessing of a model; fields that are not given have open_clip's defaults."""
    from open_clip.transform import PreprocessCfg

    settings = {key: value for key, value in given.items() if value is not None and key != "size"}
    numbers = (vision.get("image_size", 224), settings.get("mean", 0), settings.get("std", 1))
    if any(isinstance(value, (str, Mapping)) for value in numbers):
        raise TypeError(f"image_size, mean and std must be numbers, got {shown(numbers)}")
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
