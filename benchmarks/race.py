"""What the two races share: options, the engines in them, and how their figures are kept."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.machine import machine_card
from benchmarks.peers.base import Peer
from benchmarks.peers.ours import Ours
from benchmarks.peers.registry import Workshop, open_peers, peer_names
from benchmarks.picture import draw_bars
from benchmarks.workload import FIRST
from gog_edge.engines.onnx.session import physical_cores
from gog_edge.errors import ArtifactError, BackendError, GogEdgeError
from gog_edge.files import write_json
from gog_edge.policy.manifest import MANIFEST
from gog_edge.policy.model import PolicyModel

OURS, PLAIN, STATELESS = "ours", "ours, plain", "ours, stateless"
DEFAULT_SHAPE = "qwen3-vl-2b"
BUSY = 0.5  # load from which others' work disturbs: engines wait for their slowest thread
CONTEXT = 4096  # tokens that every engine makes room for
NOTE = (
    "random weights, one shape; pictures are stood for by as many ordinary tokens, vision towers are left out on all "
    "sides; which tokens our engine chooses is scripted, all computing is real; peers say tokens of their own"
)


@dataclass(frozen=True, slots=True)
class Race:
    """The engines, open."""

    policy: Path
    model: PolicyModel
    ours: tuple[Ours, ...]
    peers: tuple[Peer, ...]
    missing: dict[str, str]  # peer -> why
    load: float  # of the machine in the last minute, before anything of ours ran

    @property
    def engines(self) -> list[Peer]:
        """Ours first."""
        return [*self.ours, *self.peers]

    @property
    def vocab(self) -> int:
        """Ids below the first special one."""
        manifest = self.model.manifest
        return min(token for token in (*manifest.eos, manifest.image_token) if token > FIRST)

    def rounds(self, repeats: int) -> Iterator[tuple[int, Peer]]:
        """A seed for each round, and in each round every engine once: one works at a time."""
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=repeats * len(self.engines))
            for seed in range(repeats):
                for engine in self.engines:
                    progress.update(task, description=engine.name)
                    yield seed, engine
                    progress.advance(task)

    def about(self) -> dict[str, str]:
        """Settings of each engine; reasons of those that are missing."""
        named = {engine.name: engine.about for engine in self.engines}
        return named | {name: f"missing: {reason}" for name, reason in self.missing.items()}


def race_parser(description: str) -> argparse.ArgumentParser:
    """The options that both races know."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", default=DEFAULT_SHAPE, help="shape, as export.random_checkpoint names it")
    parser.add_argument("--policy", type=Path, help="an exported policy folder (default: int4 of the shape, made once)")
    parser.add_argument("--peers", default="all", help="all, none, or names with commas between")
    parser.add_argument("--peer-env", action="append", default=[], metavar="NAME=PATH",
                        help="a peer's virtual environment or folder of programs")  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("runs/bench"), help="holds checkpoints and conversions")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="JSON and picture go here")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--repeats", type=int, default=3, help="rounds; engines take turns in each")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all token counts, to try the command")
    return parser


def run_race(race: Callable[[argparse.Namespace], None], description: str, argv: Sequence[str] | None) -> int:
    """A race as a command; 1 when ours cannot run."""
    args = race_parser(description).parse_args(argv)
    try:
        race(args)
    except GogEdgeError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    return 0


def publish(race: Race, args: argparse.Namespace, kind: str, figures: Mapping[str, object], table: Table,
            title: str, groups: Mapping[str, Mapping[str, float]], unit: str) -> None:
    """Print card, table and a last line of JSON; keep the line and a picture of `groups` under `args.out`."""
    card, about, shape = machine_card(), race.about(), race.model.manifest.name
    console = Console()
    console.print(*(f"{key}: {value}" for key, value in (card | about).items()), sep="\n", highlight=False)
    console.print(table, NOTE, sep="\n")
    line = {**figures, "shape": shape, "about": about, "missing": race.missing, "repeats": args.repeats}
    line |= {"note": NOTE, "load_before": race.load, "machine": card}
    caption = f"{card['processor']}, {args.threads} threads; random weights, same shape; transformers in bfloat16"
    draw_bars(args.out / f"{kind}-{shape}.png", f"{shape}: {title}", caption, groups, unit)
    write_json(args.out / f"{kind}-{shape}.json", line)
    print(json.dumps(line))


@contextmanager
def open_race(args: argparse.Namespace, *, names: Sequence[str]) -> Iterator[Race]:
    """Make what is not there yet, open all engines, close them at the end. `names`: which of ours take part."""
    load = psutil.getloadavg()[0]
    if load > BUSY:
        Console(stderr=True).print(f"[yellow]this machine is busy (load {load:.1f}): the figures will mean little[/]")
    peers = peer_names(args.peers)
    environments = dict(_environment(entry) for entry in args.peer_env)
    shop = Workshop((args.work / args.like).resolve(), args.threads, CONTEXT, environments)
    if peers or not args.policy:
        make_checkpoint(args.like, shop.checkpoint)
    policy = args.policy or make_policy(args.like, shop.checkpoint, shop.folder / "policy-int4")
    model = PolicyModel.open(policy, threads=args.threads, context=CONTEXT)
    ours = tuple(Ours(name, model, quick=name != PLAIN, stateless=name == STATELESS) for name in names)
    opened, missing = open_peers(peers, shop)
    try:
        yield Race(policy, model, ours, tuple(opened), missing, round(load, 2))
    finally:
        for peer in opened:
            peer.close()


def make_checkpoint(like: str, checkpoint: Path) -> None:
    """A checkpoint of random weights, unless it is there."""
    if not checkpoint.exists():
        _run([sys.executable, "-m", "export.random_checkpoint", "--like", like, str(checkpoint)])


def make_policy(like: str, checkpoint: Path, out: Path) -> Path:
    """Its int4 export, unless it is there."""
    if not (out / MANIFEST).exists():
        _run([sys.executable, "-m", "export.export_policy", str(checkpoint), str(out),
              "--name", like, "--precision", "int4", "--no-parity"])  # fmt: skip
    return out


def _run(command: Sequence[str]) -> None:
    """A command of ours, in a process of its own: it gives its memory back."""
    Console(stderr=True).print("running", *command[1:])
    if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
        raise BackendError(f"'{' '.join(command[1:])}' failed (see above); it needs the extra 'export'")


def _environment(entry: str) -> tuple[str, Path]:
    name, _, path = entry.partition("=")
    if not path or peer_names(name) != [name]:
        raise ArtifactError(f"--peer-env '{entry}' is not NAME=PATH with the name of a peer")
    return name, Path(path).expanduser().resolve()
