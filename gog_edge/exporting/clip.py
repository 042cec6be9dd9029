"""open_clip checkpoints -> an encoder folder: two graphs, a tokenizer and a manifest, with parity measured."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from gog_edge.engines.ort import OrtGraph
from gog_edge.errors import CheckpointError
from gog_edge.exporting.clip_tokenizer import check_tokenizer, convert_hf_tokenizer, convert_simple_tokenizer
from gog_edge.exporting.torchvision_operators import import_torchvision
from gog_edge.files import describe_files, read_json, sha256_of, write_json

SCHEMA = 1
CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
OPSET = 20
PARITY_LIMIT = 1e-4  # largest absolute difference of a component after normalisation
# Protocol buffers stop at 2 GiB; larger weights go to a file beside the graph.
EMBEDDED_BYTES = 2**30
PARITY_TEXTS = ("the flag of France", "A red circle on white!", "", "Łódź, São Tomé e Príncipe; 日本", "word " * 200)


@dataclass(frozen=True, slots=True)
class ImagePreprocessing:
    """How pixels become the image graph's input."""

    width: int
    height: int
    mean: tuple[float, float, float]  # of values in 0..1
    std: tuple[float, float, float]
    interpolation: str  # "bicubic" or "bilinear"
    resize: str  # "squash", "shortest" or "longest"
    fill: int  # 0..255, pads what "longest" leaves over


@dataclass(frozen=True, slots=True)
class ClipCheckpoint:
    """A loaded open_clip model with what belongs to it."""

    name: str
    model: nn.Module
    dim: int
    image: ImagePreprocessing
    tokenizer: Tokenizer
    context_length: int
    pad_id: int
    weights: Path


@dataclass(frozen=True, slots=True)
class Parity:
    """ONNX Runtime against PyTorch, on vectors of unit length."""

    max_abs: float
    min_cosine: float


# --- loading ----------------------------------------------------------------------------------


def load_clip(model: str, *, weights: Path | None = None, tag: str | None = None) -> ClipCheckpoint:
    """Load an open_clip model from local files; nothing is ever downloaded.

    Args:
        model: a folder with `open_clip_config.json` and weights, or the name of a configuration that open_clip ships.
        weights: the weights (.safetensors, .bin, .pt); needed with a name.
        tag: with a name, open_clip's tag of these weights: brings their preprocessing and activation.

    Raises:
        CheckpointError: no such model, weights or tag, or a kind of model that cannot be exported.
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
            f"open_clip model '{model}': no weights were given, and none are ever downloaded; "
            "name a local file with --weights"
        )
    return _load(model, config, weights, weights.parent)


def _weights_in(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"open_clip model '{folder}': no weights; expected one of {', '.join(WEIGHT_FILES)}, or name a file with "
        "--weights"
    )


def _named_config(name: str, tag: str | None) -> dict[str, Any]:
    """A configuration that open_clip ships, in the form of `open_clip_config.json`."""
    import open_clip

    known = open_clip.list_models()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.3) or known[:5]
        raise CheckpointError(
            f"'{name}' is neither a folder nor an open_clip model; near it are {', '.join(close)} "
            f"({len(known)} names in open_clip.list_models())"
        )
    config = open_clip.get_model_config(name)
    preprocess: dict[str, Any] = {}
    if tag is not None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        if tag not in tags:
            raise CheckpointError(f"open_clip model '{name}' has no tag '{tag}'; it has {', '.join(tags) or 'none'}")
        about = open_clip.get_pretrained_cfg(name, tag)
        config["quick_gelu"] = about.get("quick_gelu", config.get("quick_gelu", False))
        wanted = ("mean", "std", "interpolation", "resize_mode", "fill_color")
        preprocess = {key: about[key] for key in wanted if about.get(key) is not None}
    return {"model_cfg": config, "preprocess_cfg": preprocess}


def _load(name: str, config: Mapping[str, Any], weights: Path, folder: Path) -> ClipCheckpoint:
    model_config = config.get("model_cfg")
    if not isinstance(model_config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model_config.keys():
        raise CheckpointError(
            f"open_clip model '{name}': its configuration has no model_cfg with embed_dim, vision_cfg and text_cfg"
        )
    if not weights.is_file():
        raise CheckpointError(f"open_clip model '{name}': there is no weights file '{weights}'")
    text = model_config["text_cfg"]
    if text.get("hf_model_name"):
        raise CheckpointError(
            f"open_clip model '{name}': its text tower is the hub model '{text['hf_model_name']}', which would have to "
            "be downloaded; such models are not exported"
        )
    length = int(text.get("context_length", 77))
    tokenizer, pad_id = _tokenizer(name, text, folder, length)
    model = _build(name, model_config, weights)
    image = _preprocessing(model_config["vision_cfg"], config.get("preprocess_cfg", {}))
    dim = int(model_config["embed_dim"])
    return ClipCheckpoint(name, model, dim, image, tokenizer, length, pad_id, weights)


def _build(name: str, config: Mapping[str, Any], weights: Path) -> nn.Module:
    """The model with its weights, in evaluation mode."""
    from open_clip.factory import load_checkpoint
    from open_clip.model import CLIP, CustomTextCLIP
    from safetensors import SafetensorError

    settings = {key: value for key, value in config.items() if key not in ("custom_text", "multimodal_cfg")}
    custom = bool(config.get("custom_text")) or "timm_model_name" in config["vision_cfg"]
    if "multimodal_cfg" in config:
        raise CheckpointError(f"open_clip model '{name}' is a captioning model (CoCa); only two-tower models work here")
    try:
        model: nn.Module = CustomTextCLIP(**settings) if custom else CLIP(**settings)
        load_checkpoint(model, str(weights), weights_only=True)
    except (RuntimeError, KeyError, TypeError, ValueError, SafetensorError, UnpicklingError) as exc:
        reason = str(exc).splitlines()[0]
        raise CheckpointError(
            f"open_clip model '{name}': '{weights}' cannot be loaded into this configuration ({reason}); "
            "are the weights of this model?"
        ) from exc
    return model.eval().requires_grad_(False)


def _tokenizer(name: str, text: Mapping[str, Any], folder: Path, length: int) -> tuple[Tokenizer, int]:
    """The tokenizer as a `tokenizers` object, and its padding id."""
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
            f"open_clip model '{name}' uses the tokenizer '{hub}', and there is no '{file}'; put its tokenizer.json "
            "there"
        )
    fallback = "canonicalize" if "siglip" in name.lower() else "whitespace"
    return convert_hf_tokenizer(file, clean=clean or fallback), _pad_id(file, text)


def _pad_id(file: Path, text: Mapping[str, Any]) -> int:
    """What fills up short texts: the padding of tokenizer.json, the named token beside it, or the configuration's."""
    tokenizer = Tokenizer.from_file(str(file))
    if tokenizer.padding:
        return int(tokenizer.padding["pad_id"])
    beside = file.with_name("tokenizer_config.json")
    token = json.loads(beside.read_text(encoding="utf-8")).get("pad_token") if beside.is_file() else None
    if isinstance(token, dict):
        token = token.get("content")
    found = tokenizer.token_to_id(token) if token else None
    return int(text.get("pad_id", 0)) if found is None else int(found)


def _preprocessing(vision: Mapping[str, Any], given: Mapping[str, Any]) -> ImagePreprocessing:
    """What open_clip would do to a picture; fields that are not given have open_clip's defaults."""
    from open_clip.transform import PreprocessCfg

    wanted = {key: value for key, value in given.items() if value is not None and key != "size"}
    full = asdict(PreprocessCfg(size=vision.get("image_size", 224), **wanted))
    size = full["size"]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    interpolation = "bicubic" if full["interpolation"] == "random" else str(full["interpolation"])
    return ImagePreprocessing(
        width=int(width),
        height=int(height),
        mean=_triple(full["mean"]),
        std=_triple(full["std"]),
        interpolation=interpolation,
        resize=str(full["resize_mode"]),
        fill=int(full["fill_color"]),
    )


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


# --- graphs -----------------------------------------------------------------------------------


class _ImageTower(nn.Module):
    """[n, 3, height, width] float32 -> [n, dim] of unit length."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return functional.normalize(self.model.encode_image(pixels), dim=-1)  # type: ignore[operator]


class _TextTower(nn.Module):
    """[n, context_length] int64 -> [n, dim] of unit length."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.normalize(self.model.encode_text(tokens), dim=-1)  # type: ignore[operator]


def _export_tower(tower: nn.Module, example: Tensor, name: str, path: Path) -> None:
    """Write one tower as a graph with a free batch size."""
    size = sum(value.numel() * value.element_size() for value in tower.state_dict().values())
    for logger in ("torch.onnx", "onnxscript"):  # they tell of their own internals
        logging.getLogger(logger).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # likewise
        program = torch.onnx.export(
            tower.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[name],
            output_names=["embedding"],
            dynamic_shapes=({0: torch.export.Dim("n", min=1, max=4096)},),
            verbose=False,
        )
    if program is None:
        raise CheckpointError(
            f"{path.name}: torch.onnx gave no graph for {type(tower).__name__}; use the torch of pyproject"
        )
    for node in program.model.graph:
        for value in node.outputs:
            # The exporter calls the output of a token table "embedding" too, and does not see the clash.
            if value.name == "embedding" and not value.is_graph_output():
                value.name = "token_embedding"
    program.save(path, external_data=size > EMBEDDED_BYTES)


def _parity(path: Path, tower: nn.Module, name: str, batches: Sequence[Tensor]) -> Parity:
    """The worst over all batches.

    Raises:
        CheckpointError: above `PARITY_LIMIT`.
    """
    graph = OrtGraph(path)
    worst, cosine = 0.0, 1.0
    for batch in batches:
        with torch.inference_mode():
            wanted: NDArray[np.float32] = tower(batch).numpy()
        given = graph.run({name: batch.numpy()})["embedding"]
        worst = max(worst, float(np.abs(given - wanted).max()))
        cosine = min(cosine, float((given * wanted).sum(-1).min()))
    if not worst <= PARITY_LIMIT:
        raise CheckpointError(
            f"{path.name}: ONNX Runtime differs from PyTorch by {worst:.2g}, more than {PARITY_LIMIT:.0e}; this model "
            "cannot be exported faithfully with these versions of torch and onnxruntime"
        )
    return Parity(worst, cosine)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], length: int, pad_id: int) -> NDArray[np.int64]:
    """[n, length] int64, cut and filled up as the runtime does it."""
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad_id)
    return np.array([encoding.ids for encoding in tokenizer.encode_batch(list(texts))], dtype=np.int64)


def export_clip(checkpoint: ClipCheckpoint, out: Path) -> dict[str, Any]:
    """Write the encoder folder and return its manifest, which is written last.

    Raises:
        CheckpointError: the graphs do not give what the model gives.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "manifest.json").unlink(missing_ok=True)
    image, text = _ImageTower(checkpoint.model).eval(), _TextTower(checkpoint.model).eval()
    generator = torch.Generator().manual_seed(0)
    shape = (3, checkpoint.image.height, checkpoint.image.width)
    pictures = [torch.randn(count, *shape, generator=generator) for count in (2, 1, 3)]
    tokens = tokenize(checkpoint.tokenizer, PARITY_TEXTS, checkpoint.context_length, checkpoint.pad_id)
    texts = [torch.from_numpy(tokens), torch.from_numpy(tokens[:1])]
    _export_tower(image, pictures[0], "pixels", out / "image.onnx")
    _export_tower(text, texts[0], "tokens", out / "text.onnx")
    parity = {
        "image": asdict(_parity(out / "image.onnx", image, "pixels", pictures)),
        "text": asdict(_parity(out / "text.onnx", text, "tokens", texts)),
    }
    checkpoint.tokenizer.save(str(out / "tokenizer.json"))
    manifest = _manifest(checkpoint, out, parity)
    write_json(out / "manifest.json", manifest)
    return manifest


def _manifest(checkpoint: ClipCheckpoint, out: Path, parity: Mapping[str, Any]) -> dict[str, Any]:
    names = ["image.onnx", "text.onnx", "tokenizer.json"]
    names += [f"{name}.data" for name in names[:2] if (out / f"{name}.data").is_file()]
    files = [entry.to_json() for entry in describe_files(out, names)]
    image = asdict(checkpoint.image)
    text = {"context_length": checkpoint.context_length, "pad_id": checkpoint.pad_id}
    tokenizer = next(entry["sha256"] for entry in files if entry["path"] == "tokenizer.json")
    recipe = json.dumps({"image": image, "text": text, "tokenizer": tokenizer}, sort_keys=True)
    scale = checkpoint.model.logit_scale
    return {
        "schema": SCHEMA,
        "kind": "encoder",
        "name": checkpoint.name,
        "dim": checkpoint.dim,
        "image": image,
        "text": text,
        "weights_sha256": sha256_of(checkpoint.weights),
        "preprocessing_sha256": hashlib.sha256(recipe.encode()).hexdigest(),
        "logit_scale": float(scale.exp().mean()) if isinstance(scale, Tensor) else 1.0,
        "precision": "fp32",
        "opset": OPSET,
        "parity": {**parity, "limit": PARITY_LIMIT},
        "files": files,
    }
