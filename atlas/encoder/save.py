"""The trained encoder as a folder that open_clip itself can load: configuration, weights, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from atlas.encoder import texts
from atlas.encoder.flagset import FlagSet
from atlas.encoder.run import SIDE, embed_images
from gog_edge.files import write_json

NAME = "atlas-flags"


def clean_targets(tower: nn.Module, flagset: FlagSet) -> torch.Tensor:
    """[groups, dim] of unit length: the clean flag of every group."""
    clean = torch.from_numpy(embed_images(tower, flagset.flags, SIDE))
    groups = torch.tensor(flagset.groups)
    rows = [clean[groups == group].mean(0) for group in range(int(groups.max()) + 1)]
    return functional.normalize(torch.stack(rows), dim=-1)


def finish(
    config: Mapping[str, Any],
    tower_state: Mapping[str, torch.Tensor],
    flagset: FlagSet,
    out: Path,
    *,
    steps: int,
    report: Callable[[int, float], None],
) -> float:
    """Train the text tower to a finished image tower and write the folder; returns the share of right captions."""
    from open_clip.model import CLIP

    captions, owners = [], []
    for country, group in zip(flagset.countries, flagset.groups, strict=True):
        mine = texts.captions_of(country)
        captions += mine
        owners += [group] * len(mine)
    groups = np.array(owners)
    settings = config["model_cfg"]
    tokenizer = texts.train_tokenizer(captions, settings["text_cfg"]["vocab_size"])
    tokens = texts.encode(tokenizer, captions, settings["text_cfg"]["context_length"])
    model = CLIP(**settings)
    model.visual.load_state_dict(tower_state)
    model.visual.requires_grad_(False)
    # Weights are kept in half precision in the repository; the towers must be what is kept.
    _round(model.visual)
    targets = clean_targets(model.visual.eval(), flagset)
    texts.train_texts(model, tokens, groups, targets, steps=steps, report=report)
    _write(model, config, tokenizer, out)
    with torch.no_grad():
        features = torch.cat([texts.encode_short(model, torch.from_numpy(part)) for part in np.array_split(tokens, 32)])
    return float(((features @ targets.T).argmax(1).numpy() == groups).mean())


def _round(module: nn.Module) -> None:
    for value in module.parameters():
        value.data = value.data.half().float()


def _write(model: nn.Module, config: Mapping[str, Any], tokenizer: Any, out: Path) -> None:
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    weights = {name for name, _ in model.named_parameters()}
    # Batch statistics stay in full precision: small variances would be lost.
    state = {
        name: (value.half() if name in weights and value.ndim else value).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(state, out / "open_clip_model.safetensors")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(out / "tokenizer.json"))
    settings = json.loads(json.dumps(config))
    settings["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = NAME  # open_clip then reads the folder's tokenizer
    write_json(out / "open_clip_config.json", {"name": NAME, **settings})
    names = {"pad_token": texts.PAD, "bos_token": texts.START, "eos_token": texts.END}
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
