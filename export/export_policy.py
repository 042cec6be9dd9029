"""Export a Qwen2.5-VL or Qwen3-VL checkpoint folder to a policy folder, and prove that both say the same.

    python -m export.export_policy runs/policy out/policy --engine ort --precision int4

The folder gets the graphs, the embedding table, the tokenizer, the chat strings and a manifest with the parity
measured. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from gog_edge.engines.manifest import ENGINES, ORT, build_command
from gog_edge.errors import GogEdgeError
from gog_edge.exporting.policy.export import (
    DEFAULT_BLOCK,
    DEFAULT_CONTEXT,
    PRECISIONS,
    SECOND_FORMS,
    check_available,
    export_policy,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when exported and within the parity limit, 1 when refused."""
    parser = argparse.ArgumentParser(prog="python -m export.export_policy", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="folder with config.json, safetensors, tokenizer.json")
    parser.add_argument("out", type=Path, help="policy folder to write; an older policy there is replaced")
    parser.add_argument("--engine", choices=ENGINES, default=ORT, help="what it will run on; see export.build_engines")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of weights; the processor computes in "
                                                                                "fp32 from fp16, too")  # fmt: skip
    parser.add_argument("--block", type=int, default=DEFAULT_BLOCK, help="int4: weights that share a scale")
    parser.add_argument("--second", choices=SECOND_FORMS, help="int4: second form of the decoder's weights: for "
                        "our own operators (x86-64; the default), for many tokens on ONNX Runtime's, or none")
    parser.add_argument("--adapter", type=Path, help="PEFT folder of LoRA weights to merge into the checkpoint")
    parser.add_argument("--name", help="name of the policy (default: the checkpoint folder's)")
    parser.add_argument("--context", type=int, default=DEFAULT_CONTEXT, help="tokens of one conversation")
    parser.add_argument("--dialect", help="a dialect's file or name (default: the checkpoint's, else 'gog')")
    parser.add_argument("--no-parity", action="store_true", help="skip the parity check; the manifest says so")
    args = parser.parse_args(argv)
    started = time.monotonic()
    dialect = Path(args.dialect) if args.dialect and Path(args.dialect).is_file() else args.dialect
    try:
        check_available(args.engine, args.precision)
        manifest = export_policy(
            args.checkpoint,
            args.out,
            adapter=args.adapter,
            block=args.block,
            second=args.second,
            progress=_show,
            engine=args.engine,
            precision=args.precision,
            name=args.name,
            context=args.context,
            dialect=dialect,
            parity=not args.no_parity,
        )
    except GogEdgeError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    table = Table("file", "bytes", "sha256", title=f"{manifest.name} -> {args.out}")
    for entry in manifest.files:
        table.add_row(entry.path, f"{entry.size:,}", entry.sha256[:16])
    Console(stderr=False).print(table)
    if args.engine != ORT:
        print(f"put it into a bundle, then build its engines: {build_command('BUNDLE', args.engine)}")
    seconds = round(time.monotonic() - started, 2)
    print(json.dumps({"out": str(args.out), "seconds": seconds, "parity": manifest.parity}))
    return 0


def _show(layers: range, what: str) -> Iterable[int]:
    return track(layers, what, console=Console(stderr=True))


if __name__ == "__main__":
    raise SystemExit(main())
