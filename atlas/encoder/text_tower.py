"""Training of the text tower towards the embeddings of the clean flags, and the checkpoint that open_clip can load.

The image tower is frozen, so that the text tower cannot impair it; the training takes one or two minutes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional

from atlas.encoder.flagset import FlagSet, captions_of
from atlas.encoder.image_tower import SIDE, embed_images
from gog_edge.files import write_json

NAME = "atlas-flags"
PAD, START, END = "<pad>", "<start>", "<end>"  # ids 0, 1, 2
SCALE = 20.0  # factor on cosines in the softmax


def train_tokenizer(texts: Sequence[str], size: int) -> Tokenizer:
    """Train a lower-case byte-level BPE tokenizer of `size` entries that adds START and END."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, 1), (END, 2)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> NDArray[np.int64]:
    """Tokenize texts, truncated and padded to `length`: [n, length] int64."""
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=0)
    return np.array([encoding.ids for encoding in tokenizer.encode_batch(list(texts))], dtype=np.int64)


def train_texts(
    model: nn.Module,
    tokens: NDArray[np.int64],
    groups: NDArray[np.int64],
    targets: Tensor,
    *,
    steps: int,
    batch: int = 128,
    rate: float = 2e-3,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> None:
    """Train the parameters of `model` outside its image tower.

    Args:
        model: an open_clip CLIP.
        tokens: captions [captions, context_length] int64.
        groups: the row of `targets` for each caption [captions] int64.
        targets: embeddings of the clean flags [groups, dim], of unit length.
        steps: number of batches.
        batch: captions per step.
        rate: highest learning rate.
        seed: for sampling captions.
        report: called every 100 steps with the step and the loss.
    """
    weights = [value for name, value in model.named_parameters() if not name.startswith("visual.")]
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng([seed, 41])
    by_group = [np.flatnonzero(groups == group) for group in range(len(targets))]
    model.train()
    for step in range(steps):
        # Sample groups uniformly, independent of how many countries share a flag.
        chosen = np.array([rng.choice(by_group[group]) for group in rng.integers(len(targets), size=batch)])
        rows = tokens[chosen]
        features = encode_short(model, torch.from_numpy(rows[:, : int((rows != 0).sum(1).max())]))
        cosines = features @ targets.T
        wanted = torch.from_numpy(groups[chosen])
        distance = 1 - cosines.gather(1, wanted[:, None]).mean()
        loss = functional.cross_entropy(SCALE * cosines, wanted) + distance
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if report is not None and (step + 1) % 100 == 0:
            report(step + 1, loss.item())
    model.eval()


def encode_short(model: Any, tokens: Tensor) -> Tensor:
    """Embed token rows of any length up to the context: [n, dim] of unit length.

    Equal to open_clip's `encode_text` of the padded rows, because the attention is causal.
    """
    length = tokens.shape[1]
    positions, mask = model.positional_embedding[:length], model.attn_mask[:length, :length]
    hidden = model.transformer(model.token_embedding(tokens) + positions, attn_mask=mask)
    hidden = model.ln_final(hidden)
    ends = torch.eq(tokens, model.text_eos_id).int().argmax(-1)
    return functional.normalize(hidden[torch.arange(len(tokens)), ends] @ model.text_projection, dim=-1)


def clean_targets(tower: nn.Module, flagset: FlagSet) -> torch.Tensor:
    """Return the mean embedding of the clean flags of every group: [groups, dim] of unit length."""
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
    """Train the text tower for a finished image tower and write the checkpoint.

    Args:
        config: `model_cfg` and `preprocess_cfg` of open_clip.
        tower_state: weights of the image tower.
        flagset: flags and captions.
        out: folder of the checkpoint.
        steps: of the text training.
        report: called with step and loss.

    Returns:
        The fraction of captions whose nearest flag is the right one.
    """
    from open_clip.model import CLIP

    captions, owners = [], []
    for country, group in zip(flagset.countries, flagset.groups, strict=True):
        own = captions_of(country)
        captions += own
        owners += [group] * len(own)
    groups = np.array(owners)
    settings = config["model_cfg"]
    tokenizer = train_tokenizer(captions, settings["text_cfg"]["vocab_size"])
    tokens = encode(tokenizer, captions, settings["text_cfg"]["context_length"])
    model = CLIP(**settings)
    model.visual.load_state_dict(tower_state)
    model.visual.requires_grad_(False)
    # The repository stores weights as float16. Train the text tower against the rounded image tower.
    _round_to_half(model.visual)
    targets = clean_targets(model.visual.eval(), flagset)
    train_texts(model, tokens, groups, targets, steps=steps, report=report)
    _write(model, config, tokenizer, out)
    with torch.no_grad():
        features = torch.cat([encode_short(model, torch.from_numpy(part)) for part in np.array_split(tokens, 32)])
    return float(((features @ targets.T).argmax(1).numpy() == groups).mean())


def _round_to_half(module: nn.Module) -> None:
    for value in module.parameters():
        value.data = value.data.half().float()


def _write(model: nn.Module, config: Mapping[str, Any], tokenizer: Any, out: Path) -> None:
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    weights = {name for name, _ in model.named_parameters()}
    # Batch statistics stay in float32, because small variances underflow in float16.
    state = {
        name: (value.half() if name in weights and value.ndim else value).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(state, out / "open_clip_model.safetensors")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(out / "tokenizer.json"))
    settings = json.loads(json.dumps(config))
    settings["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = NAME  # makes open_clip read tokenizer.json of the folder
    write_json(out / "open_clip_config.json", {"name": NAME, **settings})
    names = {"pad_token": PAD, "bos_token": START, "eos_token": END}
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
