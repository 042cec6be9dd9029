"""Measure what dense paragraph vectors add to search: questions about countries the text encoder was not trained on.

    python -m atlas.train_text_encoder runs/text --facts gog_edge/data/atlas/packs/atlas/countries.json
    gog-edge export text runs/text out/text          # in an environment with gog_edge[text]
    python -m benchmarks.bench_text_channel --encoder out/text

It builds the atlas pack twice, with and without vectors of paragraphs, and asks both with `Retriever.search`. The
questions are about the held-out fifth of the atlas's countries, in groups:

    plain       the country's name and the fact's own words
    seen        the name, and a paraphrase that training used for other countries
    new         the name, and a paraphrase that training did not use
    reverse     the value instead of the name, if only one country has it, in wordings that training did not use
    misspelt    the plain question with one letter of the name dropped, doubled or swapped

Recall of articles counts evidence, recall of paragraphs counts passages in the order of the result; a paragraph is
cited if it is among the passages of a search with default settings. Wordings, seed and groups were fixed before the
first measurement. All figures are of one half of the held-out countries, at the default depth of the fused rankings,
`RetrieverConfig.text_depth`. That depth, 10, was fixed before this benchmark; the other half only checks it. The share
of cited paragraphs there is reported for each of DEPTHS; with the encoder above it is 0.912 at 5 and 0.911 at 10.

--out receives text_channel.json. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from gog_edge.cli.common import command_imports, command_main

with command_imports(__name__):
    import numpy as np
    from rich.table import Table

    from atlas.countries import COUNTRIES_FILE, SECTIONS, Country, fact_value, held_out, load_countries
    from atlas.pack import FALSE_ACCEPT, NAME, atlas_articles, atlas_images, calibration_texts
    from atlas.questions import FACT_QUESTIONS
    from atlas.text.pairs import misspell
    from atlas.text.wordings import NAMED, REVERSE
    from benchmarks.support.reporting import RESULTS, load_average, machine_card, print_results
    from gog_edge.bundle import DEFAULT_BUNDLE
    from gog_edge.files import MODEL_MANIFEST, read_json
    from gog_edge.indexing.calibration import calibrate_texts, write_calibration
    from gog_edge.indexing.generation import PackWriter
    from gog_edge.retrieval.encoder import Encoder
    from gog_edge.retrieval.manifest import FOUND_THRESHOLD
    from gog_edge.retrieval.pack import Pack
    from gog_edge.retrieval.retriever import Retriever, RetrieverConfig
    from gog_edge.retrieval.text.encoder import TextEncoder, passage_text
    from gog_edge.types import SearchResult, TextQuery

SEED = 2026
GROUPS = ("plain", "seen", "new", "reverse", "misspelt")
METHODS = ("words", "words+paragraphs")
DEPTH, DEPTHS = RetrieverConfig().text_depth, (5, 10, 20, 64)
PLAIN_NEIGHBOURS = ("Which countries border {s}?", "What are the neighbours of {s}?", "Who borders {s}?")
NEW_EACH = 2  # new wordings of each fact of each country
TOP = 10  # places that count as found
SPEED_ROUNDS = 5  # the fastest counts
TIMED = 200  # questions whose search is timed


@dataclass(frozen=True, slots=True)
class TextQuestion:
    """A question and the fact that it asks for."""

    text: str
    group: str  # one of GROUPS
    fact: str
    title: str  # of the article


def make_questions(countries: Sequence[Country], seed: int = SEED) -> list[TextQuestion]:
    """Return the questions about held-out countries; the same seed gives the same questions."""
    rng = np.random.default_rng(seed)
    hidden = held_out(countries)
    names = {country.iso: country.name for country in countries}
    values = [(fact, fact_value(country, fact, names)) for country in countries for fact in REVERSE]
    questions: list[TextQuestion] = []
    for country in (one for one in countries if one.iso in hidden):
        for fact in SECTIONS:
            value = fact_value(country, fact, names)
            if value or fact == "neighbours":
                alone = value if values.count((fact, value)) == 1 else ""
                questions += _about(rng, country, fact, alone)
    return questions


def _about(rng: np.random.Generator, country: Country, fact: str, value: str) -> list[TextQuestion]:
    """Return questions of every group about one fact; `value` is empty if another country has it too."""
    name = country.name

    def one(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    plain = one(FACT_QUESTIONS.get(fact, PLAIN_NEIGHBOURS))
    new = [NAMED[fact].new[int(k)] for k in rng.choice(len(NAMED[fact].new), NEW_EACH, replace=False)]
    asked = [("plain", plain.format(s=name)), ("seen", one(NAMED[fact].seen).format(s=name))]
    asked += [("new", wording.format(s=name)) for wording in new]
    wrong = misspell(rng, name)
    if wrong != name:
        asked.append(("misspelt", plain.format(s=wrong)))
    if fact in REVERSE and value:
        asked.append(("reverse", one(REVERSE[fact].new).format(v=value)))
    return [TextQuestion(text, group, fact, name) for group, text in asked]


# --- packs ---------------------------------------------------------------------------------------


def build_packs(folder: Path, bundle: Path, encoder: Encoder, text_encoder: TextEncoder) -> dict[str, Path]:
    """Write the atlas pack without and with vectors of paragraphs, both calibrated; return their folders by method."""
    source = bundle / "packs" / "atlas"
    countries = load_countries(source / COUNTRIES_FILE)
    with closing(Pack.open(source, encoder)) as pack:
        flags, snapshot = _flags(pack, countries), pack.manifest.snapshot
    folders = {}
    for method, own in zip(METHODS, (None, text_encoder), strict=True):
        folders[method] = folder / method
        with PackWriter(folders[method], name=NAME, snapshot=snapshot, encoder=encoder, text_encoder=own) as writer:
            writer.add(atlas_articles(countries), atlas_images(countries, flags))
            writer.commit()
        with closing(Pack.open(folders[method], encoder, text_encoder=own)) as pack:
            known, unknown = calibration_texts(countries)
            text = calibrate_texts(pack, known, unknown, target_false_accept=FALSE_ACCEPT, text_encoder=own)
        write_calibration(folders[method], image=None, text=text)
    return folders


def _flags(pack: Pack, countries: Sequence[Country]) -> dict[str, bytes]:
    """Return the PNG of each flag, as the pack stores it."""
    articles = {country.flag: pack.store.article_by_key(country.name) for country in countries}
    images = pack.main_images([article for article in articles.values() if article is not None])
    files = {flag: pack.image_file(images[article]) for flag, article in articles.items() if article is not None}
    return {flag: file.data for flag, file in files.items() if file is not None}


# --- figures -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Places:
    """Where a question's article and paragraph are in the results; places from 1, 0 if not among the first TOP."""

    article: int
    paragraph: int
    cited: bool
    found: bool  # the probability that the subject is in the pack reaches the threshold


def measure(retriever: Retriever, questions: Sequence[TextQuestion], depth: int = DEPTH) -> list[Places]:
    """Ask every question, with `depth` ranks of each text channel."""
    (pack,), text_encoder = retriever.packs.values(), retriever.text_encoder
    config = RetrieverConfig(text_depth=depth)
    default = Retriever(retriever.encoder, [pack], config, text_encoder=text_encoder)
    longer = Retriever(retriever.encoder, [pack], replace(config, top_k=TOP), text_encoder=text_encoder)
    places = []
    for question in questions:
        query = [TextQuery(question.text, question.text)]
        (all_results,), (cited,) = longer.search(query), default.search(query)
        right = question.title, SECTIONS[question.fact]
        articles = [question.title in one.titles for one in all_results.evidence]
        paragraphs = [passage == right for passage in passages_of(all_results)]
        places.append(Places(_place(articles), _place(paragraphs), right in passages_of(cited),
                             cited.found >= FOUND_THRESHOLD))  # fmt: skip
    return places


def passages_of(result: SearchResult) -> list[tuple[str, str]]:
    """Return (title, section) of the passages of a result, in order; in the atlas these name a paragraph."""
    return [(passage.article, passage.section) for one in result.evidence for passage in one.passages]


def _place(right: Sequence[bool]) -> int:
    return right.index(True) + 1 if True in right[:TOP] else 0


def figures(places: Sequence[Places]) -> dict[str, float]:
    """Return recall of articles and of paragraphs, and the shares of cited paragraphs and of found subjects."""
    articles, paragraphs = np.array([one.article for one in places]), np.array([one.paragraph for one in places])
    values = {
        "article recall@1": articles == 1, "article recall@10": articles > 0, "paragraph recall@1": paragraphs == 1,
        "paragraph recall@10": paragraphs > 0, "cited": np.array([one.cited for one in places]),
        "found": np.array([one.found for one in places]),
    }  # fmt: skip
    return {name: round(float(value.mean()), 4) for name, value in values.items()}


def by_group(questions: Sequence[TextQuestion], places: Sequence[Places]) -> dict[str, dict[str, float]]:
    """Return the figures of each group and of all questions."""
    groups = {group: [one for question, one in zip(questions, places, strict=True) if question.group == group]
              for group in GROUPS}
    return {group: figures(own) for group, own in ({**groups, "all": list(places)}).items()}


def split(questions: Sequence[TextQuestion]) -> tuple[list[TextQuestion], list[TextQuestion]]:
    """Return the questions about every other held-out country, by name, and those about the others."""
    names = sorted({question.title for question in questions})
    first = frozenset(names[::2])
    return [one for one in questions if one.title in first], [one for one in questions if one.title not in first]


def cited_by_depth(retriever: Retriever, questions: Sequence[TextQuestion]) -> dict[str, float]:
    """Return the share of questions whose paragraph is cited, for each of DEPTHS."""
    return {str(depth): figures(measure(retriever, questions, depth))["cited"] for depth in DEPTHS}


# --- speed ---------------------------------------------------------------------------------------


def measure_speed(retrievers: Mapping[str, Retriever], questions: Sequence[TextQuestion],
                  encoder: TextEncoder) -> dict[str, Any]:
    """Time the embedding of all passages, the embedding of single questions, and whole searches."""
    store = retrievers[METHODS[1]].packs[NAME].store
    rows = store.paragraphs(store.paragraph_ids().tolist()).values()
    passages = [passage_text(row.title, row.section, row.text) for row in rows]
    texts = [question.text for question in questions[:TIMED]]
    seconds = min(_timed(lambda: encoder.embed_passages(passages)) for _ in range(SPEED_ROUNDS))
    return {
        "passages_per_s": round(len(passages) / seconds, 1),
        "query_embed_ms_p50": _p50(lambda text: encoder.embed_queries([text]), texts),
        **{f"search_ms_p50 {method}": _p50(lambda text, own=own: own.search([TextQuery(text, text)]), texts)
           for method, own in retrievers.items()},
    }  # fmt: skip


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _p50(work: Callable[[str], object], values: Iterable[str]) -> float:
    return round(1e3 * median(_timed(lambda value=value: work(value)) for value in values), 3)  # type: ignore[misc]


# --- report --------------------------------------------------------------------------------------


def as_table(results: Mapping[str, Mapping[str, Mapping[str, float]]], counts: Mapping[str, int]) -> Table:
    """Return a table of each figure, as "words -> words+paragraphs", by group."""
    names = list(results[METHODS[0]]["all"])
    table = Table("group", "questions", *names, title=" -> ".join(METHODS))
    for group in (*GROUPS, "all"):
        before, after = (results[method][group] for method in METHODS)
        table.add_row(group, str(counts[group]), *(f"{before[name]:.3f} -> {after[name]:.3f}" for name in names))
    return table


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build the packs in a folder, measure, and return the results."""
    text_encoder = TextEncoder.open(args.encoder, threads=args.threads)
    encoder = Encoder.open(args.bundle / "encoder", threads=args.threads)
    folders = build_packs(folder, args.bundle, encoder, text_encoder)
    packs = {method: Pack.open(own, encoder, text_encoder=text_encoder) for method, own in folders.items()}
    retrievers = {method: Retriever(encoder, [pack], text_encoder=text_encoder) for method, pack in packs.items()}
    sizes = {method: sum(entry.size for entry in pack.manifest.files) for method, pack in packs.items()}
    countries = load_countries(args.bundle / "packs" / "atlas" / COUNTRIES_FILE)
    other_half, questions = split(make_questions(countries))
    counts = {group: sum(one.group == group for one in questions) for group in GROUPS} | {"all": len(questions)}
    calibrations = {method: pack.manifest.text_calibration for method, pack in packs.items()}
    results = {
        "encoder": text_encoder.fingerprint.name, "dim": text_encoder.dim,
        "parity": read_json(args.encoder / MODEL_MANIFEST, what="text encoder").get("parity"),
        "threads": args.threads, "seed": SEED, "paragraphs": packs[METHODS[1]].manifest.counts.paragraphs,
        "pack_bytes": sizes, "depth": DEPTH, "cited_by_depth": cited_by_depth(retrievers[METHODS[1]], other_half),
        "questions": counts,
        "results": {method: by_group(questions, measure(own, questions)) for method, own in retrievers.items()},
        "calibration": {method: None if one is None else one.to_json() for method, one in calibrations.items()},
        "speed": measure_speed(retrievers, questions, text_encoder),
    }  # fmt: skip
    for pack in packs.values():
        pack.close()
    return results


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help="folder that `gog-edge export text` wrote")
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="default: the atlas")
    parser.add_argument("--threads", type=int, default=1, help="number of cores (default %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (default %(default)s)")
    args = parser.parse_args(argv)
    load = load_average()
    with tempfile.TemporaryDirectory() as folder:
        results = run(args, Path(folder))
    card = machine_card()
    line = {**results, "load_before": load, "machine": card}
    table = as_table(results["results"], results["questions"])
    print_results(card, [table], line, args.out / "text_channel.json", width=200)
    return 0


if __name__ == "__main__":
    sys.exit(main())
