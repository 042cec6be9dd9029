"""How fast are prefill, append and decoding, and how near the limit of the memory? Ours, and the peers that run here.

    python -m benchmarks.bench_decode --peers all --peer-env llamacpp=/opt/llama.cpp/build/bin

All engines have the same shape and the same random weights, four bits each (transformers: bfloat16). Each round, the
engines take turns: a prompt of 512 tokens, then in a new conversation 300 tokens after 1,200, then an answer of 80
tokens, of which three in four stand word for word in those 300. Random weights quote nothing, so which token our engine
chooses is scripted, with drafts and without; looking up, verifying, rolling back and all matrix work are real. Peers
say as many tokens of their own, one at a time. Figures are medians over the rounds; read the ratios.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from benchmarks.bandwidth import read_bandwidth
from benchmarks.peers.base import Answer, Peer
from benchmarks.peers.ours import bytes_a_token
from benchmarks.race import OURS, PLAIN, Race, open_race, publish, run_race
from benchmarks.workload import Writer

MEASURES = {"prefill_tok_s": "prefill", "append_tok_s": "append", "decode_tok_s": "decode"}
Figures = Mapping[str, Mapping[str, float]]  # engine -> measure -> tokens a second


@dataclass(frozen=True, slots=True)
class Load:
    """Token counts of one round."""

    prefill: int = 512
    before: int = 1200
    append: int = 300
    say: int = 80

    def scaled(self, scale: float) -> Load:
        """The same, smaller or larger; at least two tokens each."""
        counts = (self.prefill, self.before, self.append, self.say)
        return Load(*(max(2, round(scale * count)) for count in counts))

    @property
    def context(self) -> int:
        """Tokens in the cache while decoding, on average."""
        return self.before + self.append + self.say // 2


def measure(engine: Peer, load: Load, writer: Writer) -> dict[str, float]:
    """One engine's part in a round, in tokens a second."""
    one = Answer((*writer.words(1),))
    engine.reset()
    prefill = engine.turn(writer.opening(load.prefill), one)
    engine.reset()
    engine.turn(writer.opening(load.before), one)
    passage = writer.words(load.append)
    turn = engine.turn(passage, writer.quoting(passage, load.say))
    return {
        "prefill_tok_s": load.prefill / prefill.prefill_s,
        "append_tok_s": load.append / turn.prefill_s,
        "decode_tok_s": turn.decode_tok_s,
    }


def run(race: Race, load: Load, repeats: int, threads: int) -> tuple[Figures, list[tuple[float, float]]]:
    """Medians of each engine; for each plain round of ours, tokens a second and the memory's bytes a second around it.

    What a virtual machine's memory gives changes from minute to minute: what was measured at another time is no limit.
    """
    found: dict[str, list[dict[str, float]]] = {engine.name: [] for engine in race.engines}
    beside = []
    for seed, engine in race.rounds(repeats):
        before = read_bandwidth(threads)
        measured = measure(engine, load, Writer(seed, race.vocab))
        found[engine.name].append(measured)
        if engine.name == PLAIN:
            beside.append((measured["decode_tok_s"], max(before, read_bandwidth(threads))))
    medians = {
        name: {key: round(float(np.median([one[key] for one in parts])), 2) for key in MEASURES}
        for name, parts in found.items()
    }
    return medians, beside


def ratios(figures: Figures, race: Race, load: Load, beside: Sequence[tuple[float, float]]) -> dict[str, object]:
    """What the last line says of ours. Decoding is compared without drafts: all engines say one token a step."""
    plain, quick = figures[PLAIN], figures[OURS]
    size = bytes_a_token(race.policy, race.model, load.context)
    bandwidth = float(np.median([found for _, found in beside]))
    drafter = race.ours[0]
    line: dict[str, object] = {
        **plain,
        "drafted_tok_s": quick["decode_tok_s"],
        "drafted_ratio": round(quick["decode_tok_s"] / plain["decode_tok_s"], 3),
        "accepted_share": round(drafter.accepted / drafter.drafted, 3) if drafter.drafted else 0.0,
        "bandwidth_gb_s": round(bandwidth / 1e9, 2),
        "bytes_a_token": size,
        "limit_tok_s": round(bandwidth / size, 2),
        "decode_over_limit": round(float(np.median([said * size / found for said, found in beside])), 3),
    }
    for peer in race.peers:
        for key, word in MEASURES.items():
            line[f"{word}_over_{peer.name}"] = round(plain[key] / figures[peer.name][key], 3)
    return line


def as_table(figures: Figures, missing: Mapping[str, str]) -> Table:
    """Engines as rows, each measure beside its ratio."""
    table = Table("engine", title="tokens a second (ours, plain = 1.00)")
    for word in MEASURES.values():
        table.add_column(word, justify="right")
    for name, parts in figures.items():
        table.add_row(name, *(f"{parts[key]:.1f} ({parts[key] / figures[PLAIN][key]:.2f})" for key in MEASURES))
    for name in missing:
        table.add_row(name, *["missing"] * len(MEASURES))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 when ours cannot run."""
    return run_race(_race, __doc__ or "", argv)


def _race(args: argparse.Namespace) -> None:
    load = Load().scaled(args.scale)
    with open_race(args, names=(OURS, PLAIN)) as race:
        figures, beside = run(race, load, args.repeats, args.threads)
        line = ratios(figures, race, load, beside) | {"engines": figures}
    groups = {word: {name: parts[key] for name, parts in figures.items()} for key, word in MEASURES.items()}
    title = "prefill, append, decode (longer is better)"
    publish(race, args, "decode", line, as_table(figures, race.missing), title, groups, "tok/s")


if __name__ == "__main__":
    sys.exit(main())
