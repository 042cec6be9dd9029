"""Measure prefill, append and decoding, relative to the memory bandwidth and to the peers that are available.

    python -m benchmarks.bench_decode --peers all --peer-env llamacpp=/opt/llama.cpp/build/bin

All engines have the same shape and the same random weights in 4 bits (transformers: bfloat16). In each round, the
engines take turns: a prompt of 512 tokens; then, in a new conversation, 300 tokens after 1,200, and an answer of 80
tokens of which three in four are quoted from those 300. Random weights quote nothing, so the tokens of our engine are
scripted, with drafts and without; draft lookup, verification, rollback and all matrix multiplications are real. Peers
generate as many tokens of their own, one at a time. Figures are medians over the rounds; compare the ratios.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gog_edge.cli.common import command_imports, command_main

with command_imports(__name__):
    import numpy as np
    from rich.table import Table

    from benchmarks.peers.base import Engine
    from benchmarks.peers.comparison import OURS, PLAIN, Comparison, comparison_parser, open_comparison
    from benchmarks.peers.session_engine import bytes_per_token
    from benchmarks.peers.workload import Answer, Writer
    from benchmarks.support.resources import read_bandwidth

METRICS = {"prefill_tok_s": "prefill", "append_tok_s": "append", "decode_tok_s": "decode"}
Figures = Mapping[str, Mapping[str, float]]  # by engine and metric: tokens per second


@dataclass(frozen=True, slots=True)
class Load:
    """Token counts of one round."""

    prefill: int = 512
    before: int = 1200
    append: int = 300
    generate: int = 80

    def scaled(self, scale: float) -> Load:
        """Return the counts multiplied with `scale`, at least two tokens each."""
        counts = (self.prefill, self.before, self.append, self.generate)
        return Load(*(max(2, round(scale * count)) for count in counts))

    @property
    def context(self) -> int:
        """Return the mean number of tokens in the cache while decoding."""
        return self.before + self.append + self.generate // 2


def measure(engine: Engine, load: Load, writer: Writer) -> dict[str, float]:
    """Measure one engine in one round; return tokens per second by metric."""
    one = Answer((*writer.words(1),))
    engine.reset()
    prefill = engine.turn(writer.opening(load.prefill), one)
    engine.reset()
    engine.turn(writer.opening(load.before), one)
    passage = writer.words(load.append)
    turn = engine.turn(passage, writer.quoting(passage, load.generate))
    return {
        "prefill_tok_s": load.prefill / prefill.prefill_s,
        "append_tok_s": load.append / turn.prefill_s,
        "decode_tok_s": turn.decode_tok_s,
    }


def run(comparison: Comparison, load: Load, repeats: int, threads: int) -> tuple[Figures, list[tuple[float, float]]]:
    """Measure all engines.

    Returns:
        The medians of each engine; and for each round of ours without drafts, its tokens per second and the memory
        bandwidth around it in bytes per second. The bandwidth of a virtual machine changes from minute to minute, so
        that only a value measured at the same time is a limit.
    """
    found: dict[str, list[dict[str, float]]] = {engine.name: [] for engine in comparison.engines}
    with_bandwidth = []
    for seed, engine in comparison.rounds(repeats):
        before = read_bandwidth(threads)
        measured = measure(engine, load, Writer(seed, comparison.vocab))
        found[engine.name].append(measured)
        if engine.name == PLAIN:
            with_bandwidth.append((measured["decode_tok_s"], max(before, read_bandwidth(threads))))
    medians = {
        name: {key: round(float(np.median([one[key] for one in parts])), 2) for key in METRICS}
        for name, parts in found.items()
    }
    return medians, with_bandwidth


def ratios(
    figures: Figures, comparison: Comparison, load: Load, with_bandwidth: Sequence[tuple[float, float]]
) -> dict[str, object]:
    """Return the figures of the JSON line. Peers are compared without drafts, since all decode one token per step."""
    plain, drafted = figures[PLAIN], figures[OURS]
    size = bytes_per_token(comparison.policy, comparison.model, load.context)
    bandwidth = float(np.median([found for _, found in with_bandwidth]))
    line: dict[str, object] = {
        **plain,
        "drafted_tok_s": drafted["decode_tok_s"],
        "drafted_ratio": round(drafted["decode_tok_s"] / plain["decode_tok_s"], 3),
        "accepted_share": comparison.acceptance,
        "bandwidth_gb_s": round(bandwidth / 1e9, 2),
        "bytes_a_token": size,
        "limit_tok_s": round(bandwidth / size, 2),
        "decode_over_limit": round(float(np.median([speed * size / found for speed, found in with_bandwidth])), 3),
    }
    for peer in comparison.peers:
        for key, word in METRICS.items():
            line[f"{word}_over_{peer.name}"] = round(plain[key] / figures[peer.name][key], 3)
    return line


def as_table(figures: Figures, missing: Mapping[str, str]) -> Table:
    """Return a table with engines as rows; each metric has its ratio to ours without drafts."""
    table = Table("engine", title="tokens per second (relative to ours, plain)")
    for word in METRICS.values():
        table.add_column(word, justify="right")
    for name, parts in figures.items():
        table.add_row(name, *(f"{parts[key]:.1f} ({parts[key] / figures[PLAIN][key]:.2f})" for key in METRICS))
    for name in missing:
        table.add_row(name, *["missing"] * len(METRICS))
    return table


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    args: argparse.Namespace = comparison_parser(__doc__ or "").parse_args(argv)
    load = Load().scaled(args.scale)
    with open_comparison(args, names=(OURS, PLAIN)) as comparison:
        figures, with_bandwidth = run(comparison, load, args.repeats, args.threads)
        line = ratios(figures, comparison, load, with_bandwidth) | {"engines": figures}
    groups = {word: {name: parts[key] for name, parts in figures.items()} for key, word in METRICS.items()}
    title = "prefill, append, decode (longer is better)"
    comparison.publish(args, "decode", line, as_table(figures, comparison.missing), title, groups, "tok/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
