"""How fast is a bundle's policy on this box's GPU, and how near the limit of the GPU's memory?

    python -m export.build_engines BUNDLE --engine ort-cuda
    python -m benchmarks.bench_cuda BUNDLE --engine ort-cuda,tensorrt-rtx

Each engine runs through the same session, one token a step: a prompt of 512 tokens, then in a new conversation 300
tokens after 1,200 and an answer of 80; and the episode of `bench_episode`, whose turns after the first are the later
ones. The limit of decoding is the memory's speed, measured here by copying on the device, over the bytes that a token
must read. Which token is chosen is scripted, since weights may be random; all computing is real. Figures are medians.
Bundles of several precisions are several runs. `--engine ort` runs it on the processor: a check of this command.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.bandwidth import device_bandwidth, read_bandwidth
from benchmarks.bench_decode import MEASURES, Load, measure
from benchmarks.bench_episode import EPISODE, turns
from benchmarks.machine import machine_card
from benchmarks.peers.ours import Ours, bytes_a_token
from benchmarks.workload import FIRST, Writer
from gog_edge.bundle import DEFAULT_BUNDLE, Bundle, open_bundle
from gog_edge.engines.cuda import device_properties
from gog_edge.engines.manifest import DECODER, ENGINES, ORT
from gog_edge.engines.onnx.session import physical_cores
from gog_edge.engines.registry import EngineChoice, EngineSet
from gog_edge.errors import BackendError, BundleError, GogEdgeError
from gog_edge.policy.model import PolicyModel

HALF = 2  # bytes of a number in a built engine's cache


@dataclass(frozen=True, slots=True)
class Figures:
    """One engine's."""

    prefill_tok_s: float
    append_tok_s: float
    decode_tok_s: float
    later_turn_s: float  # mean of the turns after the first
    bandwidth_gb_s: float
    limit_tok_s: float  # of decoding
    decode_over_limit: float
    open_s: float


def later_turn(engine: Ours, scale: float, writer: Writer) -> float:
    """Seconds of a turn after the first, on average of one episode."""
    engine.reset()
    episode = [step.scaled(scale) for step in EPISODE]
    return float(np.mean([engine.turn(tokens, answer).seconds for tokens, answer in turns(episode, writer)][1:]))


def run(bundle: Bundle, choice: EngineChoice, scale: float, repeats: int) -> Figures:
    """Open the policy on one engine and measure it. BackendError when the engine is not to be had here."""
    if not isinstance(bundle.policy, Path):
        raise BundleError(f"'{bundle.name}' has its policy on a server")
    started = time.perf_counter()
    engines = choice.read(bundle.root)
    model = PolicyModel.open(bundle.policy, engines=engines)
    engine, opened = Ours(choice.engine, model, quick=False), time.perf_counter() - started
    special = [token for token in (*model.manifest.eos, model.manifest.image_token) if token > FIRST]
    writers = [Writer(seed, min(special, default=model.manifest.text.vocab)) for seed in range(repeats + 1)]
    load = Load().scaled(scale)
    rounds = [measure(engine, load, writer) for writer in writers]
    median = {key: float(np.median([one[key] for one in rounds[1:]])) for key in MEASURES}  # the first one warms up
    bandwidth = read_bandwidth(physical_cores()) if engines is None else device_bandwidth()
    limit = bandwidth / _read_a_token(bundle.policy, model, engines, load.context)
    return Figures(
        **median, later_turn_s=float(np.median([later_turn(engine, scale, writer) for writer in writers[1:]])),
        bandwidth_gb_s=bandwidth / 1e9, limit_tok_s=limit, decode_over_limit=median["decode_tok_s"] / limit,
        open_s=opened,
    )  # fmt: skip


def _read_a_token(policy: Path, model: PolicyModel, engines: EngineSet | None, context: int) -> int:
    """Bytes of the decoder's weights, and of the keys and values of `context` tokens."""
    if engines is None:
        return bytes_a_token(policy, model, context)
    text = model.manifest.text
    return engines.bytes((DECODER,)) + 2 * text.layers * text.kv_heads * text.head_dim * HALF * context


def as_table(found: dict[str, Figures], missing: dict[str, str]) -> Table:
    """Engines as rows."""
    table = Table("engine", "prefill tok/s", "append tok/s", "decode tok/s", "limit tok/s", "decode / limit",
                  "later turn s")  # fmt: skip
    for name, one in found.items():
        speeds = (one.prefill_tok_s, one.append_tok_s, one.decode_tok_s, one.limit_tok_s)
        table.add_row(name, *(f"{speed:.1f}" for speed in speeds), f"{one.decode_over_limit:.2f}",
                      f"{one.later_turn_s:.3f}")  # fmt: skip
    for name in missing:
        table.add_row(name, *["missing"] * 6)
    return table


def measure_all(bundle: Bundle, args: argparse.Namespace) -> tuple[dict[str, Figures], dict[str, str]]:
    """Figures of each engine; of those that are not to be had here, why."""
    found: dict[str, Figures] = {}
    missing: dict[str, str] = {}
    for name in args.engine.split(","):
        try:
            found[name] = run(bundle, EngineChoice(name), args.scale, args.repeats)
        except BackendError as exc:
            missing[name] = str(exc)
    return found, missing


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 when no engine could be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", default=DEFAULT_BUNDLE)
    parser.add_argument("--engine", default=ORT, help=f"of {', '.join(ENGINES)}; several with commas between")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all token counts, to try the command")
    args = parser.parse_args(argv)
    try:
        found, missing = measure_all(open_bundle(args.bundle), args)
    except GogEdgeError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    card, console = machine_card() | _gpu(), Console(width=160)
    console.print(*(f"{key}: {value}" for key, value in card.items()), sep="\n", highlight=False)
    console.print(as_table(found, missing), *(f"{name} is missing: {reason}" for name, reason in missing.items()))
    engines = {name: {key: round(value, 4) for key, value in asdict(one).items()} for name, one in found.items()}
    print(json.dumps({"bundle": str(args.bundle), "engines": engines, "missing": missing, "machine": card}))
    return 0 if found else 1


def _gpu() -> dict[str, str]:
    try:
        found = device_properties()
    except BackendError as exc:
        return {"gpu": f"none ({exc})"}
    return {"gpu": f"{found.name}, SM {found.sm}"}


if __name__ == "__main__":
    sys.exit(main())
