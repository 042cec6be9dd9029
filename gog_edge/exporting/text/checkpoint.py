"""Read and check the folder of a sentence encoder, as transformers and sentence-transformers save it; without torch.

    config.json, model.safetensors, tokenizer.json    transformers
    modules.json, 1_Pooling/config.json               pooling of the token states
    sentence_bert_config.json                         truncation
    config_sentence_transformers.json                 prompts: prefixes of queries and passages
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gog_edge.errors import CheckpointError
from gog_edge.files import open_tokenizer, parse_json, read_bounded, read_json, sha256_of
from gog_edge.retrieval.text.encoder import MIN_TOKENS, POOLINGS, TOKENIZER
from gog_edge.tables import shown

# Model types that are tested with the versions of optimum-onnx, transformers and torch that the extra pins.
MODEL_TYPES = ("albert", "bert", "camembert", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta")
# Positions start at pad_token_id + 1 here, so that fewer tokens than positions fit.
OFFSET_POSITIONS = ("camembert", "mpnet", "roberta", "xlm-roberta")
MODULES = ("Transformer", "Pooling", "Normalize")  # of sentence-transformers, in this order
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
QUERY_PROMPTS, PASSAGE_PROMPTS = ("query",), ("document", "passage", "corpus")  # in the order of precedence
MAX_INTEGER = 2**24  # of a size in config.json
NO_LIMIT = 1_000_000  # transformers writes a much larger model_max_length for a tokenizer without a limit
_POOLING_KEY = "pooling_mode_"
_POOLING_FLAGS = {"mean_tokens": "mean", "cls_token": "cls"}
_E5 = re.compile(r"(?i)(^|[-_/.])e5([-_/.]|$)")


@dataclass(frozen=True, slots=True)
class TextOptions:
    """Settings that replace those of the folder; None keeps them."""

    name: str | None = None
    pooling: str | None = None  # one of POOLINGS
    query_prefix: str | None = None
    passage_prefix: str | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TextCheckpoint:
    """A sentence encoder that can be exported."""

    folder: Path  # with config.json, weights and tokenizer
    name: str
    model_type: str
    dim: int
    max_tokens: int
    pad_id: int
    pooling: str
    query_prefix: str
    passage_prefix: str
    lower_case: bool  # before the tokenizer
    weights: tuple[Path, ...]

    @classmethod
    def open(cls, folder: Path, options: TextOptions | None = None) -> TextCheckpoint:
        """Read and check a folder.

        Raises:
            CheckpointError: A file is missing or damaged, the architecture or the pooling is not supported, or the
                folder does not define a setting that the options leave out.
        """
        given = options or TextOptions()
        modules = _modules(folder)
        home = _inside(folder, str(modules["Transformer"]["path"])) if modules else folder
        config = _json(home / "config.json")
        prompts = _optional(folder / "config_sentence_transformers.json")
        reading = _optional(home / "sentence_bert_config.json")
        name = given.name or folder.resolve().name
        query, passage = _prefixes(given, prompts, f"{name} {config.get('_name_or_path', '')}")
        model_type = _model_type(home, config)
        _check_tokenizer(home, config)
        _check_similarity(folder, modules, prompts)
        return cls(
            folder=home,
            name=name,
            model_type=model_type,
            dim=_integer(home, config, "dim" if model_type == "distilbert" else "hidden_size"),
            max_tokens=_max_tokens(home, config, reading, given.max_tokens),
            pad_id=_pad_id(home, config),
            pooling=_pooling(folder, modules, given.pooling),
            query_prefix=query,
            passage_prefix=passage,
            lower_case=_flag(home, reading, "do_lower_case"),
            weights=_weights(home),
        )

    @property
    def weights_sha256(self) -> str:
        """Return the hash of the weights file, or of the names and hashes of its shards."""
        if len(self.weights) == 1:
            return sha256_of(self.weights[0])
        lines = "\n".join(f"{path.name} {sha256_of(path)}" for path in self.weights)
        return hashlib.sha256(lines.encode()).hexdigest()


# --- transformers --------------------------------------------------------------------------------


def _model_type(folder: Path, config: Mapping[str, Any]) -> str:
    model_type = str(config.get("model_type", ""))
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"'{folder / 'config.json'}': model_type must be one of {', '.join(MODEL_TYPES)}, got '{model_type}'; "
            "choose another model"
        )
    if "auto_map" in config:
        raise CheckpointError(
            f"'{folder}' contains model code of its own (auto_map in config.json), which is never run; choose a model "
            "that transformers implements"
        )
    return model_type


def _check_tokenizer(folder: Path, config: Mapping[str, Any]) -> None:
    path = folder / TOKENIZER
    if not path.is_file():
        raise CheckpointError(
            f"'{folder}' has no {TOKENIZER}; write it with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER, use_fast=True).save_pretrained(FOLDER)"
        )
    size = open_tokenizer(path, what="text encoder", error=CheckpointError).get_vocab_size()
    known = _integer(folder, config, "vocab_size")
    if size > known:
        raise CheckpointError(
            f"'{path}' has {size} tokens, vocab_size in config.json is {known}; copy the tokenizer of this model"
        )


def _max_tokens(folder: Path, config: Mapping[str, Any], reading: Mapping[str, Any], asked: int | None) -> int:
    """Return the tokens of one text: the option, or the smallest limit of the folder."""
    positions = _integer(folder, config, "max_position_embeddings")
    if config.get("model_type") in OFFSET_POSITIONS:
        positions -= _pad_id(folder, config) + 1
    if asked is not None:
        if not MIN_TOKENS <= asked <= positions:
            raise CheckpointError(
                f"--max-tokens must be from {MIN_TOKENS} to {positions} for the model in '{folder}', got {asked}"
            )
        return asked
    stated = (reading.get("max_seq_length"), _optional(folder / "tokenizer_config.json").get("model_max_length"))
    limits = [int(value) for value in stated if isinstance(value, (int, float)) and 0 < value < NO_LIMIT]
    smallest = min([*limits, positions])
    if smallest < MIN_TOKENS:
        raise CheckpointError(
            f"'{folder}' limits texts to {smallest} tokens, and {MIN_TOKENS} are needed; give --max-tokens, or choose "
            "another model"
        )
    return smallest


def _pad_id(folder: Path, config: Mapping[str, Any]) -> int:
    value, vocab = config.get("pad_token_id"), _integer(folder, config, "vocab_size")
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value < vocab:
        raise CheckpointError(
            f"'{folder / 'config.json'}': pad_token_id must be the id of a token below {vocab}, got {shown(value)}"
        )
    return value


def _weights(folder: Path) -> tuple[Path, ...]:
    names = [WEIGHTS]
    if (folder / WEIGHTS_INDEX).is_file():
        weight_map = _json(folder / WEIGHTS_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(
                f"'{folder / WEIGHTS_INDEX}': weight_map must map names of tensors to files, got {shown(weight_map)}"
            )
        names = sorted(set(weight_map.values()))
    paths = tuple(_inside(folder, name) for name in names)
    missing = next((path for path in paths if not path.is_file() or path.suffix != ".safetensors"), None)
    if missing is not None or not paths:
        raise CheckpointError(
            f"'{folder}' has no '{missing.name if missing else WEIGHTS}'; weights are read from safetensors files "
            "only: save the model with save_pretrained(FOLDER, safe_serialization=True), or copy the folder again"
        )
    return paths


# --- sentence-transformers -----------------------------------------------------------------------


def _modules(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the modules by name; empty for a transformers folder without modules.json."""
    path = folder / "modules.json"
    if not path.is_file():
        return {}
    rows = _json_list(path)
    kinds = [str(row.get("type", "")).rpartition(".")[2] for row in rows]
    if tuple(kinds) not in (MODULES, MODULES[:2]) or any(not isinstance(row.get("path"), str) for row in rows):
        raise CheckpointError(
            f"'{path}': the modules must be {', '.join(MODULES)}, the last optional, got {', '.join(kinds)}; choose "
            "another model"
        )
    return dict(zip(kinds, rows, strict=True))


def _pooling(folder: Path, modules: Mapping[str, Mapping[str, Any]], asked: str | None) -> str:
    if asked is not None and asked not in POOLINGS:
        raise CheckpointError(f"--pooling must be {' or '.join(POOLINGS)}, got '{asked}'")
    if not modules:
        if asked is None:
            raise CheckpointError(
                f"'{folder}' has no modules.json, so its pooling is unknown; give --pooling mean (E5, MiniLM) or "
                "--pooling cls (BGE)"
            )
        return asked
    path = _inside(folder, str(modules["Pooling"]["path"])) / "config.json"
    config = _json(path)
    if "pooling_mode" in config:
        poolings = {str(config["pooling_mode"])}
    else:
        flags = {key.removeprefix(_POOLING_KEY) for key, on in config.items() if key.startswith(_POOLING_KEY) and on}
        poolings = {_POOLING_FLAGS.get(flag, flag) for flag in flags}
    if len(poolings) != 1 or not poolings <= set(POOLINGS):
        raise CheckpointError(
            f"'{path}': the pooling must be one of {', '.join(POOLINGS)}, got {', '.join(sorted(poolings)) or 'none'}; "
            "choose another model"
        )
    if config.get("include_prompt") is False:
        raise CheckpointError(f"'{path}': include_prompt must be true, got false; choose another model")
    own = poolings.pop()
    if asked not in (None, own):
        raise CheckpointError(f"--pooling is '{asked}', but '{path}' has {own}; leave the option out")
    return own


def _check_similarity(folder: Path, modules: Mapping[str, Any], prompts: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a model that compares vectors by inner product without normalising them."""
    similarity = prompts.get("similarity_fn_name")
    if similarity not in (None, "cosine") and "Normalize" not in modules:
        raise CheckpointError(
            f"'{folder}' compares vectors by '{similarity}' without normalising them; packs compare by cosine: choose "
            "a model trained for cosine similarity"
        )


def _prefixes(given: TextOptions, config: Mapping[str, Any], names: str) -> tuple[str, str]:
    """Return the prefixes of queries and of passages: the options, or the folder's prompts, or empty strings."""
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or any(not isinstance(value, str) for value in prompts.values()):
        raise CheckpointError(f"config_sentence_transformers.json: prompts must be strings by name, got {prompts!r}")
    default = prompts.get(str(config.get("default_prompt_name")), "")
    query, passage = (
        asked if asked is not None else next((prompts[key] for key in keys if key in prompts), default)
        for asked, keys in ((given.query_prefix, QUERY_PROMPTS), (given.passage_prefix, PASSAGE_PROMPTS))
    )
    if _E5.search(names.replace(" ", "/")) and not query and given.query_prefix is None:
        raise CheckpointError(
            "by its name this is an E5 model, but its folder defines no prompts; give --query-prefix 'query: ' "
            "--passage-prefix 'passage: ' (empty strings if it was trained without prefixes)"
        )
    return query, passage


# --- files ---------------------------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, what="text encoder", error=CheckpointError)


def _optional(path: Path) -> dict[str, Any]:
    return _json(path) if path.is_file() else {}


def _json_list(path: Path) -> list[dict[str, Any]]:
    try:
        value = parse_json(read_bounded(path))
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"cannot read '{path}' as JSON ({exc}); copy the folder again") from exc
    if not isinstance(value, list) or any(not isinstance(row, dict) for row in value):
        raise CheckpointError(f"'{path}' must hold a list of objects; copy the folder again")
    return value


def _integer(folder: Path, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"'{folder / 'config.json'}': {key} must be a positive integer, got {shown(value)}")
    if value > MAX_INTEGER:
        raise CheckpointError(f"'{folder / 'config.json'}': {key} must be at most {MAX_INTEGER}, got {shown(value)}")
    return value


def _flag(folder: Path, config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value not in (None, True, False):
        raise CheckpointError(f"'{folder}': {key} must be true or false, got {shown(value)}; copy the folder again")
    return bool(value)


def _inside(folder: Path, name: str) -> Path:
    """Return the path of a name from a file of the folder. Symbolic links may lead outside, as in a download cache."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(f"'{folder}' names '{name}', which is outside of it; copy the whole folder")
    return folder / name
