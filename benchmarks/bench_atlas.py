"""How good and how quick is the whole loop? Asks a fixed test set about held-out countries in three workflows.

    python -m benchmarks.bench_atlas --limit 70

*gog* lets the policy choose, *full_image* searches with the whole picture and forbids gazing, *direct* forbids any
search. The test set is drawn from a seed and checked against its hash; `--limit` takes its first part, which is
balanced over the kinds. Milliseconds are of this machine: compare the workflows, not the machines.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from atlas.countries import COUNTRIES_FILE, Country, load_countries
from atlas.pack import stored_flags
from atlas.questions import KINDS
from atlas.scenes import draw_scene
from atlas.scoring import Score, score
from atlas.testset import AskedScene, SetMaker, items_hash, scene_flags
from benchmarks.machine import machine_card
from gog_edge.agent.events import Answered, AnswerRecord, Workflow
from gog_edge.agent.loop import run_episode
from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
from gog_edge.errors import ArtifactError
from gog_edge.files import read_json
from gog_edge.picture import Picture
from gog_edge.policy.base import Policy
from gog_edge.policy.local import LocalPolicy
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.retriever import Retriever
from gog_edge.types import Pixels

TEST_SETS = Path(__file__).parent / "testsets.json"  # name -> seed, per_kind, sha256
WIDTH = 640  # pixels of the pictures asked about


def load_test_set(name: str, countries: Sequence[Country], flags: dict[str, Pixels]) -> list[AskedScene]:
    """Draw a fixed test set and hold it against its hash.

    Raises:
        ArtifactError: unknown name, or another hash (other facts or flags than the set was fixed with).
    """
    sets = read_json(TEST_SETS, what="test sets")
    if name not in sets:
        raise ArtifactError(f"there is no test set '{name}'; there are {', '.join(sets)}")
    fixed = sets[name]
    items = SetMaker(countries, flags, fixed["seed"]).make(fixed["per_kind"])
    if items_hash(items) != fixed["sha256"]:
        raise ArtifactError(f"test set '{name}' has the hash {items_hash(items)}, fixed was {fixed['sha256']}")
    return items


class Bench:
    """A bundle, opened once."""

    def __init__(self, folder: Path, threads: int) -> None:
        bundle = open_bundle(folder)
        self.limits = bundle.limits
        encoder = Encoder.open(bundle.encoder, threads=threads)
        self.pack = Pack.open(bundle.packs[0], encoder)
        self.retriever = Retriever(encoder, [self.pack])
        local = LocalPolicy.open(bundle.policy, threads=threads)
        self.policy: Policy = local
        self.dialect = local.dialect
        self.countries = load_countries(bundle.packs[0] / COUNTRIES_FILE)
        self.flags = stored_flags(self.pack, self.countries)

    def ask(self, picture: Picture, question: str, workflow: Workflow) -> AnswerRecord:
        """One whole episode."""
        budget = self.limits.budget
        events = run_episode(
            picture, question, policy=self.policy, retriever=self.retriever, budget=budget, workflow=workflow
        )
        *_, last = events
        if not isinstance(last, Answered):
            raise ArtifactError(f"an episode ended with {type(last).__name__}, not with an answer")
        return last.record

    def run(self, items: Sequence[AskedScene], workflow: Workflow) -> list[Score]:
        """All items in one workflow."""
        scores = []
        for item in track(items, workflow.value, console=Console(stderr=True)):
            picture = Picture(draw_scene(item.scene, scene_flags(item.scene, self.flags), WIDTH))
            record = self.ask(picture, item.question.text, workflow)
            scores.append(score(item, record, picture.size, self.dialect.not_found))
        return scores


def share(values: Sequence[bool]) -> float:
    """Share of True, 0 where there is nothing."""
    return round(float(np.mean(values)), 4) if values else 0.0


def summary(items: Sequence[AskedScene], scores: Sequence[Score]) -> dict[str, object]:
    """Figures of one workflow."""
    ms = [one.ms for one in scores]
    kinds = {kind: [s.right for i, s in zip(items, scores, strict=True) if i.question.kind == kind] for kind in KINDS}
    sourced = [s for i, s in zip(items, scores, strict=True) if i.question.kind not in ("glance", "invented")]
    answered = [one for one in sourced if one.right]
    return {
        "accuracy": share([one.right for one in scores]),
        "kinds": {kind: share(right) for kind, right in kinds.items()},
        "cited": share([one.cited for one in answered]),
        "actions_mean": round(float(np.mean([len(one.actions) for one in scores])), 2),
        "gazed": share(["gaze_search" in one.actions for one in scores]),
        "text_searched": share(["text_search" in one.actions for one in scores]),
        "image_searched": share(["image_search" in one.actions for one in scores]),
        "malformed": share(["malformed" in one.actions for one in scores]),
        "median_ms": round(float(np.median(ms)), 1),
        "p95_ms": round(float(np.percentile(ms, 95)), 1),
    }


def as_table(results: dict[str, dict[str, object]]) -> Table:
    """Workflows as columns."""
    table = Table("", *results, title="atlas test set: share right, by kind")
    first = next(iter(results.values()))
    for kind in KINDS:
        table.add_row(kind, *(f"{result['kinds'][kind]:.3f}" for result in results.values()))  # type: ignore[index]
    for name in first:
        if name != "kinds":
            table.add_row(name, *(str(result[name]) for result in results.values()))
    return table


def cold_start(folder: Path) -> float:
    """Seconds from process start to the first answer, through the command line."""
    bundle = open_bundle(folder)
    sample = bundle.samples[0]
    command = [sys.executable, "-m", "gog_edge.cli", "ask", str(sample.picture), sample.questions[0], "--json"]
    started = time.monotonic()
    subprocess.run([*command, "--bundle", str(folder)], check=True, capture_output=True, timeout=120)
    return round(time.monotonic() - started, 2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE)
    parser.add_argument("--set", default="held-out", help="name of a test set in benchmarks/testsets.json")
    parser.add_argument("--limit", type=int, help="only the first N questions (balanced over the kinds)")
    parser.add_argument("--workflows", default="gog,full_image,direct")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    bench = Bench(args.bundle, args.threads)
    items = load_test_set(args.set, bench.countries, bench.flags)[: args.limit]
    scores = {name: bench.run(items, Workflow(name)) for name in args.workflows.split(",")}
    results = {name: summary(items, found) for name, found in scores.items()}
    first = next(iter(scores))
    gazes = [iou for one in scores[first] for iou in one.gaze_ious]
    strict = [iou for one in scores[first] for iou in one.strict_ious]
    invented = [s.refused for i, s in zip(items, scores[first], strict=True) if i.question.kind == "invented"]
    false_refusals = [s.refused for i, s in zip(items, scores[first], strict=True) if i.question.kind != "invented"]
    line = {
        "set": args.set,
        "questions": len(items),
        "workflows": results,
        "gaze_iou50": share([iou >= 0.5 for iou in gazes]),
        "gaze_iou50_strict": share([iou >= 0.5 for iou in strict]),
        "gaze_iou_mean": round(float(np.mean(gazes)), 4) if gazes else 0.0,
        "gazes": len(gazes),
        "invented_refused": share(invented),
        "falsely_refused": share(false_refusals),
        "median_ms": results[first]["median_ms"],
        "p95_ms": results[first]["p95_ms"],
        "first_answer_s": cold_start(args.bundle),
        "bundle_mb": round(sum(p.stat().st_size for p in args.bundle.rglob("*") if p.is_file()) / 1e6, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
        "machine": machine_card(),
    }
    console = Console()
    console.print(*(f"{key}: {value}" for key, value in machine_card().items()), sep="\n")
    console.print(as_table(results))
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
