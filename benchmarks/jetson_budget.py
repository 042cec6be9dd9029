"""Compute what fits the memory of a Jetson from the shapes of the models and the planner's formulas; run nothing.

    python -m benchmarks.jetson_budget --context 4096,8192

Engines are assumed as `export.build_engines` creates them: weight matrices of the decoder's layers in fp16, or in int4
with a scale for each block of 128; all other matrices in fp16, vectors in fp32. Added are the KV cache of every
conversation and of the prompt in fp16, scratch memory of the vision tower and of one prefill step, encoder and packs
(--index), the program, and memory for the system and for CUDA (--system; assumed, not measured).

The limit of decoding is the memory bandwidth: each token reads the decoder and the KV cache once. Bandwidth and memory
are the published values, not measured; the Nano's with its newer firmware. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gog_edge.cli.common import command_imports, command_main

with command_imports(__name__):
    from rich.console import Console
    from rich.table import Table

    from gog_edge.config import Limits
    from gog_edge.exporting.policy.checkpoint import DEFAULT_MAX_PIXELS, Checkpoint
    from gog_edge.exporting.policy.config import ModelConfig
    from gog_edge.exporting.policy.export import DEFAULT_BLOCK
    from gog_edge.exporting.policy.random_checkpoint import SHAPES, shape_of
    from gog_edge.exporting.policy.weights import WeightFiles
    from gog_edge.files import write_json
    from gog_edge.planner import (
        FP16_BYTES,
        MemoryPlan,
        format_size,
        kv_bytes,
        parse_size,
        picture_bytes,
        prefill_bytes,
        vision_bytes,
    )
    from gog_edge.policy.manifest import TextSpec
    from gog_edge.policy.vision import VisionSpec

PRECISIONS = ("int4", "fp16")
NOTE = "computed, not measured on a Jetson"


@dataclass(frozen=True, slots=True)
class Board:
    """A Jetson module with its published figures."""

    name: str
    memory: int  # GiB
    bandwidth: float  # GB/s


BOARDS = (Board("Orin Nano", 8, 102.0), Board("Orin NX", 16, 102.4), Board("AGX Orin", 64, 204.8),
          Board("Thor", 128, 273.0))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Engines:
    """Sizes of a model's engines in bytes."""

    decoder: int  # all that a token reads, including the head
    vision: int


@dataclass(frozen=True, slots=True)
class Budget:
    """The budget of one model in one precision with one context length."""

    model: str
    precision: str
    context: int
    engines: Engines
    total: int  # bytes, of everything in `MemoryPlan`
    left: dict[str, int]  # by board: bytes left; negative if it does not fit
    tokens_s: dict[str, float]  # by board, if it fits: tokens per second that the bandwidth allows with a full cache


def engine_bytes(name: str, precision: str) -> Engines:
    """Return the engine sizes of a released shape. Raises CheckpointError for an unknown shape."""
    shape = shape_of(name)
    tensors = shape.tensors()
    sizes = {"vision": 0, "decoder": 0}
    for tensor, value in tensors.items():
        part = "vision" if "visual." in tensor else "decoder"
        matrix, embeddings = value.dim() > 1, "embed_tokens" in tensor
        if embeddings and not shape.config.tie_word_embeddings:
            continue  # the host reads them from a mapped file; tied embeddings are the head
        int4 = precision == "int4" and matrix and ".layers." in tensor
        size = (0.5 + FP16_BYTES / DEFAULT_BLOCK) if int4 else FP16_BYTES if matrix else 2 * FP16_BYTES
        sizes[part] += int(size * value.numel())
    return Engines(sizes["decoder"], sizes["vision"])


def compute_budget(name: str, precision: str, context: int, args: argparse.Namespace) -> Budget:
    """Plan the memory of a model and return what is left on each board."""
    text, vision = _specs(name)
    engines = engine_bytes(name, precision)
    cache = context * kv_bytes(text, FP16_BYTES)
    plan = MemoryPlan(
        weights=engines.decoder + engines.vision,
        conversations=(1 + args.concurrent) * cache,
        pictures=vision_bytes(replace(vision, max_pixels=args.max_pixels)),
        prefill=prefill_bytes(text),
        index=args.index,
        decoding=picture_bytes(Limits(concurrent=args.concurrent)),
    )
    left = {board.name: board.memory * 2**30 - args.system - plan.total for board in BOARDS}
    tokens = {board.name: round(board.bandwidth * 1e9 / (engines.decoder + cache), 1)
              for board in BOARDS if left[board.name] >= 0}  # fmt: skip
    return Budget(name, precision, context, engines, plan.total, left, tokens)


def compute_all(args: argparse.Namespace) -> list[Budget]:
    """Return the budgets of all released shapes in both precisions with each context length."""
    return [compute_budget(name, precision, int(context), args) for name in SHAPES for precision in PRECISIONS
            for context in args.context.split(",")]  # fmt: skip


def _specs(name: str) -> tuple[TextSpec, VisionSpec]:
    """Return the specifications that the exporter reads from a checkpoint of the shape."""
    shape = shape_of(name)
    config = json.loads(shape.config.to_json_string(use_diff=False)) | {"architectures": [shape.architecture.__name__]}
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "preprocessor_config.json", shape.processor)
        write_json(Path(folder) / "config.json", config)
        no_weights = WeightFiles(Path(folder), {}, (), ())
        checkpoint = Checkpoint(Path(folder), ModelConfig.open(Path(folder)), no_weights)
        return checkpoint.text, checkpoint.vision


def as_rows(budgets: Sequence[Budget]) -> list[list[str]]:
    """Return model, precision, context, memory, and for each board GiB left and the limit of tokens per second."""
    return [
        [one.model, one.precision, f"{one.context:,}", format_size(one.total),
         *(f"{one.left[board.name] / 2**30:.1f} ({one.tokens_s[board.name]:.0f}/s)"
           if board.name in one.tokens_s else "no" for board in BOARDS)]
        for one in budgets
    ]  # fmt: skip


def _table(budgets: Sequence[Budget]) -> Table:
    table = Table("model", "", "context", "memory", *(f"{one.name} {one.memory}" for one in BOARDS),
                  title=f"GiB left, and the limit of tokens per second ({NOTE})")  # fmt: skip
    for row in as_rows(budgets):
        table.add_row(*row)
    return table


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", default="4096,8192",
                        help="tokens of a conversation, comma-separated (default %(default)s)")  # fmt: skip
    parser.add_argument("--concurrent", type=int, default=1,
                        help="conversations at the same time (default %(default)s)")  # fmt: skip
    parser.add_argument("--max-pixels", type=int, default=DEFAULT_MAX_PIXELS,
                        help="of the largest picture (default %(default)s)")  # fmt: skip
    parser.add_argument("--index", type=parse_size, default="512M",
                        help="memory of encoder and packs (default %(default)s)")  # fmt: skip
    parser.add_argument("--system", type=parse_size, default="2G",
                        help="memory for the system, a desktop and CUDA (default %(default)s)")  # fmt: skip
    return parser.parse_args(argv)


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and the results as a last line of JSON."""
    args = parse_arguments(argv)
    budgets = compute_all(args)
    Console(width=140).print(_table(budgets))
    print(json.dumps({"note": NOTE, "max_pixels": args.max_pixels, "index": args.index, "system": args.system,
                      "concurrent": args.concurrent, "boards": [asdict(one) for one in BOARDS],
                      "budgets": [asdict(one) for one in budgets]}))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
