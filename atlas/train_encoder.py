"""Train the atlas encoder (an open_clip model of its own small configuration) on flags, or measure an exported one.

    python -m atlas.train_encoder --flags flag-icons-7.5.0.tgz --out atlas/checkpoints/encoder --minutes 25
    python -m export.export_clip atlas/checkpoints/encoder gog_edge/data/atlas/encoder
    python -m atlas.train_encoder --flags flag-icons-7.5.0.tgz --evaluate gog_edge/data/atlas/encoder

`--work` holds the states of the run: the same command goes on where a broken one stopped. `--minutes 0 --start
best.pt` makes only the text tower and the folder, for an image tower that is done.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from atlas.encoder.flagset import FIRST_TEST_SEED, FlagSet, alter_flags, invent_flags, load_flagset
from atlas.encoder.images import Recipe
from atlas.encoder.measure import scene_crops
from atlas.encoder.report import Row, as_json, evaluate, strayed_crops
from atlas.encoder.run import ImageRun, Trial
from atlas.encoder.save import finish
from gog_edge.errors import GogEdgeError
from gog_edge.exporting.torchvision_shim import import_torchvision

CONFIG = Path(__file__).parent / "encoder" / "model.json"
PROGRESS_SEED = 500


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the atlas encoder on flags, or measure an exported one.")
    parser.add_argument("--flags", type=Path, required=True, help="flag-icons 7.5.0: the npm tarball or its folder")
    parser.add_argument("--evaluate", type=Path, metavar="ENCODER", help="measure this encoder folder and stop")
    parser.add_argument("--out", type=Path, help="folder for the open_clip checkpoint")
    parser.add_argument("--work", type=Path, help="folder for states (default: OUT/work)")
    parser.add_argument("--minutes", type=float, default=25.0, help="image training")
    parser.add_argument("--start", type=Path, help="an earlier run's best.pt")
    parser.add_argument("--rate", type=float, default=Recipe.rate, help="highest learning rate")
    parser.add_argument("--small-share", type=float, default=Recipe.small_share, help="of the time, at 64 px")
    parser.add_argument("--invented", type=int, default=3000, help="invented flags to learn from")
    parser.add_argument("--altered", type=int, default=1000, help="altered real flags to learn from")
    parser.add_argument("--text-steps", type=int, default=900)
    parser.add_argument("--leave-out-every", type=int, default=0, help="leave every n-th flag out of training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def _left_out(flagset: FlagSet, every: int) -> list[int]:
    """Groups that are not trained on."""
    return list(range(every - 1, max(flagset.groups) + 1, every)) if every else []


def _train(args: argparse.Namespace, flagset: FlagSet) -> dict[str, float]:
    """The whole training; returns what the last line tells."""
    work = args.work or args.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    best = args.start
    if args.minutes > 0:
        _train_images(args, config, flagset, work)
        best = work / "best.pt"
    if best is None:
        raise SystemExit("train_encoder: --minutes 0 needs --start")
    tower = torch.load(best, weights_only=True)["tower"]
    right = finish(
        config, tower, flagset, args.out, steps=args.text_steps, report=lambda step, loss: _say(text=step, loss=loss)
    )
    return {"captions_right": right}


def _train_images(args: argparse.Namespace, config: dict[str, Any], flagset: FlagSet, work: Path) -> None:
    left_out = set(_left_out(flagset, args.leave_out_every))
    kept = [flagset.groups.index(g) for g in range(max(flagset.groups) + 1) if g not in left_out]
    flags = [flagset.flags[index] for index in kept] + invent_flags(range(args.invented))
    flags += alter_flags(flagset.flags, args.altered, args.seed)
    unknown = invent_flags(range(FIRST_TEST_SEED - 150, FIRST_TEST_SEED))
    trial = Trial(
        flagset,
        scene_crops(flagset.flags, per_flag=2, seed=PROGRESS_SEED),
        [crop.pixels for crop in scene_crops(unknown, per_flag=1, seed=PROGRESS_SEED + 1)],
        strayed_crops([*flagset.flags, *unknown], 100, PROGRESS_SEED + 2),
    )
    recipe = Recipe(rate=args.rate, small_share=args.small_share)
    run = ImageRun(config["model_cfg"], flags, len(kept), recipe, work, seed=args.seed)
    if args.start is not None:
        run.start_from(args.start)
    run.resume()
    run.train(args.minutes * 60, trial, lambda numbers: _say(**numbers))


def _say(**numbers: float) -> None:
    print(time.strftime("%H:%M:%S"), " ".join(f"{name} {value:.4g}" for name, value in numbers.items()), flush=True)


def _print_table(rows: Sequence[Row]) -> None:
    table = Table("what", "crops", "recall@1", "recall@5", "AUROC cosine", "AUROC margin")
    for row in rows:
        numbers = (row.recall1, row.recall5, row.auroc, row.auroc_margin)
        table.add_row(row.what, str(row.crops), *("" if value is None else f"{value:.4f}" for value in numbers))
    Console(width=110).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    import_torchvision()
    try:
        flagset = load_flagset(args.flags)
        if args.evaluate is not None:
            rows = evaluate(args.evaluate, flagset, left_out=_left_out(flagset, args.leave_out_every))
            _print_table(rows)
            print(json.dumps(as_json(rows)))
            return 0
        if args.out is None:
            raise SystemExit("train_encoder: --out is needed")
        print(json.dumps(_train(args, flagset)))
    except GogEdgeError as exc:
        print(f"train_encoder: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
