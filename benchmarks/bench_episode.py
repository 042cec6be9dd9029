"""Measure the turns of an episode: ours, ours without its KV cache, and the peers that are available.

    python -m benchmarks.bench_episode --peers all --peer-env llamacpp=/opt/llama.cpp/build/bin

Four turns with realistic token counts: a prompt with its picture, then a passage, a crop, and a passage again; the
model generates two calls and two answers that quote the passage. Turns 2 and 4 have the same load, so that their ratio
shows the cost of a longer conversation. All engines have the same shape and the same random weights in 4 bits
(transformers: bfloat16) and keep what they computed: llama.cpp's server and OpenVINO GenAI in their prompt caches,
transformers in its DynamicCache. The tokens of our engine are scripted, and the syntax of calls, half of their tokens,
is forced by a constraint in place of a dialect's grammar. Peers generate as many tokens of their own, one at a time,
and so does *ours, plain*; *ours, stateless* computes the whole conversation again in each turn. Seconds are medians
over the rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gog_edge.cli.common import command_imports, command_main

with command_imports(__name__):
    import numpy as np
    from rich.table import Table

    from benchmarks.peers.comparison import OURS, PLAIN, STATELESS, Comparison, comparison_parser, open_comparison
    from benchmarks.peers.workload import Answer, Writer

Seconds = Mapping[str, Sequence[float]]  # by engine, of each turn


@dataclass(frozen=True, slots=True)
class Step:
    """One turn: what is appended, and what is generated."""

    appended: str
    tokens: int
    generated: Literal["call", "quoting answer"]
    generate: int  # tokens

    def scaled(self, scale: float) -> Step:
        """Return the turn with its counts multiplied with `scale`, at least eight tokens each."""
        tokens, generate = (max(8, round(scale * count)) for count in (self.tokens, self.generate))
        return Step(self.appended, tokens, self.generated, generate)


EPISODE = (
    Step("prompt and picture", 900, "call", 40),
    Step("passage", 300, "quoting answer", 80),
    Step("crop", 265, "call", 40),
    Step("passage", 300, "quoting answer", 80),
)


def turns(episode: Sequence[Step], writer: Writer) -> Iterator[tuple[list[int], Answer]]:
    """Yield the tokens to append and the answer of each turn."""
    for number, step in enumerate(episode):
        tokens = writer.words(step.tokens) if number else writer.opening(step.tokens)
        call = step.generated == "call"
        yield tokens, writer.call(step.generate) if call else writer.quoting(tokens, step.generate)


def run(comparison: Comparison, episode: Sequence[Step], repeats: int) -> Seconds:
    """Return the median seconds of each engine's turns; in each round, all engines run the same episode."""
    found: dict[str, list[list[float]]] = {engine.name: [] for engine in comparison.engines}
    for seed, engine in comparison.rounds(repeats):
        engine.reset()
        done = [engine.turn(tokens, answer) for tokens, answer in turns(episode, Writer(seed, comparison.vocab))]
        found[engine.name].append([turn.seconds for turn in done])
    return {name: [float(second) for second in np.median(parts, axis=0)] for name, parts in found.items()}


def ratios(seconds: Seconds, comparison: Comparison) -> dict[str, object]:
    """Return the figures of the JSON line; later turns are all except the first."""
    later = {name: float(np.mean(parts[1:])) for name, parts in seconds.items()}
    line: dict[str, object] = {
        "later_turn_s": round(later[OURS], 3),
        "later_turn_over_stateless": round(later[STATELESS] / later[OURS], 3),
        "later_turn_over_plain": round(later[PLAIN] / later[OURS], 3),
        "turn4_over_turn2": round(seconds[OURS][3] / seconds[OURS][1], 3),
        "turn4_over_turn2_plain": round(seconds[PLAIN][3] / seconds[PLAIN][1], 3),
        "accepted_share": comparison.acceptance,
    }
    if comparison.peers:
        best = min((peer.name for peer in comparison.peers), key=later.__getitem__)
        line |= {"best_peer": best, "later_turn_over_best_peer": round(later[best] / later[OURS], 3)}
        line |= {"plain_later_turn_over_best_peer": round(later[best] / later[PLAIN], 3)}
        line |= {f"later_turn_over_{peer.name}": round(later[peer.name] / later[OURS], 3) for peer in comparison.peers}
    return line


def as_table(seconds: Seconds, episode: Sequence[Step], missing: Mapping[str, str]) -> Table:
    """Return a table with engines as rows and turns as columns."""
    table = Table("engine", title="seconds per turn; later turns: mean of 2 to 4 (relative to ours)")
    for step in episode:
        table.add_column(f"{step.appended} {step.tokens},\n{step.generated} {step.generate}", justify="right")
    table.add_column("later turns", justify="right")
    ours = np.mean(seconds[OURS][1:])
    for name, parts in seconds.items():
        later = np.mean(parts[1:])
        table.add_row(name, *(f"{part:.2f}" for part in parts), f"{later:.2f} ({later / ours:.2f})")
    for name in missing:
        table.add_row(name, *["missing"] * (len(episode) + 1))
    return table


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    args: argparse.Namespace = comparison_parser(__doc__ or "").parse_args(argv)
    episode = [step.scaled(args.scale) for step in EPISODE]
    with open_comparison(args, names=(OURS, PLAIN, STATELESS)) as comparison:
        seconds = run(comparison, episode, args.repeats)
        line = ratios(seconds, comparison)
    line["seconds"] = {name: [round(part, 3) for part in parts] for name, parts in seconds.items()}
    groups = {
        f"turn {number}: {step.appended} of {step.tokens} tokens, {step.generated} of {step.generate}":
        {name: parts[number - 1] for name, parts in seconds.items()} for number, step in enumerate(episode, 1)
    }  # fmt: skip
    table, title = as_table(seconds, episode, comparison.missing), "seconds per turn (shorter is better)"
    comparison.publish(args, "episode", line, table, title, groups, "s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
