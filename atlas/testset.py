"""Test sets of questions about held-out countries, fixed by a seed and a hash, and the scoring of their episodes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from atlas.countries import Country, fact_value, held_out
from atlas.flags import TEST_INVENTED, distinguishable_flags, invented_key
from atlas.questions import (
    BORDERING,
    CAPITAL_OF,
    COUNT,
    KINDS,
    LARGER,
    PLACES,
    SAME_CURRENCY,
    SIDES,
    SINGLE,
    SINGLE_FACTS,
    TEXT_FACTS,
    Kind,
    Question,
    ask_about_other,
    ask_fact,
    ask_fact_of,
    ask_hop,
    pick,
)
from atlas.scenes import MAX_FLAGS, SceneSpec, make_spec, relations
from gog_edge.agent.citations import normalize_answer
from gog_edge.agent.events import AnswerRecord
from gog_edge.errors import ArtifactError
from gog_edge.types import Pixels, Size

_TRIES = 400  # samples before a scene that meets the conditions is given up


@dataclass(frozen=True, slots=True)
class SceneQuestion:
    """A question and the description of its picture."""

    question: Question
    scene: SceneSpec


class AnswerKey:
    """The accepted answers to questions about a flag. Every country whose flag looks the same is accepted too."""

    def __init__(self, countries: Sequence[Country], flags: Mapping[str, Pixels]) -> None:
        self.names = {country.iso: country.name for country in countries}
        self.by_flag = {country.flag: country for country in countries}
        self.distinguishable = distinguishable_flags({country.flag: flags[country.flag] for country in countries})
        self._countries = {country.iso: country for country in countries}

    def fact(self, country: Country, fact: str) -> tuple[str, ...]:
        """Return the accepted answers to a question about one fact, or about the name."""
        values = [one.name if fact == "name" else fact_value(one, fact, self.names) for one in self._twins(country)]
        return tuple(dict.fromkeys(value for value in values if value))

    def bordering_capitals(self, country: Country) -> tuple[str, ...]:
        """Return the capitals of the neighbours."""
        neighbours = [self._countries[iso] for twin in self._twins(country) for iso in twin.neighbours]
        return tuple(dict.fromkeys(other.capital for other in neighbours if other.capital))

    def same_currency(self, country: Country) -> tuple[str, ...]:
        """Return the names of the other countries that use the same currency."""
        twins = {twin.iso for twin in self._twins(country)}
        codes = {self._countries[iso].currency_code for iso in twins}
        return tuple(
            other.name for other in self._countries.values() if other.currency_code in codes and other.iso not in twins
        )

    def _twins(self, country: Country) -> list[Country]:
        """Return the country and those whose flags cannot be told apart from its flag."""
        different = set(self.distinguishable[country.flag])
        return [other for flag, other in self.by_flag.items() if flag not in different]


def larger_flag(meant: Mapping[str, int], axis: str) -> str | None:
    """Return which of two flags is larger: "left" or "right" for the axis "across", "upper" or "lower" for "upright".

    `meant` is what `scenes.relations` returned. None if size or position is ambiguous.
    """
    sides = SIDES[axis]
    if "largest" not in meant or not all(side in meant for side in sides):
        return None
    return next(word for side, word in sides.items() if meant[side] == meant["largest"])


class QuestionGenerator:
    """Samples test questions. The same seed, facts and flags give the same questions."""

    def __init__(self, countries: Sequence[Country], flags: Mapping[str, Pixels], seed: int) -> None:
        self._rng = np.random.default_rng([seed, 51])
        self._key = AnswerKey(countries, flags)
        hidden = held_out(countries)
        self._hidden = [country for country in countries if country.iso in hidden]

    def generate(self, per_kind: int) -> list[SceneQuestion]:
        """Return `per_kind` questions of each kind, with the kinds in rotation, so that every prefix is balanced.

        Raises:
            ArtifactError: no scene satisfies the conditions of a question.
        """
        return [getattr(self, f"_{kind}")() for _ in range(per_kind) for kind in KINDS]

    # --- kinds --------------------------------------------------------------------------------

    def _glance(self) -> SceneQuestion:
        for _ in range(_TRIES):
            if self._rng.random() < 0.5:
                spec = self._spec(self._fill([], int(self._rng.integers(1, MAX_FLAGS + 1))))
                return self._item("glance", pick(self._rng, COUNT), "count", "", None, (str(len(spec.placed)),), spec)
            spec = self._spec(self._fill([], 2))
            meant = relations(spec)
            for axis in SIDES:
                answer = larger_flag(meant, axis)
                if answer is not None:
                    return self._item("glance", pick(self._rng, LARGER[axis]), "larger", "", None, (answer,), spec)
        raise _no_scene()

    def _whole(self) -> SceneQuestion:
        country, fact = self._asked(SINGLE_FACTS)
        spec = self._spec([country.flag])
        text = ask_fact(self._rng, fact, pick(self._rng, SINGLE))
        return self._item("whole", text, fact, "", 0, self._key.fact(country, fact), spec)

    def _gaze(self) -> SceneQuestion:
        country, fact = self._asked(SINGLE_FACTS)
        spec, relation = self._several(country.flag)
        text = ask_fact(self._rng, fact, pick(self._rng, PLACES[relation]))
        return self._item("gaze", text, fact, relation, 0, self._key.fact(country, fact), spec)

    def _two_hops(self) -> SceneQuestion:
        bordering = self._rng.random() < 0.5
        for _ in range(_TRIES):
            country = self._pick_hidden()
            answers = self._key.bordering_capitals(country) if bordering else self._key.same_currency(country)
            if answers:
                spec, relation = self._several(country.flag)
                text = ask_hop(self._rng, BORDERING if bordering else SAME_CURRENCY, pick(self._rng, PLACES[relation]))
                fact = "bordering" if bordering else "same currency"
                return self._item("two_hops", text, fact, relation, 0, answers, spec)
        raise _no_scene()

    def _text(self) -> SceneQuestion:
        spec = self._spec(self._fill([], int(self._rng.integers(1, 5))))
        if self._rng.random() < 0.25:
            country = self._pick_hidden(lambda c: bool(c.capital))
            text = pick(self._rng, CAPITAL_OF).format(c=country.capital)
            return self._item("text", text, "name", "", None, (country.name,), spec)
        fact = str(self._rng.choice(list(TEXT_FACTS)))
        country = self._pick_hidden(lambda c: bool(fact_value(c, fact, self._key.names)))
        text = ask_fact_of(self._rng, fact, country.name)
        return self._item("text", text, fact, "", None, (fact_value(country, fact, self._key.names),), spec)

    def _reflect(self) -> SceneQuestion:
        country, fact = self._asked(SINGLE_FACTS)
        if self._rng.random() < 0.35:  # partly occluded: the first gaze may find nothing
            spec, relation = self._several(country.flag, occluded=0)
            text = ask_fact(self._rng, fact, pick(self._rng, PLACES[relation]))
            return self._item("reflect", text, fact, relation, 0, self._key.fact(country, fact), spec)
        similar = self._key.distinguishable[country.flag][:8]
        known = self._key.by_flag[similar[int(self._rng.integers(len(similar)))]]
        for _ in range(_TRIES):
            spec = self._spec([country.flag, known.flag])
            if "left1" in relations(spec):
                text = ask_about_other(self._rng, known.name, fact)
                return self._item("reflect", text, fact, "other", 0, self._key.fact(country, fact), spec)
        raise _no_scene()

    def _invented(self) -> SceneQuestion:
        flag = invented_key(int(self._rng.choice(TEST_INVENTED)))
        fact = str(self._rng.choice(list(SINGLE_FACTS)))
        if self._rng.random() < 0.3:
            spec, relation, place = self._spec([flag]), "", pick(self._rng, SINGLE)
        else:
            spec, relation = self._several(flag)
            place = pick(self._rng, PLACES[relation])
        return self._item("invented", ask_fact(self._rng, fact, place), fact, relation, 0, (), spec)

    # --- parts --------------------------------------------------------------------------------

    def _item(
        self, kind: Kind, text: str, fact: str, relation: str, asked: int | None, answers: tuple[str, ...],
        spec: SceneSpec,
    ) -> SceneQuestion:  # fmt: skip
        return SceneQuestion(Question(kind, text, fact, relation, asked, answers), spec)

    def _pick_hidden(self, fits: Callable[[Country], bool] = lambda _: True) -> Country:
        pool = [country for country in self._hidden if fits(country)]
        return pool[int(self._rng.integers(len(pool)))]

    def _asked(self, facts: Sequence[str]) -> tuple[Country, str]:
        fact = str(self._rng.choice(list(facts)))
        return self._pick_hidden(lambda c: fact == "name" or bool(fact_value(c, fact, self._key.names))), fact

    def _fill(self, flags: list[str], count: int) -> list[str]:
        """Return `flags` with random others added up to `count`, all of which can be told apart."""
        keys = sorted(self._key.by_flag)
        for _ in range(_TRIES):
            if len(flags) >= count:
                return flags
            key = keys[int(self._rng.integers(len(keys)))]
            if all(key in self._key.distinguishable.get(flag, keys) and key != flag for flag in flags):
                flags = [*flags, key]
        raise _no_scene()

    def _spec(self, flags: list[str], occluded: int | None = None) -> SceneSpec:
        return make_spec(int(self._rng.integers(2**31)) + 2**31, flags, occluded=occluded)

    def _several(self, flag: str, occluded: int | None = None) -> tuple[SceneSpec, str]:
        """Return a scene of two to six flags, and a place word that refers to `flag` in it."""
        for _ in range(_TRIES):
            spec = self._spec(self._fill([flag], int(self._rng.integers(2, MAX_FLAGS + 1))), occluded)
            words = [word for word, index in relations(spec).items() if index == 0]
            if words:
                return spec, words[int(self._rng.integers(len(words)))]
        raise _no_scene()


def _no_scene() -> ArtifactError:
    return ArtifactError(
        f"test set: no scene satisfies the conditions after {_TRIES} samples; check that countries and flags are the "
        "atlas's"
    )


def items_hash(items: Sequence[SceneQuestion]) -> str:
    """Return the hex SHA-256 of questions, answers and scene descriptions, with floats rounded to six places."""

    def rounded(value: object) -> object:
        if isinstance(value, float):
            return f"{value:.6f}" if math.isfinite(value) else str(value)
        if isinstance(value, (list, tuple)):
            return [rounded(one) for one in value]
        return {key: rounded(one) for key, one in value.items()} if isinstance(value, dict) else value

    plain = [rounded(asdict(item)) for item in items]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one episode."""

    correct: bool
    refused: bool  # answered that the entity is not in the snapshot
    gaze_ious: tuple[float, ...]  # IoU of each gaze with its target; empty if the question is about no flag
    strict_ious: tuple[float, ...]  # the same without the exception for questions about "the other flag"
    cited: bool  # a cited passage contains the answer
    actions: tuple[str, ...]
    ms: float  # of the whole episode


def score(item: SceneQuestion, record: AnswerRecord, size: Size, not_found: str) -> Score:
    """Score an episode: the normalised answer must equal an accepted one, and for an invented flag be a refusal.

    Args:
        item: the question.
        record: the answer and the steps.
        size: of the picture in pixels.
        not_found: the dialect's phrase for "not in the snapshot".
    """
    answer = normalize_answer(record.answer)
    refused = normalize_answer(not_found) in answer
    accepted = {normalize_answer(one) for one in item.question.answers}
    passages = [f" {normalize_answer(citation.passage.text)} " for citation in record.citations]
    return Score(
        correct=refused if item.question.kind == "invented" else answer in accepted,
        refused=refused,
        gaze_ious=_ious(item, record, size, strict=False),
        strict_ious=_ious(item, record, size, strict=True),
        cited=bool(answer) and any(f" {answer} " in passage for passage in passages),
        actions=tuple(step.action for step in record.steps),
        ms=record.timings_ms["total"],
    )


def _ious(item: SceneQuestion, record: AnswerRecord, size: Size, *, strict: bool) -> tuple[float, ...]:
    """Return the IoU of each gaze with its target, the flag asked about.

    In a question about "the other flag" the policy cannot know which of the two that is before it has searched with
    one. The first gaze may therefore be at either, unless `strict`.
    """
    asked = item.question.asked
    if asked is None:
        return ()
    gazes = [step.box for step in record.steps if step.action == "gaze_search" and step.box is not None]
    found = []
    for index, box in enumerate(gazes):
        either = item.question.relation == "other" and index == 0 and not strict
        targets = range(len(item.scene.placed)) if either else [asked]
        found.append(max(box.iou(item.scene.box(target, size)) for target in targets))
    return tuple(found)
