"""Train the atlas encoder, an open_clip model of a small configuration, on flags; or measure an exported encoder.

    python -m atlas.train_encoder --flags flag-icons-7.5.0.tgz --out atlas/checkpoints/encoder --minutes 25
    python -m export.export_clip atlas/checkpoints/encoder gog_edge/data/atlas/encoder
    python -m atlas.train_encoder --flags flag-icons-7.5.0.tgz --evaluate gog_edge/data/atlas/encoder

--work keeps the state of a run: the same command resumes an interrupted run. `--minutes 0 --start best.pt` trains only
the text tower, for an image tower that is finished.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gog_edge.cli.common import command_imports, command_main
from gog_edge.errors import InputError

with command_imports(__name__):
    import torch
    from rich.console import Console
    from rich.table import Table

    from atlas.encoder.evaluation import Row, as_json, evaluate, negative_crops, scene_crops
    from atlas.encoder.flagset import FIRST_TEST_SEED, FlagSet, alter_flags, invent_flags, load_flagset
    from atlas.encoder.image_tower import ImageTraining, Recipe, ValidationSet
    from atlas.encoder.text_tower import finish
    from gog_edge.exporting.torchvision_shim import import_torchvision

CONFIG = Path(__file__).parent / "encoder" / "model.json"
PROGRESS_SEED = 500


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flags", type=Path, required=True, help="npm package flag-icons 7.5.0, tarball or folder")
    parser.add_argument("--evaluate", type=Path, metavar="ENCODER", help="measure this exported encoder and exit")
    parser.add_argument("--out", type=Path, help="folder for the open_clip checkpoint")
    parser.add_argument("--work", type=Path, help="folder for the state (default: OUT/work)")
    parser.add_argument("--minutes", type=float, default=25.0, help="of image training (default %(default)s)")
    parser.add_argument("--start", type=Path, help="best.pt of another run, to start from")
    parser.add_argument("--rate", type=float, default=Recipe().rate, help="highest learning rate (default %(default)s)")
    parser.add_argument("--small-share", type=float, default=Recipe().small_share,
                        help="fraction of the time at 64 pixels (default %(default)s)")  # fmt: skip
    parser.add_argument("--invented", type=int, default=3000, help="invented flags to train on (default %(default)s)")
    parser.add_argument("--altered", type=int, default=1000, help="altered flags to train on (default %(default)s)")
    parser.add_argument("--text-steps", type=int, default=900, help="of text training (default %(default)s)")
    parser.add_argument("--leave-out-every", type=int, default=0, help="exclude every n-th flag from training")
    parser.add_argument("--threads", type=int, default=1, help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    args = parser.parse_args(argv)
    if args.evaluate is None and args.out is None:
        parser.error("--out is required to train; use --evaluate to measure an encoder")
    if args.evaluate is None and args.minutes <= 0 and args.start is None:
        parser.error("--minutes 0 requires --start, the image tower to train a text tower for")
    return args


def _left_out(flagset: FlagSet, every: int) -> list[int]:
    """Return the groups excluded from training."""
    return list(range(every - 1, max(flagset.groups) + 1, every)) if every else []


def _train(args: argparse.Namespace, flagset: FlagSet) -> dict[str, float]:
    """Train both towers and write the checkpoint; return the accuracy of the captions."""
    work = args.work or args.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    best = args.start
    if args.minutes > 0:
        _train_images(args, config, flagset, work)
        best = work / "best.pt"
    if not best.is_file():
        raise InputError(f"--start: the checkpoint '{best}' does not exist")
    tower = torch.load(best, weights_only=True)["tower"]
    accuracy = finish(
        config, tower, flagset, args.out, steps=args.text_steps,
        report=lambda step, loss: _print_progress(text=step, loss=loss),
    )  # fmt: skip
    return {"captions_right": accuracy}


def _train_images(args: argparse.Namespace, config: dict[str, Any], flagset: FlagSet, work: Path) -> None:
    left_out = set(_left_out(flagset, args.leave_out_every))
    trained = [flagset.groups.index(g) for g in range(max(flagset.groups) + 1) if g not in left_out]
    flags = [flagset.flags[index] for index in trained] + invent_flags(range(args.invented))
    flags += alter_flags(flagset.flags, args.altered, args.seed)
    unknown = invent_flags(range(FIRST_TEST_SEED - 150, FIRST_TEST_SEED))
    validation = ValidationSet(
        flagset,
        scene_crops(flagset.flags, per_flag=2, seed=PROGRESS_SEED),
        [crop.pixels for crop in scene_crops(unknown, per_flag=1, seed=PROGRESS_SEED + 1)],
        negative_crops([*flagset.flags, *unknown], 100, PROGRESS_SEED + 2),
    )
    recipe = Recipe(rate=args.rate, small_share=args.small_share)
    run = ImageTraining(config["model_cfg"], flags, len(trained), recipe, work, seed=args.seed)
    if args.start is not None:
        run.start_from(args.start)
    run.resume()
    run.train(args.minutes * 60, validation, lambda figures: _print_progress(**figures))


def _print_progress(**figures: float) -> None:
    print(time.strftime("%H:%M:%S"), " ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)


def _print_table(rows: Sequence[Row]) -> None:
    table = Table("queries", "crops", "recall@1", "recall@5", "AUROC cosine", "AUROC margin")
    for row in rows:
        figures = (row.recall1, row.recall5, row.auroc, row.auroc_margin)
        table.add_row(row.what, str(row.crops), *("" if value is None else f"{value:.4f}" for value in figures))
    Console(width=110).print(table)


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    import_torchvision()
    flagset = load_flagset(args.flags)
    if args.evaluate is not None:
        rows = evaluate(args.evaluate, flagset, left_out=_left_out(flagset, args.leave_out_every))
        _print_table(rows)
        print(json.dumps(as_json(rows)))
    else:
        print(json.dumps(_train(args, flagset)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
