"""The tokenizer of the atlas policy: byte-level BPE of 4,096 entries with Qwen's special tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from atlas.policy.teacher import Scene, Teacher
from atlas.policy.worlds import Names, make_world
from atlas.scenes import RELATIONS
from gog_edge.exporting.policy.chat_template import CHATML
from gog_edge.files import write_json
from gog_edge.policy.dialect.dialect import Dialect
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.types import Box

VOCABULARY = 4096  # entries
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
# Up to three digits form one token, so that a pixel coordinate is a single prediction.
_SPLIT = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s"


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a token. Raises ValueError if the tokenizer does not have it."""
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer does not have the token '{token}'; run python -m atlas.train_tokenizer again")
    return found


def dialect_tags(dialect: Dialect) -> list[str]:
    """Return the tags of the dialect, each of which is a single token."""
    tags = dialect.tags
    found = [*tags.reason, *tags.answer, *tags.text_search, *tags.image_search, tags.whole_picture]
    return [*found, dialect.observation.open.strip(), dialect.observation.close.strip()]


def train_tokenizer(texts: Iterable[str], dialect: Dialect, vocabulary: int = VOCABULARY) -> Tokenizer:
    """Train the tokenizer; the numbers 0..999 are always single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(dialect_tags(dialect)),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numbers = (" ".join(str(n) for n in range(1000)) for _ in range(400))
    tokenizer.train_from_iterator((text for source in (texts, numbers) for text in source), trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in dialect_tags(dialect)])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template as in a Hugging Face checkpoint."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 2048,
            "clean_up_tokenization_spaces": False,
        },
    )


def trajectory_texts(names: Names, count: int, seed: int = 0) -> Iterator[str]:
    """Yield the texts of `count` trajectories; their pictures are blank."""
    rng = np.random.default_rng([seed, 21])
    teacher = Teacher(load_dialect("atlas"), rng)
    picture = np.zeros((196, 252, 3), np.uint8)
    boxes = (Box(7, 7, 91, 70), Box(133, 28, 210, 84))
    for _ in range(count):
        relations = dict.fromkeys(RELATIONS, 0) | {"right1": 1, "bottom1": 1}
        turns = teacher.trajectory(Scene(picture, boxes, relations), make_world(rng, names))
        yield "system user assistant assistant user"  # the roles of the chat format
        yield from (segment for turn in turns for segment in turn.segments if isinstance(segment, str))
