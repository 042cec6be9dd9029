"""Convert trajectories to tensors (tokens, m-rope positions, labels, pictures) and run the model on a batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from atlas.policy.model import CELL, CROP_PIXELS, PIXEL_SPEC, encode_pictures, picture_tensor
from atlas.policy.teacher import Turn
from atlas.policy.tokenizer import token_id
from gog_edge.picture import resize
from gog_edge.policy.manifest import ChatFormat
from gog_edge.policy.session import image_positions, text_positions
from gog_edge.policy.vision import smart_resize
from gog_edge.types import Box, Pixels, Size

IGNORE = -100  # label of positions without loss, as in torch's cross_entropy
LENGTH_STEP = 32  # tokens; lengths are padded to multiples of it
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
class AttentionTarget:
    """Supervision of attention: while the next token is written, some heads should attend to the given keys."""

    queries: tuple[int, ...]  # positions in the sequence; each predicts the token after it
    keys: tuple[int, ...]  # positions of the flag's picture tokens, or of the token that is copied


@dataclass
class TokenizedTrajectory:
    """One trajectory in tokens."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)  # m-rope positions, each [3, n]
    pictures: list[tuple[int, Pixels]] = field(default_factory=list)  # index of the first token, pixels
    gaze_targets: list[AttentionTarget] = field(default_factory=list)  # keys in the first picture
    copy_targets: list[AttentionTarget] = field(default_factory=list)  # keys in earlier text
    start: int = 0  # position of the first token
    _next: int = field(init=False)

    def __post_init__(self) -> None:
        self._next = self.start

    def add(self, ids: Sequence[int], learn: bool = False) -> None:
        """Append text tokens; `learn` makes them labels."""
        self.ids += ids
        self.labels += ids if learn else [IGNORE] * len(ids)
        self.positions.append(text_positions(self._next, len(ids)))
        self._next += len(ids)

    def add_picture(self, pixels: Pixels, token: int) -> None:
        """Append a picture whose sides are multiples of CELL; `token` is the id of an image token."""
        rows, columns = pixels.shape[0] // CELL, pixels.shape[1] // CELL
        self.pictures.append((len(self.ids), pixels))
        self.ids += [token] * (rows * columns)
        self.labels += [IGNORE] * (rows * columns)
        self.positions.append(image_positions(self._next, rows, columns))
        self._next += max(rows, columns)

    def add_gaze_target(self, begin: int, box: Box) -> None:
        """Supervise the tokens from `begin` to the end, which write a gaze at `box` of the first picture.

        Without effect if the box contains the centre of no picture token.
        """
        place, pixels = self.pictures[0]
        columns = pixels.shape[1] // CELL
        centres = [
            (k, (k % columns + 0.5) * CELL, (k // columns + 0.5) * CELL)
            for k in range(pixels.shape[0] // CELL * columns)
        ]
        keys = [place + k for k, x, y in centres if box.x0 <= x < box.x1 and box.y0 <= y < box.y1]
        if keys:
            self.gaze_targets.append(AttentionTarget(tuple(range(begin, len(self.ids))), tuple(keys)))

    def add_copy_targets(self, words: Sequence[int], begin: int) -> None:
        """Supervise every occurrence of `words` from `begin` on that has an earlier occurrence to copy from."""
        occurrences = _occurrences(self.ids, words)
        for at in occurrences[1:]:
            sources = [place for place in occurrences if place < at]
            for k in range(len(words) if at >= begin else 0):
                self.copy_targets.append(AttentionTarget((at + k - 1,), tuple(source + k for source in sources)))


def _occurrences(ids: Sequence[int], part: Sequence[int]) -> list[int]:
    """Return the indices at which `part` begins in `ids`."""
    size = len(part)
    return [k for k in range(len(ids) - size + 1) if ids[k] == part[0] and ids[k : k + size] == list(part)]


class TrajectoryTokenizer:
    """Tokenizes turns piece by piece, exactly as the runtime's session appends them."""

    def __init__(self, tokenizer: Tokenizer, system_prompt: str, gaze_tag: str = "<img_search>") -> None:
        self._tokenizer = tokenizer
        tokenizer.encode_special_tokens = False  # only the strings of the chat format contain special tokens
        self.vocabulary = tokenizer.get_vocab_size()
        self.image = token_id(tokenizer, "<|image_pad|>")
        self._markup = {text: self._ids(text) for text in (CHAT.system_open, CHAT.system_close, CHAT.user_open,
                        CHAT.assistant_open, CHAT.image_open, CHAT.image_close)}  # fmt: skip
        tokenizer.encode_special_tokens = True
        self._system = self._ids(system_prompt)
        self._gaze_tag: int | None = tokenizer.token_to_id(gaze_tag)  # None: the tag is several tokens

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, turns: Sequence[Turn], *, pictures: bool = True) -> TokenizedTrajectory:
        """Tokenize one trajectory; `pictures=False` leaves the pictures out, to train the language alone."""
        out = TokenizedTrajectory()
        markup = self._markup
        close = markup[CHAT.system_close]
        out.add([*markup[CHAT.system_open], *self._system, *close])
        first = True
        for turn in turns:
            out.add(markup[CHAT.assistant_open if turn.role == "assistant" else CHAT.user_open])
            begin = len(out.ids)
            for segment in turn.segments:
                if isinstance(segment, str):
                    out.add(self._ids(segment), turn.learn)
                elif pictures:
                    self._picture(out, segment, whole=first)
                    first = False
            if turn.gaze_box is not None and turn.learn and out.pictures:
                tag = next((k for k in range(begin, len(out.ids)) if out.ids[k] == self._gaze_tag), begin)
                out.add_gaze_target(tag, turn.gaze_box)
            for words in turn.copied if turn.learn else ():
                out.add_copy_targets(self._ids(" " + words), begin)
            out.add(close[:1], turn.learn)
            out.add(close[1:])
        return out

    def _picture(self, out: TokenizedTrajectory, pixels: Pixels, *, whole: bool) -> None:
        if not whole:
            pixels = crop_view(pixels)
        out.add(self._markup[CHAT.image_open])
        out.add_picture(pixels, self.image)
        out.add(self._markup[CHAT.image_close])


def crop_view(pixels: Pixels) -> Pixels:
    """Resize a crop to the resolution in which the policy sees it again."""
    return resize(pixels, smart_resize(Size(pixels.shape[1], pixels.shape[0]), PIXEL_SPEC, CROP_PIXELS))


@dataclass(frozen=True, slots=True)
class AttentionTargets:
    """The attention targets of a batch, padded to the largest number W of queries in a row."""

    queries: Tensor  # [B, W] int64
    valid: Tensor  # [B, W] bool
    keys: Tensor  # [B, W, L] bool


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded trajectories."""

    ids: Tensor  # [B, L] int64
    labels: Tensor  # [B, L] int64, aligned with ids; IGNORE at positions without loss
    positions: Tensor  # [3, B, L] int64
    pictures: list[tuple[int, int, Pixels]]  # row, index of the first token, pixels
    gaze_targets: AttentionTargets
    copy_targets: AttentionTargets


def collate(trajectories: Sequence[TokenizedTrajectory], pad: int) -> Batch:
    """Stack trajectories of similar length, right-padded with the token `pad`."""
    # Multiples of LENGTH_STEP limit the number of different shapes: the CPU kernels are compiled for each.
    length = -(-max(len(item.ids) for item in trajectories) // LENGTH_STEP) * LENGTH_STEP
    ids = np.full((len(trajectories), length), pad)
    labels = np.full((len(trajectories), length), IGNORE)
    positions = np.zeros((3, len(trajectories), length), np.int64)
    pictures = []
    for row, item in enumerate(trajectories):
        count = len(item.ids)
        ids[row, :count] = item.ids
        labels[row, :count] = item.labels
        positions[:, row, :count] = np.concatenate(item.positions, 1)
        pictures += [(row, place, pixels) for place, pixels in item.pictures]
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(labels),
        torch.from_numpy(positions),
        pictures,
        _pad_targets([item.gaze_targets for item in trajectories], length),
        _pad_targets([item.copy_targets for item in trajectories], length),
    )


def _pad_targets(rows: Sequence[Sequence[AttentionTarget]], length: int) -> AttentionTargets:
    width = max((sum(len(target.queries) for target in row) for row in rows), default=0)
    queries = np.zeros((len(rows), width), np.int64)
    valid = np.zeros((len(rows), width), np.bool_)
    keys = np.zeros((len(rows), width, length), np.bool_)
    for row, targets in enumerate(rows):
        at = 0
        for target in targets:
            count = len(target.queries)
            queries[row, at : at + count], valid[row, at : at + count] = target.queries, True
            keys[row, at : at + count, list(target.keys)] = True
            at += count
    return AttentionTargets(*(torch.from_numpy(array) for array in (queries, valid, keys)))


def embed(model: Any, batch: Batch, *, train_tower: bool) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
    """Embed tokens and pictures.

    Args:
        model: Qwen2.5-VL of transformers.
        batch: the trajectories.
        train_tower: whether gradients flow into the vision tower.

    Returns:
        Input embeddings [B, L, hidden] with the pictures inserted, and each picture's tokens by (row, first index).
    """
    embeds = model.model.language_model.embed_tokens(batch.ids)
    groups: dict[tuple[int, ...], list[tuple[int, int, Pixels]]] = defaultdict(list)
    for item in batch.pictures:
        groups[item[2].shape].append(item)
    tokens: dict[tuple[int, int], Tensor] = {}
    with torch.set_grad_enabled(train_tower and torch.is_grad_enabled()):
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
    """Run the decoder; return the final hidden states [B, L, hidden] and those after each layer."""
    after: list[Tensor] = []
    language = model.model.language_model
    hooks = [layer.register_forward_hook(lambda *a: after.append(a[2])) for layer in language.layers]
    try:
        states = language(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return states, after
