"""From articles in order to cited evidence, with one look-up of each kind a pack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gog_edge.retrieval.channels import Candidate
from gog_edge.retrieval.fusion import Key
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.segment import ParagraphRow
from gog_edge.retrieval.store import ImageRow
from gog_edge.types import ChannelRank, Evidence, ImageRef, Passage

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """One thing that will be evidence."""

    keys: tuple[Key, ...]  # its articles, best first
    picture: Candidate | None  # the stored image that matched; None: the article's own
    score: float
    ranks: tuple[ChannelRank, ...]
    passages: int  # at most


@dataclass(frozen=True, slots=True)
class Reading:
    """How paragraphs are chosen."""

    matched: Mapping[Key, Sequence[int]]  # those that words have found, best first
    terms: Sequence[str]  # for the other articles


def evidence_of(packs: Mapping[str, Pack], claims: Sequence[Claim], reading: Reading) -> tuple[Evidence, ...]:
    """Evidence of claims, in their order."""
    chosen = _paragraphs(packs, claims, reading)
    titles: dict[Key, str] = {}
    images: dict[Key, ImageRef] = {}
    passages: dict[Key, Passage] = {}  # here a key's number is a paragraph's
    for name, pack in packs.items():
        own = [claim for claim in claims if any(owner == name for owner, _ in claim.keys)]
        if not own:
            continue
        titles |= _keyed(name, pack.store.titles(_numbers(name, (key for claim in own for key in claim.keys))))
        plain = _numbers(name, (claim.keys[0] for claim in own if claim.picture is None))
        images |= _keyed(name, _main_images(pack, plain))
        wanted = _numbers(name, (paragraph for said in chosen for paragraph in said))
        passages |= _keyed(name, {n: _passage(pack, row) for n, row in pack.store.paragraphs(wanted).items()})
    return tuple(
        Evidence(
            titles=tuple(dict.fromkeys(titles[key] for key in claim.keys)),
            passages=tuple(passages[paragraph] for paragraph in said),
            image=_ref(claim.picture.pack, claim.picture.row) if claim.picture else images.get(claim.keys[0]),
            score=claim.score,
            ranks=claim.ranks,
        )
        for claim, said in zip(claims, chosen, strict=True)
    )


def _paragraphs(packs: Mapping[str, Pack], claims: Sequence[Claim], reading: Reading) -> list[list[Key]]:
    """Paragraphs of each claim's articles; each article's best before any second one."""
    found: dict[Key, list[Key]] = {}
    for claim in claims:
        for name, article in claim.keys[: claim.passages]:
            ids = reading.matched.get((name, article)) or [
                match.paragraph for match in packs[name].store.rank(reading.terms, claim.passages, article)
            ]
            found[name, article] = [(name, paragraph) for paragraph in ids]
    for name, pack in packs.items():
        silent = [article for owner, article in found if owner == name and not found[owner, article]]
        leads = pack.store.leads(silent) if silent else {}
        found |= {(name, article): [(name, paragraph)] for article, paragraph in leads.items()}
    return [_in_turns([found[key] for key in claim.keys[: claim.passages]], claim.passages) for claim in claims]


def _in_turns(per_article: Sequence[Sequence[Key]], most: int) -> list[Key]:
    turns = [own[depth] for depth in range(most) for own in per_article if depth < len(own)]
    return turns[:most]


def _main_images(pack: Pack, articles: Sequence[int]) -> dict[int, ImageRef]:
    mains = pack.live_main_images(articles) if articles else {}
    rows = pack.store.images(list(mains.values()))
    return {article: _ref(pack, rows[image]) for article, image in mains.items()}


def _numbers(name: str, keys: Iterable[Key]) -> list[int]:
    return list(dict.fromkeys(number for owner, number in keys if owner == name))


def _keyed(name: str, values: Mapping[int, T]) -> dict[Key, T]:
    return {(name, number): value for number, value in values.items()}


def _ref(pack: Pack, row: ImageRow) -> ImageRef:
    return ImageRef(pack.name, row.id, row.caption, row.licence, row.attribution)


def _passage(pack: Pack, row: ParagraphRow) -> Passage:
    span = row.start, row.start + len(row.text)
    return Passage(pack.name, row.title, row.section, row.id, row.text, row.licence, span)
