"""Compare the word search of this checkout with that of another one: time, size of the index, and what is found.

    python -m benchmarks.bench_words --other /path/to/checkout --paragraphs 1000000

It writes synthetic articles (`retrieval/text_corpus.py`) of the languages of --corpora, and each checkout builds
its own store of them. Then both are open in processes of their own and answer the same queries in turns; in every round
the order alternates, and the fastest round of a query counts. The queries are words of paragraphs: `first` and `found`
are the shares of queries whose article is the first, or among the first ten, and `same` is the share of the other
checkout's first ten that are also ours.

Ratios are this checkout over the other. --out receives words.json. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gog_edge.cli.common import command_imports, command_main
from gog_edge.errors import BackendError, InputError

with command_imports(__name__):
    import numpy as np
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from benchmarks.retrieval.text_corpus import LANGUAGES, Language, articles
    from benchmarks.support.reporting import RESULTS, load_average, machine_card, print_results

THIS, OTHER = "this", "other"
CORPORA = {"English": ("English",), "mixed": ("English",) * (len(LANGUAGES) - 1) + LANGUAGES[1:]}
VOCABULARY = 400_000
QUERIES = 300
ROUNDS = 3
TOP = 10
SEED = 7
# Runs in both checkouts, and therefore uses only what both have.
WORKER = """
import json, sqlite3, sys, time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from gog_edge.indexing.sources.base import ArticleRecord
from gog_edge.indexing.store_writer import StoreWriter
from gog_edge.retrieval.fusion import rank_articles
from gog_edge.retrieval.manifest import Segment
from gog_edge.retrieval.text.store import Store
folder, corpus = map(Path, sys.argv[1:])
if not (folder / "segment.json").exists():
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "store.sqlite").unlink(missing_ok=True)
    started = time.perf_counter()
    writer = StoreWriter(folder / "store.sqlite")
    with corpus.open(encoding="utf-8") as lines:
        for number, batch in enumerate(iter(lambda: [line for _, line in zip(range(2000), lines)], [])):
            with writer.chunk(number):
                for line in batch:
                    one = json.loads(line)
                    writer.add_article(ArticleRecord(one["title"], tuple(map(tuple, one["paragraphs"])), "CC0"))
    written = time.perf_counter()
    segment = writer.finish("store.sqlite")
    done = time.perf_counter()
    with sqlite3.connect(folder / "store.sqlite") as db:
        tables = ("words_data", "words_idx", "words_docsize", "words_content")
        size = 0
        for table in tables:
            if db.execute("SELECT 1 FROM sqlite_master WHERE name = ?", [table]).fetchone():
                names = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
                size += db.execute("SELECT sum(" + "+".join(f"coalesce(length({name}), 0)" for name in names)
                                   + f") FROM {table}").fetchone()[0] or 0
    cost = {"write_s": written - started, "index_s": done - written, "index_bytes": size,
            "file_bytes": (folder / "store.sqlite").stat().st_size}
    (folder / "segment.json").write_text(json.dumps([asdict(segment), cost]))
segment, cost = json.loads((folder / "segment.json").read_text())
segment = Segment.from_json(segment)
store = Store.open(folder, [segment])
pack = SimpleNamespace(store=store, manifest=SimpleNamespace(counts=segment.counts))
print(json.dumps(cost), flush=True)
for line in sys.stdin:
    text = json.loads(line)
    started = time.perf_counter()
    ranking = rank_articles(pack, text)
    ms = 1e3 * (time.perf_counter() - started)
    print(json.dumps([ms, [article for article, _ in ranking.articles[:10]]]), flush=True)
"""


class Searcher:
    """A process of a checkout that has a store open."""

    def __init__(self, checkout: Path, folder: Path, corpus: Path) -> None:
        python = checkout / ".venv" / "bin" / "python"
        command = [str(python if python.exists() else sys.executable), "-c", WORKER, str(folder), str(corpus)]
        self._checkout = checkout
        self._process = subprocess.Popen(command, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         text=True)  # fmt: skip
        self.cost: dict[str, float] = self._read()

    def search(self, text: str) -> tuple[float, list[int]]:
        """Return the milliseconds that a query takes and the first articles."""
        stream = self._process.stdin
        assert stream is not None  # noqa: S101 - for the type checker
        stream.write(json.dumps(text) + "\n")
        stream.flush()
        ms, found = self._read()
        return float(ms), found

    def _read(self) -> Any:
        stream = self._process.stdout
        assert stream is not None  # noqa: S101 - for the type checker
        line = stream.readline()
        if not line:
            raise BackendError(f"'{self._checkout}' failed; its errors are above")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def write_corpus(path: Path, languages: Sequence[str], paragraphs: int, vocabulary: int) -> None:
    """Write the articles as JSON lines, unless the file exists."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as stream:
        for one in articles(languages, paragraphs, vocabulary, SEED):
            stream.write(json.dumps(asdict(one), ensure_ascii=False) + "\n")
    part.rename(path)


def make_queries(path: Path, count: int) -> list[tuple[str, int, str]]:
    """Return queries with the id of the article that they were taken from and its language."""
    rng = np.random.default_rng(SEED)
    with path.open(encoding="utf-8") as stream:
        lines = sum(1 for _ in stream)
    chosen = set(rng.choice(lines, min(count, lines), replace=False).tolist())
    queries = []
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream):
            if number in chosen:
                one = json.loads(line)
                language = Language(one["language"], (), np.empty(0))
                paragraph = one["paragraphs"][int(rng.integers(len(one["paragraphs"])))][1]
                queries.append((language.query(paragraph, rng), number + 1, one["language"]))
    return queries


@contextmanager
def open_searchers(checkouts: Mapping[str, Path], work: Path, corpus: Path) -> Iterator[dict[str, Searcher]]:
    """Open the store of each checkout, which builds it if there is none."""
    with ExitStack() as stack:
        opened: dict[str, Searcher] = {}
        for name, checkout in checkouts.items():
            opened[name] = Searcher(checkout, work / f"{corpus.stem}-{name}", corpus)
            stack.callback(opened[name].close)
        yield opened


def measure(searchers: Mapping[str, Searcher], queries: Sequence[tuple[str, int, str]],
            rounds: int) -> list[dict[str, tuple[float, list[int]]]]:
    """Return, per query, the fastest time and the result of each checkout."""
    results: list[dict[str, tuple[float, list[int]]]] = [{} for _ in queries]
    for number in track(range(rounds + 1), "rounds", console=Console(stderr=True)):  # the first one warms up
        for result, (text, _, _) in zip(results, queries, strict=True):
            for name in (THIS, OTHER) if number % 2 else (OTHER, THIS):
                ms, found = searchers[name].search(text)
                if number:
                    result[name] = min(ms, result.get(name, (ms, []))[0]), found
    return results


def figures(results: Sequence[Mapping[str, tuple[float, list[int]]]],
            queries: Sequence[tuple[str, int, str]]) -> dict[str, Any]:
    """Return the latencies in milliseconds and what was found."""
    values: dict[str, Any] = {"queries": len(queries)}
    for name in (THIS, OTHER):
        times = [result[name][0] for result in results]
        found = [result[name][1] for result in results]
        values[name] = {
            "p50_ms": round(float(np.percentile(times, 50)), 3), "p95_ms": round(float(np.percentile(times, 95)), 3),
            "first": _share(one[:1] == [wanted] for one, (_, wanted, _) in zip(found, queries, strict=True)),
            "found": _share(wanted in one for one, (_, wanted, _) in zip(found, queries, strict=True)),
        }  # fmt: skip
    values["p50_ratio"] = round(values[THIS]["p50_ms"] / values[OTHER]["p50_ms"], 3)
    both = [(set(result[THIS][1]), set(result[OTHER][1])) for result in results if result[OTHER][1]]
    shared = [len(ours & theirs) / len(theirs) for ours, theirs in both]
    values["same"] = round(float(np.mean(shared)), 4) if shared else 0.0
    return values


def _share(hits: Iterator[bool]) -> float:
    return round(float(np.mean(list(hits))), 4)


def run_corpus(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Build both stores of a corpus and measure them."""
    corpus = args.work / f"{name}-{args.paragraphs}.jsonl"
    write_corpus(corpus, CORPORA[name], args.paragraphs, args.vocabulary)
    queries = make_queries(corpus, args.queries)
    with open_searchers({THIS: Path.cwd(), OTHER: args.other.resolve()}, args.work, corpus) as searchers:
        results = measure(searchers, queries, args.rounds)
        costs = {one: {key: round(value, 3) for key, value in searcher.cost.items()}
                 for one, searcher in searchers.items()}  # fmt: skip
    ratios = {key: round(costs[THIS][key] / costs[OTHER][key], 3) for key in costs[THIS]}
    per_second = {one: round(args.paragraphs / cost["index_s"]) for one, cost in costs.items()}
    languages = sorted({language for _, _, language in queries})
    by_language = {}
    for language in languages:
        own = [number for number, query in enumerate(queries) if query[2] == language]
        by_language[language] = figures([results[number] for number in own], [queries[number] for number in own])
    return {"corpus": name, "paragraphs": args.paragraphs, "cost": costs, "cost_ratio": ratios,
            "indexed_paragraphs_per_s": per_second, **figures(results, queries), "languages": by_language}  # fmt: skip


def as_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with a row per corpus and language."""
    table = Table("corpus", "language", "p50 ms (other)", "ratio", "p95 ms (other)", "first (other)", "found (other)",
                  "same", "index size", "file size", title=f"{results[0]['paragraphs']:,} paragraphs")  # fmt: skip
    for one in results:
        for language, own in {"all": one, **one["languages"]}.items():
            ours, theirs = own[THIS], own[OTHER]
            sizes = (f"{one['cost_ratio']['index_bytes']:.2f}", f"{one['cost_ratio']['file_bytes']:.2f}")
            pairs = (f"{ours[key]} ({theirs[key]})" for key in ("p95_ms", "first", "found"))
            table.add_row(one["corpus"], language, f"{ours['p50_ms']} ({theirs['p50_ms']})", str(own["p50_ratio"]),
                          *pairs, str(own["same"]), *(sizes if language == "all" else ("", "")))  # fmt: skip
    return table


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, help="folder of the other checkout")
    parser.add_argument("--corpora", default="English,mixed", help="of English, mixed (default %(default)s)")
    parser.add_argument("--paragraphs", type=int, default=1_000_000, help="of each corpus (default %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="words per language (default %(default)s)")
    parser.add_argument("--queries", type=int, default=QUERIES, help="per corpus (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each query (default %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-words"), help="folder of the stores, which are "
                        "kept (default %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (default %(default)s)")
    args = parser.parse_args(argv)
    names = args.corpora.split(",")
    if unknown := [name for name in names if name not in CORPORA]:
        raise InputError(f"--corpora must be of {', '.join(CORPORA)}, got '{unknown[0]}'")
    load = load_average()
    args.work = args.work.resolve()
    results = [run_corpus(name, args) for name in names]
    line = {"corpora": results, "rounds": args.rounds, "load_before": load, "machine": machine_card()}
    print_results(machine_card(), [as_table(results)], line, args.out / "words.json", width=180)
    return 0


if __name__ == "__main__":
    sys.exit(main())
