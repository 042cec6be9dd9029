"""How long from the start of a process to the first token of an answer about a picture, and in how much memory?

    python -m benchmarks.bench_start --like qwen2.5-vl-3b --sides 224,448

Each start is a process of its own: it opens the policy (int4, random weights; made once, kept in --work) as a server
does, is asked a question about a picture of noise, and ends with the first token. Both forms of the weights take turns:
for operators of our own, and for ONNX Runtime's, with which it starts where ours cannot be had. What an earlier start
left in the policy's cache is there, and files are in the disk's. Figures are medians. A machine card, a table, last
line: JSON, kept under --out.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.machine import machine_card
from benchmarks.race import make_checkpoint, make_policy
from gog_edge.engines.onnx.native import why_none
from gog_edge.errors import BackendError, GogEdgeError
from gog_edge.files import write_json
from gog_edge.picture import Picture
from gog_edge.policy.decoding import Sampling
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.policy.draft_cost import drafts_here
from gog_edge.policy.local import LocalPolicy
from gog_edge.policy.manifest import DIALECT
from gog_edge.policy.model import PolicyModel

QUESTION = "Which building stands in the middle of this picture, who built it, and in which year was it opened?"
MOST_SIDE = 8000  # pixels, as PictureLimits has it: a picture of 64 million
OURS, THEIRS = FORMS = ("own operators", "ONNX Runtime's")
STAGES = ("imported_s", "opened_s", "first_token_s")


def start(policy: Path, side: int, form: str) -> dict[str, float]:
    """When each stage of this process was over, tokens computed, and the most MiB resident."""
    stages = [time.time()]
    model = PolicyModel.open(policy, second=form == OURS)
    if form == OURS and not model.manifest.native_here:
        raise BackendError(f"'{policy}' has no graphs for operators of our own, or they do not run here: {why_none()}")
    sampling = Sampling(**asdict(model.manifest.generation))
    opened = LocalPolicy(model, load_dialect(policy / DIALECT), sampling, drafts=drafts_here(model))
    stages.append(time.time())
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    talk = opened.begin(Picture(pixels), QUESTION)
    said = talk.generate(max_tokens=1, deadline=None)
    stages.append(time.time())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return dict(zip(STAGES, stages, strict=True)) | {"tokens": said.prompt_tokens, "peak_mib": peak}


def measure(policy: Path, sides: Sequence[int], repeats: int) -> dict[str, dict[int, dict[str, float]]]:
    """Medians by form and side, after one start of each that counts for nothing."""
    rounds = [(form, side) for _ in range(repeats + 1) for side in sides for form in FORMS]
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for form, side in track(rounds, "starts", console=Console(stderr=True)):
        found.setdefault((form, side), []).append(_started(policy, side, form))
    return {form: {side: _medians(found[form, side][1:]) for side in sides} for form in FORMS}


def _started(policy: Path, side: int, form: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.bench_start", "--policy", str(policy), "--sides", str(side)]
    began = time.time()
    done = subprocess.run([*command, "--start", form], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"a start with {form} failed:\n{done.stderr[-2000:]}")
    said = dict(json.loads(done.stdout.splitlines()[-1]))
    return said | {name: said[name] - began for name in STAGES}


def _medians(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: round(float(np.median([part[name] for part in parts])), 3) for name in parts[0]}


def as_table(found: Mapping[str, Mapping[int, Mapping[str, float]]]) -> Table:
    """Forms and sides as rows, stages as columns."""
    table = Table("weights for", "picture", "tokens", "imported", "opened", "first token", "most memory",
                  title="seconds since the process began")  # fmt: skip
    for form, sides in found.items():
        for side, part in sides.items():
            table.add_row(form, f"{side} x {side}", f"{part['tokens']:.0f}", *(f"{part[name]:.2f}" for name in STAGES),
                          f"{part['peak_mib']:,.0f} MiB")  # fmt: skip
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 when a policy cannot be made or opened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", default="qwen2.5-vl-3b", help="shape, as export.random_checkpoint names it")
    parser.add_argument("--policy", type=Path, help="an exported policy folder (default: int4 of the shape, made once)")
    parser.add_argument("--sides", type=_sides, default="224,448", help="of the pictures, in pixels")
    parser.add_argument("--repeats", type=int, choices=range(1, 101), default=5, metavar="N", help="1 to 100")
    parser.add_argument("--work", type=Path, default=Path("runs/bench"), help="holds checkpoints and policies")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="JSON goes here")
    parser.add_argument("--start", choices=FORMS, help="be one start, and say its figures")
    args = parser.parse_args(argv)
    try:
        if args.start:
            print(json.dumps(start(args.policy, args.sides[0], args.start)))
            return 0
        _compare(args, args.sides)
    except GogEdgeError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    return 0


def _sides(text: str) -> list[int]:
    found = [int(side) if side.isdecimal() else 0 for side in text.split(",")]
    if not all(1 <= side <= MOST_SIDE for side in found):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of sides from 1 to {MOST_SIDE}; write it as 224,448")
    return found


def _compare(args: argparse.Namespace, sides: Sequence[int]) -> None:
    policy = args.policy
    if policy is None:
        checkpoint = args.work / args.like / "checkpoint"
        make_checkpoint(args.like, checkpoint)
        policy = make_policy(args.like, checkpoint, args.work / args.like / "policy-int4")
    found, card = measure(policy, sides, args.repeats), machine_card()
    console = Console()
    console.print(*(f"{key}: {value}" for key, value in card.items()), sep="\n", highlight=False)
    console.print(as_table(found))
    ours, theirs = (found[form][sides[-1]] for form in FORMS)
    line = {**ours, "first_token_over_onnxruntime": round(theirs["first_token_s"] / ours["first_token_s"], 3)}
    line |= {"shape": args.like, "forms": found, "repeats": args.repeats, "machine": card}
    write_json(args.out / f"start-{args.like}.json", line)
    print(json.dumps(line))


if __name__ == "__main__":
    sys.exit(main())
