"""Measure the image tower of a CLIP model: our engine in fp32 and int8, and open_clip in eager mode.

    python -m benchmarks.bench_encoder

The engines have the same weights and the same number of threads. --model is a name (ViT-B-32), with random weights, or
the folder of a checkpoint, with its weights. open_clip runs in its own process. In each round, every engine embeds one
batch; ratios are medians over the rounds of the ratio within a round, which reduces the influence of other processes.
Preprocessing is measured with decoded pictures of 320 x 320 pixels, the size of thumbnails and crops. The cosine is the
smallest one of the export to PyTorch, on the atlas's sample pictures and crops of them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gog_edge.cli.common import command_imports, command_main
from gog_edge.errors import BackendError

with command_imports(__name__):
    import numpy as np
    import psutil
    from numpy.typing import NDArray
    from rich.table import Table

    from benchmarks.peers.base import WorkerProcess
    from benchmarks.support.reporting import RESULTS, load_average, machine_card, print_results
    from gog_edge.engines.onnx.session import physical_cores
    from gog_edge.exporting.clip.export import PRECISIONS
    from gog_edge.files import read_json
    from gog_edge.retrieval.encoder import Encoder
    from gog_edge.types import Pixels

EAGER = "open_clip eager"
MODEL = "ViT-B-32"
BATCHES = (1, 8)
PICTURE = (320, 320)  # width and height of the pictures to preprocess, in pixels
PREPROCESS = "preprocess"
STREAM = (8, 64)  # batch sizes of the throughput measurement, which includes preprocessing

Stopwatch = Callable[[int], float]  # batch size -> seconds
Medians = dict[str, dict[str, float]]  # by engine and "batch 1", "batch 8", "preprocess" (per picture)


@dataclass(frozen=True, slots=True)
class Throughput:
    """The throughput of `Encoder.embed_images` with decoded pictures of `PICTURE` pixels."""

    images_s: float
    busy: float  # mean number of busy cores


@dataclass(frozen=True, slots=True)
class EncoderFigures:
    """The results. Engines are `EAGER`, "ours, fp32" and "ours, int8"."""

    model: str
    threads: int
    about: str  # of open_clip
    ms: Medians
    ratios: Medians  # of ours: speed relative to open_clip
    throughput: dict[str, dict[int, Throughput]]  # of ours, by batch size
    parity: dict[str, Any]  # of ours: the parity of the image tower, from the manifest

    def as_line(self) -> dict[str, object]:
        """Return the results as JSON values, with the main figures under keys of their own."""
        line: dict[str, object] = asdict(self)
        for name, parts in self.ratios.items():
            precision = name.removeprefix("ours, ")
            line |= {f"{precision}_over_eager_batch_{batch}": parts[f"batch {batch}"] for batch in BATCHES}
            line[f"{precision}_min_cosine"] = self.parity[name]["min_cosine"]
        return line


class OpenClip(WorkerProcess):
    """open_clip in its own process."""

    def embed(self, count: int) -> float:
        """Return the seconds for a batch."""
        return float(self.ask({"what": "embed", "count": count})["seconds"])

    def preprocess(self, count: int) -> float:
        """Return the seconds to preprocess `count` decoded pictures."""
        width, height = PICTURE
        return float(self.ask({"what": PREPROCESS, "count": count, "width": width, "height": height})["seconds"])


def compare_encoders(
    work: Path, *, model: str = MODEL, threads: int | None = None, rounds: int = 20, batches: Sequence[int] = BATCHES
) -> EncoderFigures:
    """Export the model if necessary, and measure all engines.

    Args:
        work: folder that keeps random weights and exports.
        model: name of an open_clip model that can be exported in int8, or the folder of a checkpoint.
        threads: of every engine; None for one per physical core.
        rounds: with batch 1; larger batches have fewer rounds, at least three.
        batches: batch sizes.

    Raises:
        BackendError: open_clip is not installed, or a process ended.
    """
    threads = threads or physical_cores()
    work = work / Path(model).name
    with _open_engines(work, model, threads) as (peer, encoders):
        seconds = {
            f"batch {batch}": _rounds(_towers(peer, encoders), batch, max(3, rounds // batch)) for batch in batches
        }
        seconds[PREPROCESS] = _rounds(_preprocessors(peer, encoders), 8, max(3, rounds // 2)) / 8
        throughput = {name: {count: _throughput(one, count) for count in STREAM} for name, one in encoders.items()}
    ms, ratios = _medians([EAGER, *encoders], seconds)
    parity = {
        f"ours, {precision}": read_json(work / precision / "manifest.json", what="encoder")["parity"]["image"]
        for precision in PRECISIONS
    }
    return EncoderFigures(work.name, threads, peer.about, ms, ratios, throughput, parity)


def as_table(figures: EncoderFigures) -> Table:
    """Return a table with engines as rows.

    Columns: milliseconds with the speed relative to open_clip, smallest cosine of the export to PyTorch, and images per
    second of `embed_images` with the number of busy cores.
    """
    keys = list(figures.ms[EAGER])
    table = Table("engine", title=f"{figures.model}, ms (speed relative to eager), {figures.threads} threads")
    for key in [*keys, "cosine", *(f"batch {count}: images/s (cores)" for count in STREAM)]:
        table.add_column(key, justify="right")
    for row in as_rows(figures):
        table.add_row(*row)
    return table


def as_rows(figures: EncoderFigures) -> list[list[str]]:
    """Return the rows of the table as text."""
    rows = []
    for name, parts in figures.ms.items():
        ratios = figures.ratios.get(name, {})
        row = [name, *(f"{ms:.2f} ({ratios.get(key, 1):.2f})" for key, ms in parts.items())]
        if name in figures.parity:
            row.append(f"{figures.parity[name]['min_cosine']:.5f}")
            row += [f"{one.images_s:.1f} ({one.busy:.2f})" for one in figures.throughput[name].values()]
        rows.append(row + [""] * (len(figures.ms[name]) + 2 + len(STREAM) - len(row)))
    return rows


@contextmanager
def _open_engines(work: Path, model: str, threads: int) -> Iterator[tuple[OpenClip, dict[str, Encoder]]]:
    work.mkdir(parents=True, exist_ok=True)
    weights = work / "weights.safetensors"
    arguments = [model, str(weights), str(threads)]
    with OpenClip(EAGER, Path(sys.executable), "open_clip_worker.py", arguments, work / "open_clip.log") as peer:
        for precision in PRECISIONS:
            _export(model, weights, work / precision, precision)
        yield peer, {f"ours, {name}": Encoder.open(work / name, threads=threads) for name in PRECISIONS}


def _export(model: str, weights: Path, out: Path, precision: str) -> None:
    """Export the model unless the export exists, in its own process, which releases its memory at the end."""
    if (out / "manifest.json").exists():
        return
    command = [sys.executable, "-m", "export.export_clip", model, str(out), "--precision", precision]
    if not Path(model).is_dir():
        command += ["--weights", str(weights)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise BackendError(f"'{' '.join(command[1:])}' failed: {done.stderr.strip()[-300:]}")


def _towers(peer: OpenClip, encoders: Mapping[str, Encoder]) -> list[Stopwatch]:
    def ours(encoder: Encoder) -> Stopwatch:
        size = encoder.spec.size
        random = np.random.default_rng(0)

        def embed(count: int) -> float:
            batch = random.standard_normal((count, 3, size.height, size.width), dtype=np.float32)
            return _seconds(lambda: encoder.embed_pixels(batch))

        return embed

    return [peer.embed, *(ours(encoder) for encoder in encoders.values())]


def _preprocessors(peer: OpenClip, encoders: Mapping[str, Encoder]) -> list[Stopwatch]:
    def ours(encoder: Encoder) -> Stopwatch:
        return lambda count: _seconds(lambda: encoder.preprocess(_pictures(count)))

    return [peer.preprocess, *(ours(encoder) for encoder in encoders.values())]


def _rounds(engines: Sequence[Stopwatch], batch: int, count: int) -> NDArray[np.float64]:
    """Return seconds [engines, rounds] after a warm-up round."""
    rounds = [[engine(batch) for engine in engines] for _ in range(count + 1)]
    return np.array(rounds[1:]).T


def _medians(names: Sequence[str], seconds: Mapping[str, NDArray[np.float64]]) -> tuple[Medians, Medians]:
    """Return the milliseconds of every engine, and the speed of ours relative to the first in the same round."""
    ms: Medians = {name: {} for name in names}
    ratios: Medians = {name: {} for name in names[1:]}
    for key, parts in seconds.items():
        for name, row in zip(names, parts, strict=True):
            ms[name][key] = round(1e3 * float(np.median(row)), 3)
            if name in ratios:
                ratios[name][key] = round(float(np.median(parts[0] / row)), 3)
    return ms, ratios


def _throughput(encoder: Encoder, count: int) -> Throughput:
    """Measure embedding as in the build of a pack, with decoded pictures."""
    pictures = _pictures(count)
    encoder.embed_images(pictures)
    process = psutil.Process()
    before = sum(process.cpu_times()[:2])
    seconds = _seconds(lambda: [encoder.embed_images(pictures) for _ in range(max(2, 128 // count))])
    busy = (sum(process.cpu_times()[:2]) - before) / seconds
    return Throughput(round(count * max(2, 128 // count) / seconds, 2), round(busy, 3))


def _pictures(count: int) -> list[Pixels]:
    width, height = PICTURE
    return [np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)] * count


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL,
                        help="name of an open_clip model, or folder of a checkpoint (default %(default)s)")  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("runs/bench/encoder"),
                        help="folder for weights and exports (default %(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (default %(default)s)")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="of each engine (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="with batch 1 (default %(default)s)")
    args = parser.parse_args(argv)
    load = load_average()
    figures = compare_encoders(args.work, model=args.model, threads=args.threads, rounds=args.rounds)
    card = machine_card()
    line = figures.as_line() | {"load_before": load, "machine": card}
    print_results(card, [figures.about, as_table(figures)], line, args.out / f"encoder-{figures.model}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
