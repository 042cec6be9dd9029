"""Measure the whole loop on a fixed test set about held-out countries, in three workflows.

    python -m benchmarks.bench_atlas --limit 70

With *gog* the policy chooses its actions; *full_image* allows only searches with the whole picture; *direct* allows no
search. The test set is generated from a seed and checked against its hash; --limit takes its first part, which is
balanced over the kinds of questions. Times depend on the machine: compare the workflows, not machines.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from gog_edge.cli.common import command_imports, command_main
from gog_edge.errors import ArtifactError, InputError

with command_imports(__name__):
    import numpy as np
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from atlas.countries import COUNTRIES_FILE, Country, load_countries
    from atlas.pack import stored_flags
    from atlas.questions import KINDS
    from atlas.scenes import draw_scene, flags_of_scene
    from atlas.testset import QuestionGenerator, SceneQuestion, Score, items_hash, score
    from benchmarks.support.reporting import machine_card, print_results
    from gog_edge.agent.events import AnswerRecord, Workflow
    from gog_edge.agent.loop import run_episode
    from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
    from gog_edge.files import read_json
    from gog_edge.picture import Picture
    from gog_edge.policy.base import Policy
    from gog_edge.policy.local import LocalPolicy
    from gog_edge.retrieval.encoder import Encoder
    from gog_edge.retrieval.pack import Pack
    from gog_edge.retrieval.retriever import Retriever
    from gog_edge.types import Pixels

TEST_SETS = Path(__file__).parent / "testsets.json"  # by name: seed, per_kind, sha256
WIDTH = 640  # of the pictures, in pixels


def read_test_set(name: str) -> dict[str, object]:
    """Return seed, per_kind and sha256 of a test set. Raises InputError if it does not exist."""
    sets: dict[str, dict[str, object]] = read_json(TEST_SETS, what="test sets")
    if name not in sets:
        raise InputError(f"the test set must be one of {', '.join(sets)}, got '{name}'")
    return sets[name]


def load_test_set(name: str, countries: Sequence[Country], flags: Mapping[str, Pixels]) -> list[SceneQuestion]:
    """Generate a fixed test set and check it against its hash.

    Raises:
        InputError: the test set does not exist.
        ArtifactError: the hash differs, because facts or flags are not those that the set was fixed with.
    """
    fixed = read_test_set(name)
    items = QuestionGenerator(countries, flags, int(str(fixed["seed"]))).generate(int(str(fixed["per_kind"])))
    if items_hash(items) != fixed["sha256"]:
        raise ArtifactError(f"test set '{name}' must have the hash {fixed['sha256']}, got {items_hash(items)}")
    return items


class Bench:
    """An open bundle that answers test questions."""

    def __init__(self, folder: Path, threads: int) -> None:
        bundle = open_bundle(folder)
        if not isinstance(bundle.policy, Path):
            raise InputError(f"the policy of bundle '{bundle.name}' must be local, but a server runs it")
        self.folder = bundle.policy
        self.limits = bundle.limits
        encoder = Encoder.open(bundle.encoder, threads=threads)
        self.pack = Pack.open(bundle.packs[0], encoder)
        self.retriever = Retriever(encoder, [self.pack])
        policy = LocalPolicy.open(bundle.policy, threads=threads)
        self.policy: Policy = policy
        self.dialect = policy.dialect
        self.countries = load_countries(bundle.packs[0] / COUNTRIES_FILE)
        self.flags = stored_flags(self.pack, self.countries)

    def ask(self, picture: Picture, question: str, workflow: Workflow) -> AnswerRecord:
        """Run one episode."""
        return run_episode(picture, question, policy=self.policy, retriever=self.retriever, budget=self.limits,
                           on_event=lambda _: None, workflow=workflow)  # fmt: skip

    def run(self, items: Sequence[SceneQuestion], workflow: Workflow) -> list[Score]:
        """Ask all questions in one workflow and score the answers."""
        scores = []
        for item in track(items, workflow.value, console=Console(stderr=True)):
            picture = Picture(draw_scene(item.scene, flags_of_scene(item.scene, self.flags), WIDTH))
            record = self.ask(picture, item.question.text, workflow)
            scores.append(score(item, record, picture.size, self.dialect.not_found))
        return scores

    def close(self) -> None:
        """Close the pack."""
        self.pack.close()


def share(values: Sequence[bool]) -> float:
    """Return the fraction of True values; 0 for none."""
    return round(float(np.mean(values)), 4) if values else 0.0


def summary(items: Sequence[SceneQuestion], scores: Sequence[Score]) -> dict[str, object]:
    """Return the figures of one workflow."""
    ms = [one.ms for one in scores]
    kinds = {kind: [s.correct for i, s in zip(items, scores, strict=True) if i.question.kind == kind] for kind in KINDS}
    sourced = [s for i, s in zip(items, scores, strict=True) if i.question.kind not in ("glance", "invented")]
    correct = [one for one in sourced if one.correct]
    return {
        "accuracy": share([one.correct for one in scores]),
        "kinds": {kind: share(results) for kind, results in kinds.items()},
        "cited": share([one.cited for one in correct]),
        "actions_mean": round(float(np.mean([len(one.actions) for one in scores])), 2),
        "gazed": share(["gaze_search" in one.actions for one in scores]),
        "text_searched": share(["text_search" in one.actions for one in scores]),
        "image_searched": share(["image_search" in one.actions for one in scores]),
        "malformed": share(["malformed" in one.actions for one in scores]),
        "median_ms": round(float(np.median(ms)), 1),
        "p95_ms": round(float(np.percentile(ms, 95)), 1),
    }


ROWS = {
    "accuracy": "all kinds",
    "cited": "correct answers cited",
    "actions_mean": "actions per question",
    "gazed": "questions with a gaze",
    "text_searched": "questions with a text search",
    "image_searched": "questions with an image search",
    "malformed": "questions with a malformed turn",
    "median_ms": "median ms per question",
    "p95_ms": "95th percentile ms",
}


def as_table(results: Mapping[str, Mapping[str, object]]) -> Table:
    """Return a table with workflows as columns."""
    table = Table("", *results, title="atlas test set: accuracy by kind of question")
    for kind in KINDS:
        kinds = [result["kinds"] for result in results.values()]
        table.add_row(kind, *(f"{one[kind]:.3f}" for one in kinds if isinstance(one, dict)))
    for key, label in ROWS.items():
        table.add_row(label, *(str(result[key]) for result in results.values()))
    return table


def first_answer_s(folder: Path) -> float:
    """Return the seconds from the start of a process to the first answer of `gog-edge ask`."""
    bundle = open_bundle(folder)
    sample = bundle.samples[0]
    command = [sys.executable, "-m", "gog_edge.cli", "ask", str(sample.picture), sample.questions[0], "--json"]
    started = time.monotonic()
    subprocess.run([*command, "--bundle", str(folder)], check=True, capture_output=True, timeout=120)
    return round(time.monotonic() - started, 2)


def as_line(args: argparse.Namespace, items: Sequence[SceneQuestion], scores: Mapping[str, Sequence[Score]]
            ) -> dict[str, object]:  # fmt: skip
    """Return the results as JSON values. Gazes and refusals are those of the first workflow."""
    results = {name: summary(items, found) for name, found in scores.items()}
    fixed, first = read_test_set(args.set), next(iter(scores))
    gazes = [iou for one in scores[first] for iou in one.gaze_ious]
    strict = [iou for one in scores[first] for iou in one.strict_ious]
    refused = {kind: [s.refused for i, s in zip(items, scores[first], strict=True)
                      if (i.question.kind == "invented") == kind] for kind in (True, False)}  # fmt: skip
    return {
        "set": args.set,
        "seed": fixed["seed"],
        "sha256": fixed["sha256"],
        "questions": len(items),
        "workflows": results,
        "gaze_iou50": share([iou >= 0.5 for iou in gazes]),
        "gaze_iou50_strict": share([iou >= 0.5 for iou in strict]),
        "gaze_iou_mean": round(float(np.mean(gazes)), 4) if gazes else 0.0,
        "gazes": len(gazes),
        "invented_refused": share(refused[True]),
        "falsely_refused": share(refused[False]),
        "median_ms": results[first]["median_ms"],
        "p95_ms": results[first]["p95_ms"],
        "first_answer_s": first_answer_s(args.bundle),
        "bundle_mb": round(sum(p.stat().st_size for p in args.bundle.rglob("*") if p.is_file()) / 1e6, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="default: the atlas")
    parser.add_argument("--set", default="held-out",
                        help="test set of benchmarks/testsets.json (default %(default)s)")  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument("--workflows", default="gog,full_image,direct", help="comma-separated (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON line to this file, too")
    args = parser.parse_args(argv)
    bench = Bench(args.bundle, args.threads)
    items = load_test_set(args.set, bench.countries, bench.flags)[: args.limit]
    scores = {name: bench.run(items, Workflow(name)) for name in args.workflows.split(",")}
    bench.close()
    card = machine_card()
    line = as_line(args, items, scores) | {"machine": card}
    print_results(card, [as_table({name: summary(items, found) for name, found in scores.items()})], line, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
