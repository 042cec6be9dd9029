"""Our own session as one more engine in the race."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.base import Answer, Turn
from gog_edge.engines.base import Floats
from gog_edge.engines.onnx.decoder import OrtDecoder
from gog_edge.policy.decoding import Unconstrained
from gog_edge.policy.draft_cost import drafts_here
from gog_edge.policy.manifest import DECODER_GRAPH, NATIVE_DECODER_GRAPH
from gog_edge.policy.model import PolicyModel
from gog_edge.policy.session import Session

TYPE_BYTES = {"tensor(float)": 4, "tensor(float16)": 2, "tensor(uint16)": 2, "tensor(int8)": 1, "tensor(uint8)": 1}


@dataclass(frozen=True, slots=True)
class Script:
    """A chooser that knows what will be said: the logits of random weights mean nothing."""

    start: int  # tokens of the conversation before the answer
    answer: Answer

    def choose(self, logits: Floats, said: Sequence[int]) -> int:
        """The next token of the script."""
        return self.answer.tokens[len(said) - self.start]


@dataclass(slots=True)
class Scaffold(Unconstrained):
    """A constraint that stands for a dialect's grammar: it forces what the script marks as forced."""

    answer: Answer
    place: int = 0

    def forced(self) -> Sequence[int]:
        """The marked tokens that come next."""
        end = self.place
        while end in self.answer.forced:
            end += 1
        return self.answer.tokens[self.place : end]

    def accept(self, token: int) -> None:
        """Go on."""
        self.place += 1


class Ours:
    """One conversation; says exactly the answers it is given."""

    def __init__(self, name: str, model: PolicyModel, *, quick: bool = True, stateless: bool = False) -> None:
        """`quick`: drafts, and forced tokens appended in one step; `stateless`: every turn computes all again."""
        self.name = name
        self._drafts = drafts_here(model) if quick else None
        self.about = f"{model.manifest.precision}, {'drafts and forced tokens' if quick else 'one token a step'}"
        self.about += ", all prefilled again each turn" if stateless else ", live session"
        if self._drafts:
            self.about += f", n guesses cost {self._drafts.setup} + {self._drafts.cost} n of a step"
        self.drafted = self.accepted = 0
        self._quick, self._stateless = quick, stateless
        self._session = Session(model.decoder)
        self._empty = self._session.mark()

    def reset(self) -> None:
        """Forget the conversation."""
        self._session.rollback(self._empty)

    def turn(self, tokens: Sequence[int], answer: Answer) -> Turn:
        """Append and say the answer."""
        if self._stateless:
            before = list(self._session.tokens)
            self.reset()
            self._session.append_tokens(before)
        self._session.append_tokens(tokens)
        said = self._session.generate(
            max_tokens=len(answer.tokens),
            chooser=Script(len(self._session.tokens), answer),
            constraint=Scaffold(answer) if self._quick else None,
            drafts=self._drafts,
        )
        self.drafted += said.drafted
        self.accepted += said.accepted
        return Turn(said.prefill_ms / 1e3, said.decode_ms / 1e3, len(said.tokens))

    def close(self) -> None:
        """Nothing of its own to end."""


def bytes_a_token(folder: Path, model: PolicyModel, context: int) -> int:
    """What decoding one token must read: the decoder's weights and the keys and values of `context` tokens."""
    graph = NATIVE_DECODER_GRAPH if model.manifest.native_here else DECODER_GRAPH
    weights = sum(path.stat().st_size for path in folder.glob(f"{graph}*"))
    text, engine = model.manifest.text, model.decoder.engine
    size = 4
    if isinstance(engine, OrtDecoder):
        size = next(TYPE_BYTES[item.type] for item in engine.session.get_inputs() if item.name.startswith("past_"))
    return weights + 2 * text.layers * text.kv_heads * text.head_dim * size * context
