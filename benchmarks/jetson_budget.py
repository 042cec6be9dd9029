"""What fits a Jetson's memory? Reckoned from the true shapes of the models by the planner's formulae; nothing is run.

    python -m benchmarks.jetson_budget --context 4096,8192

Engines are taken as `export.build_engines` makes them: matrices of the decoder's layers in halves, or in 4 bits with a
scale for each block of 128; all other matrices in halves, vectors in single precision. Beside them: keys and values of
every conversation and of the prompt in halves, scratch memory of the vision tower and of one prefill step, encoder and
packs (`--index`), the program, and what is left to the system and to CUDA (`--system`: assumed, not measured).

The limit of decoding is the memory's bandwidth: each token reads the decoder and the cache once. Bandwidths and
memories are as published, not measured; the Nano's is that of its newer firmware. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gog_edge.exporting.policy.checkpoint import DEFAULT_MAX_PIXELS, Checkpoint
from gog_edge.exporting.policy.export import DEFAULT_BLOCK
from gog_edge.exporting.policy.random_checkpoint import SHAPES, shape_of
from gog_edge.files import write_json
from gog_edge.planner import HALF_BYTES, MemoryPlan, as_size, kv_bytes, parse_size, prefill_bytes, vision_bytes
from gog_edge.policy.manifest import TextSpec, VisionSpec

PRECISIONS = ("int4", "fp16")
NOTE = "reckoned, not run: no Jetson was at hand"


@dataclass(frozen=True, slots=True)
class Board:
    """A Jetson, as it is sold."""

    name: str
    memory: int  # GiB
    bandwidth: float  # GB/s


BOARDS = (Board("Orin Nano", 8, 102.0), Board("Orin NX", 16, 102.4), Board("AGX Orin", 64, 204.8),
          Board("Thor", 128, 273.0))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Engines:
    """Bytes of a model's engines."""

    decoder: int  # all that a token reads, the head too
    vision: int


@dataclass(frozen=True, slots=True)
class Budget:
    """One model in one precision with one length of conversations."""

    model: str
    precision: str
    context: int
    engines: Engines
    total: int  # bytes, of all that `MemoryPlan` counts
    left: dict[str, int]  # board -> bytes left; below 0 it does not fit
    tokens_s: dict[str, float]  # board -> tokens a second that bandwidth allows with a full cache; where it fits


def engine_bytes(name: str, precision: str) -> Engines:
    """Bytes of the engines of a released shape. Raises CheckpointError for a shape there is not."""
    shape = shape_of(name)
    tensors = shape.tensors()
    sizes = {"vision": 0, "decoder": 0}
    for tensor, value in tensors.items():
        part = "vision" if "visual." in tensor else "decoder"
        matrix, embeddings = value.dim() > 1, "embed_tokens" in tensor
        if embeddings and not shape.config.tie_word_embeddings:
            continue  # the host looks them up in a mapped file; where they are tied, they are the head
        quarter = precision == "int4" and matrix and ".layers." in tensor
        wide = (0.5 + HALF_BYTES / DEFAULT_BLOCK) if quarter else HALF_BYTES if matrix else 2 * HALF_BYTES
        sizes[part] += int(wide * value.numel())
    return Engines(sizes["decoder"], sizes["vision"])


def reckon(name: str, precision: str, context: int, args: argparse.Namespace) -> Budget:
    """The plan of a model, and what it leaves of each board's memory."""
    text, vision = _specs(name)
    engines = engine_bytes(name, precision)
    cache = context * kv_bytes(text, HALF_BYTES)
    plan = MemoryPlan(
        weights=engines.decoder + engines.vision,
        conversations=(1 + args.concurrent) * cache,
        pictures=vision_bytes(replace(vision, max_pixels=args.max_pixels)),
        prefill=prefill_bytes(text),
        index=args.index,
    )
    left = {board.name: board.memory * 2**30 - args.system - plan.total for board in BOARDS}
    tokens = {board.name: round(board.bandwidth * 1e9 / (engines.decoder + cache), 1)
              for board in BOARDS if left[board.name] >= 0}  # fmt: skip
    return Budget(name, precision, context, engines, plan.total, left, tokens)


def reckon_all(args: argparse.Namespace) -> list[Budget]:
    """All released shapes in both precisions, with each length of conversations."""
    return [reckon(name, precision, int(context), args) for name in SHAPES for precision in PRECISIONS
            for context in args.context.split(",")]  # fmt: skip


def _specs(name: str) -> tuple[TextSpec, VisionSpec]:
    """A released shape as the exporter reads it from a checkpoint's folder."""
    shape = shape_of(name)
    config = json.loads(shape.config.to_json_string(use_diff=False)) | {"architectures": [shape.architecture.__name__]}
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "preprocessor_config.json", shape.processor)
        checkpoint = Checkpoint(Path(folder), config, {})
        return checkpoint.text, checkpoint.vision


def as_rows(budgets: Sequence[Budget]) -> list[list[str]]:
    """For each budget: model, precision, context, what it takes, and for each board what is left and the limit."""
    return [
        [one.model, one.precision, f"{one.context:,}", as_size(one.total),
         *(f"{one.left[board.name] / 2**30:.1f} ({one.tokens_s[board.name]:.0f}/s)"
           if board.name in one.tokens_s else "no" for board in BOARDS)]
        for one in budgets
    ]  # fmt: skip


def _table(budgets: Sequence[Budget]) -> Table:
    table = Table("model", "", "context", "takes", *(f"{one.name} {one.memory}" for one in BOARDS),
                  title=f"GiB left, and the limit of tokens a second ({NOTE})")  # fmt: skip
    for row in as_rows(budgets):
        table.add_row(*row)
    return table


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", default="4096,8192", help="tokens of a conversation, with commas between")
    parser.add_argument("--concurrent", type=int, default=1, help="questions answered at the same time")
    parser.add_argument("--max-pixels", type=int, default=DEFAULT_MAX_PIXELS, help="of the largest picture")
    parser.add_argument("--index", type=parse_size, default="512M", help="encoder and packs")
    parser.add_argument("--system", type=parse_size, default="2G", help="left to the system, a desktop, CUDA itself")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, and all of it as a last line of JSON."""
    args = parsed(argv)
    budgets = reckon_all(args)
    Console(width=140).print(_table(budgets))
    print(json.dumps({"note": NOTE, "max_pixels": args.max_pixels, "index": args.index, "system": args.system,
                      "concurrent": args.concurrent, "boards": [asdict(one) for one in BOARDS],
                      "budgets": [asdict(one) for one in budgets]}))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
