"""How quick is the encoder? A CLIP's image tower through our engine, in fp32 and int8, against open_clip's eager one.

    python -m benchmarks.bench_encoder

Same weights, same threads: `--model` with a name (ViT-B-32) takes random weights, with a checkpoint's folder its own.
Each round the engines take turns; ratios are medians over the rounds of the ratio within a round. Preprocessing is of
decoded pictures of 320 x 320 pixels, as thumbnails and crops come. The least cosine is that of the export to PyTorch's
vectors, on the atlas's sample pictures and crops of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import psutil
from rich.console import Console

from benchmarks.encoder_race import BATCHES, MODEL, EncoderFigures, encoder_table, race_encoder
from benchmarks.machine import machine_card
from gog_edge.engines.onnx.session import physical_cores
from gog_edge.errors import GogEdgeError
from gog_edge.files import write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 when it cannot be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="name of an open_clip model, or a checkpoint's folder")
    parser.add_argument("--work", type=Path, default=Path("runs/bench/encoder"), help="keeps weights and exports")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="JSON goes here")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--rounds", type=int, default=20, help="turns of each engine at batch 1")
    args = parser.parse_args(argv)
    load = round(psutil.getloadavg()[0], 2)
    try:
        figures = race_encoder(args.work, model=args.model, threads=args.threads, rounds=args.rounds)
    except GogEdgeError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    line = as_line(figures) | {"load_before": load, "machine": machine_card()}
    console = Console()
    console.print(*(f"{key}: {value}" for key, value in machine_card().items()), sep="\n", highlight=False)
    console.print(figures.about, encoder_table(figures), sep="\n")
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"encoder-{figures.model}.json", line)
    print(json.dumps(line))
    return 0


def as_line(figures: EncoderFigures) -> dict[str, object]:
    """The figures, and those that are looked for first by names of their own."""
    line: dict[str, object] = asdict(figures)
    for name, parts in figures.ratios.items():
        precision = name.removeprefix("ours, ")
        line |= {f"{precision}_over_eager_batch_{batch}": parts[f"batch {batch}"] for batch in BATCHES}
        line[f"{precision}_min_cosine"] = figures.parity[name]["min_cosine"]
    return line


if __name__ == "__main__":
    sys.exit(main())
