"""Trajectories to tensors: tokens, m-rope positions, labels, pictures; and the forward over a batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from atlas.policy.model import CELL, CROP_PIXELS, PIXEL_SPEC, encode_pictures, picture_tensor
from atlas.policy.teacher import Turn
from gog_edge.policy.manifest import ChatFormat
from gog_edge.policy.session import image_positions, text_positions
from gog_edge.policy.vision import resize, smart_resize
from gog_edge.types import Box, Pixels, Size

IGNORE = -100
LENGTH_STEP = 32  # tokens
CHAT = ChatFormat(
    system_open="<|im_start|>system\n",
    system_close="<|im_end|>\n",
    user_open="<|im_start|>user\n",
    user_close="<|im_end|>\n",
    assistant_open="<|im_start|>assistant\n",
    assistant_close="<|im_end|>\n",
    image_open="<|vision_start|>",
    image_token="<|image_pad|>",
    image_close="<|vision_end|>",
    eos="<|im_end|>",
)


@dataclass(frozen=True, slots=True)
class Look:
    """Tokens that are written from others: from those of the flag that is meant, or of the name that is copied."""

    writers: tuple[int, ...]  # places in the sequence; each predicts the token after it
    targets: tuple[int, ...]


@dataclass
class Encoded:
    """One trajectory in tokens; pictures by the place of their first token."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)  # each [3, n]
    pictures: list[tuple[int, Pixels]] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)  # at the first picture
    copies: list[Look] = field(default_factory=list)  # of text that was said before
    start: int = 0  # position of the first token
    _next: int = field(init=False)

    def __post_init__(self) -> None:
        self._next = self.start

    def add(self, ids: Sequence[int], learn: bool = False) -> None:
        """Append text."""
        self.ids += ids
        self.labels += ids if learn else [IGNORE] * len(ids)
        self.positions.append(text_positions(self._next, len(ids)))
        self._next += len(ids)

    def add_picture(self, pixels: Pixels, token: int) -> None:
        """Append a picture whose sides are multiples of CELL."""
        rows, columns = pixels.shape[0] // CELL, pixels.shape[1] // CELL
        self.pictures.append((len(self.ids), pixels))
        self.ids += [token] * (rows * columns)
        self.labels += [IGNORE] * (rows * columns)
        self.positions.append(image_positions(self._next, rows, columns))
        self._next += max(rows, columns)

    def add_look(self, begin: int, box: Box) -> None:
        """Tokens from `begin` on write a look at a box of the first picture; boxes without a token centre are left."""
        place, pixels = self.pictures[0]
        columns = pixels.shape[1] // CELL
        centres = [
            (k, (k % columns + 0.5) * CELL, (k // columns + 0.5) * CELL)
            for k in range(pixels.shape[0] // CELL * columns)
        ]
        targets = [place + k for k, x, y in centres if box.x0 <= x < box.x1 and box.y0 <= y < box.y1]
        if targets:
            self.looks.append(Look(tuple(range(begin, len(self.ids))), tuple(targets)))

    def add_copies(self, said: Sequence[int], begin: int) -> None:
        """From `begin` on `said` stands once more; wherever it stands before is where it may be read."""
        stands = _places(self.ids, said)
        for at in stands[1:]:
            sources = [place for place in stands if place < at]
            for k in range(len(said) if at >= begin else 0):
                self.copies.append(Look((at + k - 1,), tuple(source + k for source in sources)))


def _places(ids: Sequence[int], part: Sequence[int]) -> list[int]:
    """Where `part` begins in `ids`."""
    size = len(part)
    return [k for k in range(len(ids) - size + 1) if ids[k] == part[0] and ids[k : k + size] == list(part)]


class Encoder:
    """Tokenizes turns piece by piece, exactly as the live session appends them."""

    def __init__(self, tokenizer: Tokenizer, system_prompt: str, look_mark: str = "<img_search>") -> None:
        self._tokenizer = tokenizer
        tokenizer.encode_special_tokens = False  # only the chat format's strings hold special tokens
        self.vocabulary = tokenizer.get_vocab_size()
        self.image = tokenizer.token_to_id("<|image_pad|>")
        self._markup = {text: self._ids(text) for text in (CHAT.system_open, CHAT.system_close, CHAT.user_open,
                        CHAT.assistant_open, CHAT.image_open, CHAT.image_close)}  # fmt: skip
        tokenizer.encode_special_tokens = True
        self._system = self._ids(system_prompt)
        self._look = tokenizer.token_to_id(look_mark)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, turns: Sequence[Turn], *, pictures: bool = True) -> Encoded:
        """One trajectory. Without `pictures` they are left out (teaching the language alone)."""
        out = Encoded()
        markup = self._markup
        close = markup[CHAT.system_close]
        out.add([*markup[CHAT.system_open], *self._system, *close])
        first = True
        for turn in turns:
            said = turn.role == "assistant"
            out.add(markup[CHAT.assistant_open if said else CHAT.user_open])
            begin = len(out.ids)
            for segment in turn.segments:
                if isinstance(segment, str):
                    out.add(self._ids(segment), turn.learn)
                elif pictures:
                    self._picture(out, segment, whole=first)
                    first = False
            if turn.looks_at is not None and turn.learn and out.pictures:
                mark = next((k for k in range(begin, len(out.ids)) if out.ids[k] == self._look), begin)
                out.add_look(mark, turn.looks_at)
            for words in turn.copies if turn.learn else ():
                out.add_copies(self._ids(" " + words), begin)
            out.add(close[:1], turn.learn)
            out.add(close[1:])
        return out

    def _picture(self, out: Encoded, pixels: Pixels, *, whole: bool) -> None:
        if not whole:
            pixels = crop_view(pixels)
        out.add(self._markup[CHAT.image_open])
        out.add_picture(pixels, self.image)
        out.add(self._markup[CHAT.image_close])


def crop_view(pixels: Pixels) -> Pixels:
    """A crop as the policy sees it again."""
    return resize(pixels, smart_resize(Size(pixels.shape[1], pixels.shape[0]), PIXEL_SPEC, CROP_PIXELS))


@dataclass(frozen=True, slots=True)
class Attended:
    """Looks of a batch, padded to the most that a row has."""

    writers: Tensor  # [B, W] int64
    valid: Tensor  # [B, W] bool
    targets: Tensor  # [B, W, L] bool


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded trajectories."""

    ids: Tensor  # [B, L] int64
    labels: Tensor  # [B, L] int64, -100 where nothing is learned; aligned with ids
    positions: Tensor  # [3, B, L] int64
    pictures: list[tuple[int, int, Pixels]]  # row, place of the first token, pixels
    looks: Attended
    copies: Attended


def collate(encoded: Sequence[Encoded], pad: int) -> Batch:
    """Stack trajectories of about one length."""
    # Few different shapes: each new one costs the CPU's kernels a compilation.
    length = -(-max(len(item.ids) for item in encoded) // LENGTH_STEP) * LENGTH_STEP
    ids = np.full((len(encoded), length), pad)
    labels = np.full((len(encoded), length), IGNORE)
    positions = np.zeros((3, len(encoded), length), np.int64)
    pictures = []
    for row, item in enumerate(encoded):
        count = len(item.ids)
        ids[row, :count] = item.ids
        labels[row, :count] = item.labels
        positions[:, row, :count] = np.concatenate(item.positions, 1)
        pictures += [(row, place, pixels) for place, pixels in item.pictures]
    looks, copies = (_attended(rows, length) for rows in zip(*((e.looks, e.copies) for e in encoded), strict=True))
    return Batch(
        torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(positions), pictures, looks, copies
    )


def _attended(rows: Sequence[Sequence[Look]], length: int) -> Attended:
    width = max((sum(len(look.writers) for look in row) for row in rows), default=0)
    writers = np.zeros((len(rows), width), np.int64)
    valid = np.zeros((len(rows), width), np.bool_)
    targets = np.zeros((len(rows), width, length), np.bool_)
    for row, looks in enumerate(rows):
        at = 0
        for look in looks:
            count = len(look.writers)
            writers[row, at : at + count], valid[row, at : at + count] = look.writers, True
            targets[row, at : at + count, list(look.targets)] = True
            at += count
    return Attended(*(torch.from_numpy(array) for array in (writers, valid, targets)))


def embed(model: Any, batch: Batch, *, tower_learns: bool) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
    """Input embeddings [B, L, hidden] with the pictures in place, and each picture's tokens by (row, place)."""
    embeds = model.model.language_model.embed_tokens(batch.ids)
    groups: dict[tuple[int, ...], list[tuple[int, int, Pixels]]] = defaultdict(list)
    for item in batch.pictures:
        groups[item[2].shape].append(item)
    tokens: dict[tuple[int, int], Tensor] = {}
    with torch.set_grad_enabled(tower_learns and torch.is_grad_enabled()):
        for items in groups.values():
            encoded = encode_pictures(model.model.visual, picture_tensor(np.stack([item[2] for item in items])))
            for (row, place, _), picture in zip(items, encoded, strict=True):
                tokens[row, place] = picture
    rows = torch.cat([torch.full((len(t),), row) for (row, _), t in tokens.items()]) if tokens else None
    if rows is not None:
        columns = torch.cat([torch.arange(place, place + len(t)) for (_, place), t in tokens.items()])
        embeds = embeds.index_put((rows, columns), torch.cat(list(tokens.values())).to(embeds.dtype))
    return embeds, tokens


def decode_states(model: Any, embeds: Tensor, positions: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Final hidden states [B, L, hidden], and those after each layer."""
    after: list[Tensor] = []
    language = model.model.language_model
    hooks = [layer.register_forward_hook(lambda *a: after.append(a[2])) for layer in language.layers]
    try:
        states = language(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return states, after


def token_loss(model: nn.Module, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Next-token loss over learned places only; also the predictions and the truth there [n]."""
    target = labels[:, 1:].flatten()
    places = (target != IGNORE).nonzero()[:, 0]
    spare = -len(places) % (8 * LENGTH_STEP)  # again: few different shapes
    padded = F.pad(places, (0, spare))
    logits = model.lm_head(states[:, :-1].flatten(0, 1)[padded])[: len(places)].float()
    truth = target[places]
    return F.cross_entropy(logits, truth), logits.argmax(-1), truth
