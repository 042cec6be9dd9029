"""The image tower of a CLIP, ours and open_clip's, by turns: what `bench_encoder` and `bench_retrieval` show.

open_clip runs in a process of its own. Each round every engine embeds the same number of pictures once, one engine at a
time; what is told is the median over the rounds of the ratio within a round, so that others' work on the machine
falls out as far as it can.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from rich.table import Table

from benchmarks.peers.base import WorkerPeer
from gog_edge.engines.onnx.session import physical_cores
from gog_edge.errors import BackendError
from gog_edge.exporting.clip.export import PRECISIONS
from gog_edge.files import read_json
from gog_edge.retrieval.encoder import Encoder
from gog_edge.types import Pixels

EAGER = "open_clip eager"
MODEL = "ViT-B-32"
BATCHES = (1, 8)
PICTURE = (320, 320)  # width and height in pixels of what is preprocessed: a thumbnail, a crop
PREPROCESS = "preprocess"
STREAM = (8, 64)  # batches whose throughput is told, preprocessing included

Stopwatch = Callable[[int], float]  # a batch -> seconds
Medians = dict[str, dict[str, float]]  # engine -> "batch 1", "batch 8", "preprocess" (of one picture)


@dataclass(frozen=True, slots=True)
class Throughput:
    """`Encoder.embed_images` of decoded pictures of `PICTURE` pixels."""

    images_s: float
    busy: float  # cores kept at work, of `threads`


@dataclass(frozen=True, slots=True)
class EncoderFigures:
    """What a race found; engines are `EAGER`, "ours, fp32" and "ours, int8"."""

    model: str
    threads: int
    about: str  # of open_clip
    ms: Medians
    ratios: Medians  # of ours: how many times as fast as eager
    throughput: dict[str, dict[int, Throughput]]  # ours -> batch
    parity: dict[str, Any]  # ours -> the image tower's, from the manifest


class OpenClip(WorkerPeer):
    """open_clip in its own process."""

    def embed(self, count: int) -> float:
        """Seconds for a batch."""
        return float(self._ask({"what": "embed", "count": count})["seconds"])

    def preprocess(self, count: int) -> float:
        """Seconds for `count` decoded pictures."""
        width, height = PICTURE
        return float(self._ask({"what": PREPROCESS, "count": count, "width": width, "height": height})["seconds"])


def race_encoder(
    work: Path, *, model: str = MODEL, threads: int | None = None, rounds: int = 20, batches: Sequence[int] = BATCHES
) -> EncoderFigures:
    """Export what is not there yet, race, and tell.

    Args:
        work: keeps random weights and exports between runs.
        model: an open_clip model with towers that can be exported in int8: a name, or a checkpoint's folder.
        threads: of every engine; one for each physical core when None.
        rounds: turns of each engine at batch 1; larger batches have fewer, at least three.
        batches: pictures embedded at once.

    Raises:
        BackendError: open_clip is not installed here, or a process died.
    """
    threads = threads or physical_cores()
    work = work / Path(model).name
    with _entrants(work, model, threads) as (peer, encoders):
        seconds = {
            f"batch {batch}": _rounds(_towers(peer, encoders), batch, max(3, rounds // batch)) for batch in batches
        }
        seconds[PREPROCESS] = _rounds(_preprocessors(peer, encoders), 8, max(3, rounds // 2)) / 8
        throughput = {name: {count: _stream(one, count) for count in STREAM} for name, one in encoders.items()}
    ms, ratios = _medians([EAGER, *encoders], seconds)
    parity = {
        f"ours, {precision}": read_json(work / precision / "manifest.json", what="encoder")["parity"]["image"]
        for precision in PRECISIONS
    }
    return EncoderFigures(work.name, threads, peer.about, ms, ratios, throughput, parity)


def encoder_table(figures: EncoderFigures) -> Table:
    """Engines as rows: milliseconds and, beside them, how many times as fast as eager; the export's least cosine to
    PyTorch; pictures a second through `embed_images` by so many, and the cores that this keeps at work."""
    keys = list(figures.ms[EAGER])
    table = Table("engine", title=f"{figures.model}, ms (times as fast as eager), {figures.threads} threads")
    for key in [*keys, "cosine", *(f"{count}: images/s (cores)" for count in STREAM)]:
        table.add_column(key, justify="right")
    for row in encoder_rows(figures):
        table.add_row(*row)
    return table


def encoder_rows(figures: EncoderFigures) -> list[list[str]]:
    """What `encoder_table` shows, as text."""
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
def _entrants(work: Path, model: str, threads: int) -> Iterator[tuple[OpenClip, dict[str, Encoder]]]:
    work.mkdir(parents=True, exist_ok=True)
    weights = work / "weights.safetensors"
    arguments = [model, str(weights), str(threads)]
    with OpenClip(EAGER, Path(sys.executable), "open_clip_worker.py", arguments, work / "open_clip.log") as peer:
        for precision in PRECISIONS:
            _export(model, weights, work / precision, precision)
        yield peer, {f"ours, {name}": Encoder.open(work / name, threads=threads) for name in PRECISIONS}


def _export(model: str, weights: Path, out: Path, precision: str) -> None:
    """Our export, unless it is there; by a process of its own, which gives its memory back."""
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
    """Seconds [engines, rounds], after one round that does not count."""
    rounds = [[engine(batch) for engine in engines] for _ in range(count + 1)]
    return np.array(rounds[1:]).T


def _medians(names: Sequence[str], seconds: Mapping[str, NDArray[np.float64]]) -> tuple[Medians, Medians]:
    """Milliseconds of every engine, and of ours how many times as fast as the first in the same round."""
    ms: Medians = {name: {} for name in names}
    ratios: Medians = {name: {} for name in names[1:]}
    for key, parts in seconds.items():
        for name, row in zip(names, parts, strict=True):
            ms[name][key] = round(1e3 * float(np.median(row)), 3)
            if name in ratios:
                ratios[name][key] = round(float(np.median(parts[0] / row)), 3)
    return ms, ratios


def _stream(encoder: Encoder, count: int) -> Throughput:
    """As in building a pack: pictures are decoded already."""
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
