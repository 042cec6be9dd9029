"""Our session as an engine of the comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.base import Turn
from benchmarks.peers.workload import Answer, ScriptedConstraint, ScriptedSampler
from gog_edge.engines.onnx.decoder import OrtDecoder
from gog_edge.policy.draft_cost import load_draft_config
from gog_edge.policy.manifest import DECODER_GRAPH, NATIVE_DECODER_GRAPH
from gog_edge.policy.model import PolicyModel
from gog_edge.policy.session import Session

TYPE_BYTES = {"tensor(float)": 4, "tensor(float16)": 2, "tensor(uint16)": 2, "tensor(int8)": 1, "tensor(uint8)": 1}


class SessionEngine:
    """One conversation that generates exactly the given answers.

    Args:
        name: in the results.
        model: an open policy.
        speculative: decode with drafts, and append forced tokens in one step.
        stateless: prefill the whole conversation again in every turn.
    """

    def __init__(self, name: str, model: PolicyModel, *, speculative: bool = True, stateless: bool = False) -> None:
        self.name = name
        self._drafts = load_draft_config(model) if speculative else None
        mode = "drafts and forced tokens" if speculative else "one token per step"
        state = "whole conversation prefilled each turn" if stateless else "live session"
        self.about = f"{model.manifest.precision}, {mode}, {state}"
        if self._drafts:
            self.about += f", n draft tokens cost {self._drafts.setup_cost} + {self._drafts.token_cost} n of a step"
        self.drafted = self.accepted = 0  # tokens
        self._speculative, self._stateless = speculative, stateless
        self._session = Session(model.decoder)
        self._empty = self._session.savepoint()

    def reset(self) -> None:
        """Start a new conversation."""
        self._session.rollback(self._empty)

    def turn(self, tokens: Sequence[int], answer: Answer) -> Turn:
        """Append token ids and generate the answer."""
        if self._stateless:
            before = list(self._session.tokens)
            self.reset()
            self._session.append_tokens(before)
        self._session.append_tokens(tokens)
        generated = self._session.generate(
            max_tokens=len(answer.tokens),
            sampler=ScriptedSampler(len(self._session.tokens), answer),
            constraint=ScriptedConstraint(answer) if self._speculative else None,
            drafts=self._drafts,
        )
        self.drafted += generated.drafted
        self.accepted += generated.accepted
        return Turn(generated.prefill_ms / 1e3, generated.decode_ms / 1e3, len(generated.tokens))

    def close(self) -> None:
        """Do nothing: the engine runs in this process."""


def bytes_per_token(folder: Path, model: PolicyModel, context: int) -> int:
    """Return the bytes read to decode a token: the decoder's weights, and the KV cache of `context` tokens."""
    graph = NATIVE_DECODER_GRAPH if model.manifest.runs_native else DECODER_GRAPH
    weights = sum(path.stat().st_size for path in folder.glob(f"{graph}*"))
    text, engine = model.manifest.text, model.decoder.engine
    size = 4
    if isinstance(engine, OrtDecoder):
        size = next(TYPE_BYTES[item.type] for item in engine.session.get_inputs() if item.name.startswith("past_"))
    return weights + 2 * text.layers * text.kv_heads * text.head_dim * size * context
