"""Measure a bundle's policy on this machine's GPU, relative to the GPU's memory bandwidth.

    python -m export.build_engines BUNDLE --engine ort-cuda
    python -m benchmarks.bench_cuda BUNDLE --engine ort-cuda,tensorrt-rtx

Each engine runs through the same session, one token per step: a prompt of 512 tokens; then, in a new conversation, 300
tokens after 1,200 and an answer of 80; and the episode of `bench_episode`, of which all turns except the first are
later turns. The limit of decoding is the memory bandwidth, measured by copying on the device, divided by the bytes that
a token reads. Tokens are scripted, because weights may be random; all computation is real. Figures are medians. Bundles
of several precisions need several runs. `--engine ort` runs on the processor, which checks this command.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gog_edge.cli.common import command_imports, command_main
from gog_edge.errors import BackendError, BundleError

with command_imports(__name__):
    import numpy as np
    from rich.table import Table

    from benchmarks.bench_decode import METRICS, Load, measure
    from benchmarks.bench_episode import EPISODE, turns
    from benchmarks.peers.session_engine import SessionEngine, bytes_per_token
    from benchmarks.peers.workload import FIRST, Writer
    from benchmarks.support.reporting import machine_card, print_results
    from benchmarks.support.resources import device_bandwidth, read_bandwidth
    from gog_edge.bundle import DEFAULT_BUNDLE, Bundle, open_bundle
    from gog_edge.engines.cuda import device_properties
    from gog_edge.engines.manifest import DECODER, ENGINES, ORT
    from gog_edge.engines.onnx.session import physical_cores
    from gog_edge.engines.registry import EngineChoice, EngineSet
    from gog_edge.policy.model import PolicyModel

FP16_BYTES = 2  # of a number in the KV cache of a built engine


@dataclass(frozen=True, slots=True)
class Figures:
    """The results of one engine."""

    prefill_tok_s: float
    append_tok_s: float
    decode_tok_s: float
    later_turn_s: float  # mean of the turns after the first
    bandwidth_gb_s: float
    limit_tok_s: float  # of decoding
    decode_over_limit: float
    open_s: float


def later_turn(engine: SessionEngine, scale: float, writer: Writer) -> float:
    """Return the mean seconds of the turns after the first in one episode."""
    engine.reset()
    episode = [step.scaled(scale) for step in EPISODE]
    return float(np.mean([engine.turn(tokens, answer).seconds for tokens, answer in turns(episode, writer)][1:]))


def run(bundle: Bundle, choice: EngineChoice, scale: float, repeats: int) -> Figures:
    """Open the policy on one engine and measure it.

    Raises:
        BackendError: the engine is not available.
        BundleError: a server runs the policy.
    """
    if not isinstance(bundle.policy, Path):
        raise BundleError(f"the policy of bundle '{bundle.name}' must be local, but a server runs it")
    started = time.perf_counter()
    engines = choice.read_engines(bundle.root)
    model = PolicyModel.open(bundle.policy, engines=engines)
    engine, open_s = SessionEngine(choice.engine, model, speculative=False), time.perf_counter() - started
    special = [token for token in (*model.manifest.eos, model.manifest.image_token) if token > FIRST]
    writers = [Writer(seed, min(special, default=model.manifest.text.vocab)) for seed in range(repeats + 1)]
    load = Load().scaled(scale)
    rounds = [measure(engine, load, writer) for writer in writers]
    median = {key: float(np.median([one[key] for one in rounds[1:]])) for key in METRICS}  # after a warm-up round
    bandwidth = read_bandwidth(physical_cores()) if engines is None else device_bandwidth()
    limit = bandwidth / _bytes_per_token(bundle.policy, model, engines, load.context)
    return Figures(
        **median, later_turn_s=float(np.median([later_turn(engine, scale, writer) for writer in writers[1:]])),
        bandwidth_gb_s=bandwidth / 1e9, limit_tok_s=limit, decode_over_limit=median["decode_tok_s"] / limit,
        open_s=open_s,
    )  # fmt: skip


def _bytes_per_token(policy: Path, model: PolicyModel, engines: EngineSet | None, context: int) -> int:
    """Return the bytes of the decoder's weights and of the KV cache of `context` tokens."""
    if engines is None:
        return bytes_per_token(policy, model, context)
    text = model.manifest.text
    return engines.bytes((DECODER,)) + 2 * text.layers * text.kv_heads * text.head_dim * FP16_BYTES * context


def as_table(found: dict[str, Figures], missing: dict[str, str]) -> Table:
    """Return a table with engines as rows."""
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
    """Return the figures of each available engine, and the reasons for the others."""
    found: dict[str, Figures] = {}
    missing: dict[str, str] = {}
    for name in args.engine.split(","):
        try:
            found[name] = run(bundle, EngineChoice(name), args.scale, args.repeats)
        except BackendError as exc:
            missing[name] = str(exc)
    return found, missing


def _gpu() -> dict[str, str]:
    try:
        found = device_properties()
    except BackendError as exc:
        return {"gpu": f"none ({exc})"}
    return {"gpu": f"{found.name}, SM {found.sm}"}


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if no engine could be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", default=DEFAULT_BUNDLE, help="default: the atlas")
    parser.add_argument("--engine", default=ORT,
                        help=f"of {', '.join(ENGINES)}, comma-separated (default %(default)s)")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="(default %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all token counts, to try the command")
    args = parser.parse_args(argv)
    found, missing = measure_all(open_bundle(args.bundle), args)
    card = machine_card() | _gpu()
    engines = {name: {key: round(value, 4) for key, value in asdict(one).items()} for name, one in found.items()}
    line = {"bundle": str(args.bundle), "engines": engines, "missing": missing, "machine": card}
    reasons = [f"{name} is missing: {reason}" for name, reason in missing.items()]
    print_results(card, [as_table(found, missing), *reasons], line, None, width=160)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
