"""Measure what is wrong with the paragraphs of a MediaWiki dump: leftover markup, and gaps where something is missing.

    python -m benchmarks.dump_quality dewiki-...-pages-articles.xml.bz2 jawiki-...xml.bz2 --label after

Reads each dump as `gog-edge pack build` does, and looks at every paragraph with a detector of its own, which knows
nothing of the reader: braces, brackets, tags, behaviour switches and file options are markup; empty parentheses, a
stray comma, and a full stop or comma after a word that cannot end a sentence are gaps. A gap that leaves no trace in
punctuation is not seen, so the shares are lower bounds. Pages are counted by an XML parser and compared with the
articles, redirects and skipped pages that the reader reports.

--out receives dump_quality.json: results are stored under --label, those of other labels are kept. To measure an
earlier state, run this file with that checkout on PYTHONPATH. The last line is JSON.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.parsers import expat

from gog_edge.cli.common import command_imports, command_main

with command_imports(__name__):
    from rich.markup import escape
    from rich.table import Table

    from benchmarks.support.reporting import RESULTS, machine_card, print_results
    from gog_edge.errors import SourceError
    from gog_edge.files import read_json
    from gog_edge.indexing.sources.base import ArticleRecord, RedirectRecord, Skipped
    from gog_edge.indexing.sources.files import CompressedFile
    from gog_edge.indexing.sources.mediawiki import MediaWikiSource

# English words that hardly end a sentence or stand before a comma: what follows them is missing.
DANGLING = ("the", "of", "from", "than", "into", "approximately", "roughly", "pronounced")
MARKUP = {
    "braces": re.compile(r"\{\{|\}\}|\{\||\|\}"),
    "brackets": re.compile(r"\[\[|\]\]|\[https?:"),
    "tags": re.compile(
        r"</?(?:ref|small|sup|sub|span|div|br|nowiki|gallery|math|table|poem|center|section)\b[^<>]*>|<!--|-->",
        re.IGNORECASE,
    ),
    "quotes": re.compile(r"'''|(?<!\w)''(?=\w)"),
    "switches": re.compile(r"__[A-ZÀ-ÞА-Я]{3,}\w*__"),
    "variants": re.compile(r"-\{|\}-"),
    "file options": re.compile(
        r"(?:^|\|)\s*(?:thumb|miniatur|mini|left|right|links|rechts|\d+px|vignette|miniaturadeimagen|мини|サムネイル|"
        r"缩略图|縮圖)\s*\|",
        re.MULTILINE,
    ),
    "table rows": re.compile(r"^\s*(?:\||!\s*(?:style|class|scope|width)\b)", re.MULTILINE),
    "entities": re.compile(r"&(?:nbsp|amp|lt|gt|ndash|mdash|#\d+);"),
    "redirects": re.compile(r"^#?\s*(?:REDIRECT|WEITERLEITUNG|REDIRECTION)\b"),
    "links to other languages": re.compile(r"^\s*(?:[a-z]{2,3}|simple|zh-[a-z-]+):\S.*$", re.MULTILINE),
}  # fmt: skip
GAPS = {
    "empty parentheses": re.compile(r"(?<![\w$])\(\s*\)|（\s*）|\(\s*[,;.]|[,;]\s*\)|（[、，；]"),
    "stray comma": re.compile(r",\s*[,.](?![.\d])|;\s*[,;.](?![.\d])"),
    "space before a full stop or comma": re.compile(r"[^\W\d]\s+[.,](?=\s|$)"),
    "dangling word": re.compile(rf"(?<![\w'’-])(?:{'|'.join(DANGLING)})\s*[.,;)](?=\s|$)"),
    "empty quotation": re.compile(r"“\s*”|«\s*»|「」|『』|„\s*“|\"\s\s*\""),
}
SAMPLES = 3  # of a kind


@dataclass
class Findings:
    """What was found in one dump."""

    pages: int = 0  # counted by an XML parser
    articles: int = 0
    redirects: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    paragraphs: int = 0
    characters: int = 0
    with_markup: int = 0
    with_gaps: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    samples: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""

    @property
    def unaccounted(self) -> int:
        """Return how many pages are neither articles, redirects nor skipped."""
        return self.pages - self.articles - self.redirects - sum(self.skipped.values())


def problems(text: str) -> Iterator[tuple[str, str, re.Match[str]]]:
    """Yield ("markup" or "gaps", kind, where) for each kind that a paragraph has."""
    for group, patterns in (("markup", MARKUP), ("gaps", GAPS)):
        for kind, pattern in patterns.items():
            if found := pattern.search(text):
                yield group, kind, found


def count_pages(path: Path) -> int:
    """Return the number of pages of a dump, up to the place where it ends or is damaged."""
    count = 0

    def begin(name: str, attributes: dict[str, str]) -> None:
        nonlocal count
        count += name == "page"

    parser = expat.ParserCreate()
    parser.StartElementHandler = begin
    with CompressedFile(path) as file:
        try:
            while block := file.read(2**20):
                parser.Parse(block)
        except (SourceError, expat.ExpatError):
            pass
    return count


def inspect(path: Path) -> Findings:
    """Read a dump and look at all of its paragraphs."""
    found, kinds, skipped = Findings(count_pages(path)), Counter[str](), Counter[str]()
    began = time.process_time()
    records: list[Any] = []
    try:
        source = MediaWikiSource(path)
        for chunk in source.chunks():
            records += source.parse(chunk)
    except SourceError as exc:
        found.error = str(exc)[:200].replace(str(path), path.name)
    found.seconds = round(time.process_time() - began, 2)
    for record in records:
        found.articles += isinstance(record, ArticleRecord)
        found.redirects += isinstance(record, RedirectRecord)
        if isinstance(record, Skipped):
            skipped[record.reason] += 1
        for _, text in record.paragraphs if isinstance(record, ArticleRecord) else ():
            _look_at(text, found, kinds)
    found.kinds, found.skipped = dict(kinds.most_common()), dict(skipped.most_common())
    return found


def _look_at(text: str, found: Findings, kinds: Counter[str]) -> None:
    seen = list(problems(text))
    found.paragraphs += 1
    found.characters += len(text)
    found.with_markup += any(group == "markup" for group, _, _ in seen)
    found.with_gaps += any(group == "gaps" for group, _, _ in seen)
    for _, kind, where in seen:
        kinds[kind] += 1
        samples = found.samples.setdefault(kind, [])
        if len(samples) < SAMPLES:
            samples.append(text[max(0, where.start() - 60) : where.end() + 40])


def summary(found: Sequence[Findings]) -> dict[str, Any]:
    """Return the figures of all dumps together."""
    kinds = Counter[str]()
    for one in found:
        kinds.update(one.kinds)
    paragraphs = sum(one.paragraphs for one in found) or 1
    return {
        "pages": sum(one.pages for one in found),
        "unaccounted": sum(one.unaccounted for one in found if not one.error),
        "paragraphs": paragraphs,
        "characters": sum(one.characters for one in found),
        "share with markup": round(sum(one.with_markup for one in found) / paragraphs, 5),
        "share with gaps": round(sum(one.with_gaps for one in found) / paragraphs, 5),
        "seconds": round(sum(one.seconds for one in found), 2),
        "kinds": dict(kinds.most_common()),
    }


def sample_table(found: Sequence[Findings]) -> Table:
    """Return a few samples of each kind. They are text of the dumps, under its licence: shown, not stored."""
    table = Table("kind", "samples")
    for kind in sorted({kind for one in found for kind in one.samples}):
        texts = [text for one in found for text in one.samples.get(kind, ())][:SAMPLES]
        table.add_row(kind, escape("\n".join(texts)))
    return table


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dumps", type=Path, nargs="+", help="MediaWiki XML dumps")
    parser.add_argument("--label", default="now", help="name of this measurement in the results (default %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "dump_quality.json",
                        help="file for the JSON (default %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    table = Table("dump", "pages", "articles", "redirects", "skipped", "unaccounted", "paragraphs", "% markup",
                  "% gaps", "seconds")  # fmt: skip
    found = dict[str, Findings]()
    for path in args.dumps:
        one = found[path.name] = inspect(path)
        share = 100 / (one.paragraphs or 1)
        counts = (one.pages, one.articles, one.redirects, sum(one.skipped.values()), one.unaccounted, one.paragraphs)
        table.add_row(path.name, *map(str, counts), f"{share * one.with_markup:.2f}", f"{share * one.with_gaps:.2f}",
                      f"{one.seconds}")  # fmt: skip
    earlier = read_json(args.out, what="results") if args.out.exists() else {}
    card = machine_card()
    dumps = {name: asdict(one) for name, one in found.items()}
    for fields in dumps.values():
        del fields["samples"]
    results = {"all": summary(list(found.values())), "dumps": dumps}
    tables = [table, sample_table(list(found.values()))]
    print_results(card, tables, earlier | {args.label: results, "machine": card}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
