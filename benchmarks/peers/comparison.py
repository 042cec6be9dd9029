"""What `bench_decode` and `bench_episode` share: options, the open engines, and how results are stored."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.peers.base import Engine
from benchmarks.peers.registry import PEERS, Workspace, open_peers, parse_environments, parse_names
from benchmarks.peers.session_engine import SessionEngine
from benchmarks.peers.workload import FIRST
from benchmarks.support.reporting import RESULTS, draw_bars, load_average, machine_card, print_results
from gog_edge.engines.onnx.session import physical_cores
from gog_edge.errors import BackendError
from gog_edge.policy.manifest import MANIFEST
from gog_edge.policy.model import PolicyModel

OURS, PLAIN, STATELESS = "ours", "ours, plain", "ours, stateless"
DEFAULT_SHAPE = "qwen3-vl-2b"
BUSY = 0.5  # load average above which other processes disturb the measurement: engines wait for their slowest thread
CONTEXT = 4096  # tokens for which every engine allocates its cache
NOTE = (
    "random weights of one shape; pictures are replaced by as many text tokens, all sides without vision towers; the "
    "tokens of our engine are scripted, all computation is real; peers generate their own tokens"
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The open engines."""

    policy: Path
    model: PolicyModel
    ours: tuple[SessionEngine, ...]
    peers: tuple[Engine, ...]
    missing: dict[str, str]  # reason by peer
    load: float  # load average before anything of ours ran

    @property
    def engines(self) -> list[Engine]:
        """Return all engines, ours first."""
        return [*self.ours, *self.peers]

    @property
    def vocab(self) -> int:
        """Return the number of ids below the first special token."""
        manifest = self.model.manifest
        return min(token for token in (*manifest.eos, manifest.image_token) if token > FIRST)

    @property
    def acceptance(self) -> float:
        """Return the fraction of draft tokens that our first engine accepted."""
        first = self.ours[0]
        return round(first.accepted / first.drafted, 3) if first.drafted else 0.0

    def rounds(self, repeats: int) -> Iterator[tuple[int, Engine]]:
        """Yield every engine once per round, with the seed of the round; only one engine works at a time."""
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=repeats * len(self.engines))
            for seed in range(repeats):
                for engine in self.engines:
                    progress.update(task, description=engine.name)
                    yield seed, engine
                    progress.advance(task)

    def about(self) -> dict[str, str]:
        """Return the settings of each engine, and the reasons of those that are missing."""
        named = {engine.name: engine.about for engine in self.engines}
        return named | {name: f"missing: {reason}" for name, reason in self.missing.items()}

    def publish(
        self, args: argparse.Namespace, kind: str, figures: Mapping[str, object], table: Table, title: str,
        groups: Mapping[str, Mapping[str, float]], unit: str,
    ) -> None:  # fmt: skip
        """Print card, table and JSON; write the JSON and a bar chart of `groups` to `args.out`."""
        card, about, shape = machine_card(), self.about(), self.model.manifest.name
        line = {**figures, "shape": shape, "about": about, "missing": self.missing, "repeats": args.repeats}
        line |= {"note": NOTE, "load_before": self.load, "machine": card}
        caption = f"{card['processor']}, {args.threads} threads; random weights, same shape; transformers in bfloat16"
        draw_bars(args.out / f"{kind}-{shape}.png", f"{shape}: {title}", caption, groups, unit)
        print_results(card | about, [table, NOTE], line, args.out / f"{kind}-{shape}.json")


def comparison_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that both benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", default=DEFAULT_SHAPE,
                        help="shape, one of export.random_checkpoint (default %(default)s)")  # fmt: skip
    parser.add_argument("--policy", type=Path, help="exported policy folder (default: int4 of the shape, created once)")
    parser.add_argument("--peers", default="all",
                        help=f"all, none, or of {', '.join(PEERS)}, comma-separated (default %(default)s)")  # fmt: skip
    parser.add_argument("--peer-env", action="append", default=[], metavar="NAME=PATH",
                        help="virtual environment or folder of programs of a peer")  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("runs/bench"),
                        help="folder for checkpoints and conversions (default %(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS,
                        help="folder for JSON and bar chart (default %(default)s)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=physical_cores(), help="of each engine (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all token counts, to try the command")
    return parser


@contextmanager
def open_comparison(args: argparse.Namespace, *, names: Sequence[str]) -> Iterator[Comparison]:
    """Create missing checkpoints and conversions, open all engines, and close them at the end.

    Args:
        args: of `comparison_parser`.
        names: which of OURS, PLAIN and STATELESS take part.
    """
    load = load_average()
    if load > BUSY:
        Console(stderr=True).print(f"[yellow]this machine is busy (load {load:.1f}): the results are not reliable[/]")
    peers = parse_names(args.peers, tuple(PEERS))
    environments = parse_environments(args.peer_env, tuple(PEERS))
    space = Workspace((args.work / args.like).resolve(), args.threads, CONTEXT, environments)
    if peers or not args.policy:
        make_checkpoint(args.like, space.checkpoint)
    policy = args.policy or make_policy(args.like, space.checkpoint, space.folder / "policy-int4")
    model = PolicyModel.open(policy, threads=args.threads, context=CONTEXT)
    ours = tuple(
        SessionEngine(name, model, speculative=name != PLAIN, stateless=name == STATELESS) for name in names
    )
    opened, missing = open_peers(peers, space)
    try:
        yield Comparison(policy, model, ours, tuple(opened), missing, load)
    finally:
        for peer in opened:
            peer.close()


def make_checkpoint(like: str, checkpoint: Path) -> None:
    """Write a checkpoint of random weights, unless it exists."""
    if not checkpoint.exists():
        _run([sys.executable, "-m", "export.random_checkpoint", "--like", like, str(checkpoint)])


def make_policy(like: str, checkpoint: Path, out: Path) -> Path:
    """Export a checkpoint in int4, unless the export exists; return its folder."""
    if not (out / MANIFEST).exists():
        _run([sys.executable, "-m", "export.export_policy", str(checkpoint), str(out),
              "--name", like, "--precision", "int4", "--no-parity"])  # fmt: skip
    return out


def _run(command: Sequence[str]) -> None:
    """Run a command of ours in its own process, which releases its memory at the end."""
    Console(stderr=True).print("running", *command[1:])
    if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
        raise BackendError(f"'{' '.join(command[1:])}' failed (see above); it needs the extra 'export'")
