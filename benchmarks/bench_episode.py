"""How long do the turns of an episode take? Ours, ours without its memory, and the peers that run here.

    python -m benchmarks.bench_episode --peers all --peer-env llamacpp=/opt/llama.cpp/build/bin

Four turns with true token counts: a prompt with its picture, then a passage, a crop and a passage again; said are two
calls and two answers that quote the passage. Turns 2 and 4 bear equal loads, so their ratio shows what a longer
conversation costs. All engines have the same shape and the same random weights, four bits each (transformers:
bfloat16), and keep what they computed: llama.cpp's server and OpenVINO GenAI in their prompt caches, transformers in
its DynamicCache. What our engine says is scripted, and the syntax of calls, half of their tokens, is forced by a
constraint that stands for a dialect's grammar; peers say as many tokens of their own, one at a time. *ours, plain* does
so too; *ours, stateless* computes the whole conversation again each turn. Seconds are medians over the rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.table import Table

from benchmarks.peers.base import Answer
from benchmarks.race import OURS, PLAIN, STATELESS, Race, open_race, publish, run_race
from benchmarks.workload import Writer

Seconds = Mapping[str, Sequence[float]]  # engine -> of each turn


@dataclass(frozen=True, slots=True)
class Step:
    """What one turn brings and asks for."""

    brings: str
    tokens: int
    says: Literal["call", "quoting answer"]
    say: int  # tokens

    def scaled(self, scale: float) -> Step:
        """The same with other counts; at least eight tokens each."""
        return Step(self.brings, max(8, round(scale * self.tokens)), self.says, max(8, round(scale * self.say)))


EPISODE = (
    Step("prompt and picture", 900, "call", 40),
    Step("passage", 300, "quoting answer", 80),
    Step("crop", 265, "call", 40),
    Step("passage", 300, "quoting answer", 80),
)


def turns(episode: Sequence[Step], writer: Writer) -> Iterator[tuple[list[int], Answer]]:
    """What is appended and said in each turn."""
    for number, step in enumerate(episode):
        tokens = writer.words(step.tokens) if number else writer.opening(step.tokens)
        yield tokens, writer.call(step.say) if step.says == "call" else writer.quoting(tokens, step.say)


def run(race: Race, episode: Sequence[Step], repeats: int) -> Seconds:
    """Median seconds of each engine's turns; in each round the engines take turns at the same episode."""
    found: dict[str, list[list[float]]] = {engine.name: [] for engine in race.engines}
    for seed, engine in race.rounds(repeats):
        engine.reset()
        said = [engine.turn(tokens, answer) for tokens, answer in turns(episode, Writer(seed, race.vocab))]
        found[engine.name].append([turn.seconds for turn in said])
    return {name: [float(second) for second in np.median(parts, axis=0)] for name, parts in found.items()}


def ratios(seconds: Seconds, race: Race) -> dict[str, object]:
    """What the last line says of ours; later turns are all but the first."""
    later = {name: float(np.mean(parts[1:])) for name, parts in seconds.items()}
    drafter = race.ours[0]
    line: dict[str, object] = {
        "later_turn_s": round(later[OURS], 3),
        "later_turn_over_stateless": round(later[STATELESS] / later[OURS], 3),
        "later_turn_over_plain": round(later[PLAIN] / later[OURS], 3),
        "turn4_over_turn2": round(seconds[OURS][3] / seconds[OURS][1], 3),
        "turn4_over_turn2_plain": round(seconds[PLAIN][3] / seconds[PLAIN][1], 3),
        "accepted_share": round(drafter.accepted / drafter.drafted, 3) if drafter.drafted else 0.0,
    }
    if race.peers:
        best = min((peer.name for peer in race.peers), key=later.__getitem__)
        line |= {"best_peer": best, "later_turn_over_best_peer": round(later[best] / later[OURS], 3)}
        line |= {"plain_later_turn_over_best_peer": round(later[best] / later[PLAIN], 3)}
        line |= {f"later_turn_over_{peer.name}": round(later[peer.name] / later[OURS], 3) for peer in race.peers}
    return line


def as_table(seconds: Seconds, episode: Sequence[Step], missing: Mapping[str, str]) -> Table:
    """Engines as rows, turns as columns."""
    table = Table("engine", title="seconds a turn; later turns: mean of 2 to 4 (against ours)")
    for step in episode:
        table.add_column(f"{step.brings} {step.tokens},\n{step.says} {step.say}", justify="right")
    table.add_column("later turns", justify="right")
    ours = np.mean(seconds[OURS][1:])
    for name, parts in seconds.items():
        later = np.mean(parts[1:])
        table.add_row(name, *(f"{part:.2f}" for part in parts), f"{later:.2f} ({later / ours:.2f})")
    for name in missing:
        table.add_row(name, *["missing"] * (len(episode) + 1))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 when ours cannot run."""
    return run_race(_race, __doc__ or "", argv)


def _race(args: argparse.Namespace) -> None:
    episode = [step.scaled(args.scale) for step in EPISODE]
    with open_race(args, names=(OURS, PLAIN, STATELESS)) as race:
        seconds = run(race, episode, args.repeats)
        line = ratios(seconds, race)
    line["seconds"] = {name: [round(part, 3) for part in parts] for name, parts in seconds.items()}
    groups = {
        f"turn {number}: {step.brings} of {step.tokens} tokens, {step.says} of {step.say}":
        {name: parts[number - 1] for name, parts in seconds.items()} for number, step in enumerate(episode, 1)
    }  # fmt: skip
    table, title = as_table(seconds, episode, race.missing), "seconds a turn (shorter is better)"
    publish(race, args, "episode", line, table, title, groups, "s")


if __name__ == "__main__":
    sys.exit(main())
