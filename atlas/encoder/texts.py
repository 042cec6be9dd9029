"""Training of the text tower: captions are drawn to the clean flag of their country, the image tower staying as it is.

So pictures are never the worse for it, and it takes a minute or two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional

from atlas.countries import Country

PAD, START, END = "<pad>", "<start>", "<end>"  # ids 0, 1, 2
TEMPLATES = (
    "{}", "the flag of {}", "flag of {}", "{} flag", "the national flag of {}", "a picture of the flag of {}",
    "a photo of the flag of {}", "this is the flag of {}", "{} national flag", "country {}", "a flag: {}",
    "the capital of {}", "capital of {}", "{} capital city", "the currency of {}", "{} currency", "{} population",
    "the area of {}", "languages of {}", "{} neighbours", "{} internet domain", "{} dialling code", "where is {}",
    "what is the capital of {}?", "what currency is used in {}?", "how many people live in {}?",
)  # fmt: skip
PLAIN = 11  # the first templates name the flag and nothing else
SCALE = 20.0


def names_of(country: Country) -> tuple[str, ...]:
    """The name and the longer aliases (a code of two letters is no name that one would search for)."""
    return tuple(dict.fromkeys((country.name, *(alias for alias in country.aliases if len(alias) > 3))))


def captions_of(country: Country) -> list[str]:
    """Every caption of one country."""
    captions = [template.format(name) for name in names_of(country) for template in TEMPLATES]
    if country.capital:
        captions.append(f"the flag of the country whose capital is {country.capital}")
    return captions


def train_tokenizer(texts: Sequence[str], size: int) -> Tokenizer:
    """Byte-level BPE of `size` entries, lower case, with start and end marks."""
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
    """[n, length] int64."""
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
    """Train all of `model` but its image tower.

    Args:
        model: an open_clip CLIP.
        tokens: [captions, context_length] int64.
        groups: [captions] int64, the row of `targets` each caption belongs to.
        targets: [groups, dim] of unit length: the clean flags.
        steps: how many batches.
        batch: captions a step.
        rate: highest learning rate.
        seed: of the choice of captions.
        report: called every 100 steps with the step and the loss.
    """
    weights = [value for name, value in model.named_parameters() if not name.startswith("visual.")]
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng([seed, 41])
    by_group = [np.flatnonzero(groups == group) for group in range(len(targets))]
    model.train()
    for step in range(steps):
        # Groups alike, however many countries share a flag.
        chosen = np.array([rng.choice(by_group[group]) for group in rng.integers(len(targets), size=batch)])
        rows = tokens[chosen]
        features = encode_short(model, torch.from_numpy(rows[:, : int((rows != 0).sum(1).max())]))
        cosines = features @ targets.T
        wanted = torch.from_numpy(groups[chosen])
        near = 1 - cosines.gather(1, wanted[:, None]).mean()
        loss = functional.cross_entropy(SCALE * cosines, wanted) + near
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if report is not None and (step + 1) % 100 == 0:
            report(step + 1, loss.item())
    model.eval()


def encode_short(model: nn.Module, tokens: Tensor) -> Tensor:
    """`encode_text` of open_clip for rows cut to their longest: causal, so the rest would change nothing."""
    length = tokens.shape[1]
    positions, mask = model.positional_embedding[:length], model.attn_mask[:length, :length]
    hidden = model.transformer(model.token_embedding(tokens) + positions, attn_mask=mask)
    hidden = model.ln_final(hidden)
    ends = (tokens == model.text_eos_id).int().argmax(-1)
    return functional.normalize(hidden[torch.arange(len(tokens)), ends] @ model.text_projection, dim=-1)
