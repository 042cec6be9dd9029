"""Export an open_clip model for the runtime: image.onnx, text.onnx, tokenizer.json, manifest.json.

    python -m export.export_clip ViT-B-32 out/encoder --weights vit_b_32.safetensors --tag laion2b_s34b_b79k
    python -m export.export_clip atlas/checkpoints/encoder gog_edge/data/atlas/encoder
    python -m export.export_clip ViT-B-32 out/encoder --weights vit_b_32.safetensors --precision int8

MODEL is a folder with open_clip_config.json and weights, or the name of a configuration that open_clip ships.
Nothing is downloaded. The export fails where ONNX Runtime does not give what PyTorch gives. int8 is for ViT models:
matrix products of whole numbers, about three times as fast, for a quarter of the bytes. Its vectors are held to a
cosine of 0.99 to PyTorch's, on real pictures too, so that packs built in either precision can be searched in the other.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gog_edge.errors import GogEdgeError
from gog_edge.exporting.clip.checkpoint import load_clip
from gog_edge.exporting.clip.export import PRECISIONS, export_clip
from gog_edge.exporting.clip.parity import SAMPLES


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Export an open_clip model for the runtime.")
    parser.add_argument("model", metavar="MODEL", help="folder with open_clip_config.json, or an open_clip model name")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--weights", type=Path, help="local weights (needed with a name)")
    parser.add_argument("--tag", help="open_clip's tag of these weights: brings their preprocessing and activation")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="int8: whole numbers, for ViT models")
    parser.add_argument("--pictures", type=Path, default=SAMPLES, help="folder of pictures that parity is measured on")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = _arguments(argv)
    begin = time.perf_counter()
    try:
        checkpoint = load_clip(args.model, weights=args.weights, tag=args.tag)
        manifest = export_clip(checkpoint, args.out, precision=args.precision, pictures=args.pictures)
    except GogEdgeError as exc:
        print(f"export_clip: {exc}", file=sys.stderr)
        return 1
    title = f"{manifest['name']}, {args.precision} -> {args.out}"
    table = Table("file", "MB", "max difference", "least cosine", title=title)
    for entry in manifest["files"]:
        parity = manifest["parity"].get(entry["path"].removesuffix(".onnx"), {})
        shown = (f"{parity['max_abs']:.1e}", f"{parity['min_cosine']:.6f}") if parity else ("", "")
        table.add_row(entry["path"], f"{entry['size'] / 1e6:.2f}", *shown)
    Console().print(table)
    keys = ("name", "dim", "precision", "weights_sha256", "preprocessing_sha256", "parity")
    print(json.dumps({key: manifest[key] for key in keys} | {"seconds": round(time.perf_counter() - begin, 1)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
