"""Measure the time from the start of a process to the first token of an answer about a picture, and its memory.

    python -m benchmarks.bench_start --like qwen2.5-vl-3b --sides 224,448

Each start is a process of its own: it opens the policy (int4, random weights; created once, kept in --work) as a server
does, receives a question about a picture of noise, and ends with the first token. Both layouts of the weights take
turns: for the native operators, and for ONNX Runtime's, which are used if the native operators are not available. Files
are in the page cache, and so is what an earlier start left in the policy's cache folder. Figures are medians.
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

from gog_edge.cli.common import command_imports, command_main
from gog_edge.errors import BackendError

with command_imports(__name__):
    import numpy as np
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from benchmarks.peers.comparison import make_checkpoint, make_policy
    from benchmarks.support.reporting import RESULTS, machine_card, print_results
    from gog_edge.engines.onnx.native import unavailable_reason
    from gog_edge.picture import Picture
    from gog_edge.policy.decoding import SamplingParams
    from gog_edge.policy.dialect.loader import DIALECT_FILE, load_dialect
    from gog_edge.policy.draft_cost import load_draft_config
    from gog_edge.policy.local import LocalPolicy
    from gog_edge.policy.model import PolicyModel

QUESTION = "Which building stands in the middle of this picture, who built it, and in which year was it opened?"
MAX_SIDE = 8000  # pixels: a picture of 64 million pixels, the limit of PictureLimits
NATIVE, ONNX_RUNTIME = LAYOUTS = ("own operators", "ONNX Runtime's")  # keys in the results file
STAGES = ("imported_s", "opened_s", "first_token_s")


def start(policy: Path, side: int, layout: str) -> dict[str, float]:
    """Return the time at the end of each stage of this process, the prompt tokens, and the peak memory in MiB."""
    stages = [time.time()]
    model = PolicyModel.open(policy, cpu_layout=layout == NATIVE)
    if layout == NATIVE and not model.manifest.runs_native:
        raise BackendError(
            f"'{policy}' has no graphs for the native operators, or they do not run here: {unavailable_reason()}"
        )
    sampling = SamplingParams(**asdict(model.manifest.generation))
    opened = LocalPolicy(model, load_dialect(policy / DIALECT_FILE), sampling, drafts=load_draft_config(model))
    stages.append(time.time())
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    conversation = opened.begin(Picture(pixels), QUESTION)
    generated = conversation.generate(max_tokens=1, deadline=None)
    stages.append(time.time())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return dict(zip(STAGES, stages, strict=True)) | {"tokens": generated.prompt_tokens, "peak_mib": peak}


def measure(policy: Path, sides: Sequence[int], repeats: int) -> dict[str, dict[int, dict[str, float]]]:
    """Return the medians by layout and side, after a warm-up start of each."""
    rounds = [(layout, side) for _ in range(repeats + 1) for side in sides for layout in LAYOUTS]
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for layout, side in track(rounds, "starts", console=Console(stderr=True)):
        found.setdefault((layout, side), []).append(_start_process(policy, side, layout))
    return {layout: {side: _medians(found[layout, side][1:]) for side in sides} for layout in LAYOUTS}


def _start_process(policy: Path, side: int, layout: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.bench_start", "--policy", str(policy), "--sides", str(side)]
    began = time.time()
    done = subprocess.run([*command, "--start", layout], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"a start with {layout} failed:\n{done.stderr[-2000:]}")
    result = dict(json.loads(done.stdout.splitlines()[-1]))
    return result | {name: result[name] - began for name in STAGES}


def _medians(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: round(float(np.median([part[name] for part in parts])), 3) for name in parts[0]}


def as_table(found: Mapping[str, Mapping[int, Mapping[str, float]]]) -> Table:
    """Return a table with layouts and sides as rows, and stages as columns."""
    table = Table("weights for", "picture", "tokens", "imported", "opened", "first token", "peak memory",
                  title="seconds since the start of the process")  # fmt: skip
    for layout, sides in found.items():
        for side, part in sides.items():
            table.add_row(layout, f"{side} x {side}", f"{part['tokens']:.0f}",
                          *(f"{part[name]:.2f}" for name in STAGES), f"{part['peak_mib']:,.0f} MiB")  # fmt: skip
    return table


def _sides(text: str) -> list[int]:
    found = [int(side) if side.isdecimal() else 0 for side in text.split(",")]
    if not all(1 <= side <= MAX_SIDE for side in found):
        raise argparse.ArgumentTypeError(f"must be sides from 1 to {MAX_SIDE} pixels, such as 224,448; got '{text}'")
    return found


def _compare(args: argparse.Namespace, sides: Sequence[int]) -> None:
    policy = args.policy
    if policy is None:
        checkpoint = args.work / args.like / "checkpoint"
        make_checkpoint(args.like, checkpoint)
        policy = make_policy(args.like, checkpoint, args.work / args.like / "policy-int4")
    found, card = measure(policy, sides, args.repeats), machine_card()
    native, onnx_runtime = (found[layout][sides[-1]] for layout in LAYOUTS)
    ratio = round(onnx_runtime["first_token_s"] / native["first_token_s"], 3)
    line = {**native, "first_token_over_onnxruntime": ratio, "shape": args.like, "forms": found,
            "repeats": args.repeats, "machine": card}  # fmt: skip
    print_results(card, [as_table(found)], line, args.out / f"start-{args.like}.json")


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", default="qwen2.5-vl-3b",
                        help="shape, one of export.random_checkpoint (default %(default)s)")  # fmt: skip
    parser.add_argument("--policy", type=Path, help="exported policy folder (default: int4 of the shape, created once)")
    parser.add_argument("--sides", type=_sides, default="224,448",
                        help="of the pictures, in pixels (default %(default)s)")  # fmt: skip
    parser.add_argument("--repeats", type=int, choices=range(1, 101), default=5, metavar="N",
                        help="starts of each kind, 1 to 100 (default %(default)s)")  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("runs/bench"),
                        help="folder for checkpoints and policies (default %(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (default %(default)s)")
    parser.add_argument("--start", choices=LAYOUTS, help="used by the command itself: be one start")
    args = parser.parse_args(argv)
    if args.start:
        print(json.dumps(start(args.policy, args.sides[0], args.start)))
    else:
        _compare(args, args.sides)
    return 0


if __name__ == "__main__":
    sys.exit(main())
