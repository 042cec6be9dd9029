"""Test sets: questions about held-out countries, fixed by a seed and a hash."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from atlas.articles import fact_value
from atlas.countries import Country, held_out
from atlas.flags import invented_flag
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
    ask_beside,
    ask_fact,
    ask_fact_of,
    ask_hop,
    pick,
)
from atlas.scenes import MAX_FLAGS, SceneSpec, make_spec, relations
from gog_edge.errors import ArtifactError
from gog_edge.types import Pixels

# Seeds of invented flags: training draws from the first range, the test sets from the second.
TRAIN_INVENTED = range(0, 5000)
TEST_INVENTED = range(10_000, 12_000)
# Largest difference of any block of two reduced flags, 0..255, below which nobody tells them apart: Chad's blue and
# Romania's are 56 apart; an emblem makes a hundred and more.
TWIN_DIFFERENCE = 64.0
_TRIES = 400


@dataclass(frozen=True, slots=True)
class AskedScene:
    """A question with its picture's description."""

    question: Question
    scene: SceneSpec


def invented_key(seed: int) -> str:
    """Flag key of an invented flag."""
    return f"invented {seed}"


def scene_flags(spec: SceneSpec, flags: Mapping[str, Pixels]) -> dict[str, Pixels]:
    """The flags that a scene shows: stored ones, and invented ones drawn anew."""
    return {
        item.flag: invented_flag(int(item.flag.split()[1])) if item.flag.startswith("invented ") else flags[item.flag]
        for item in spec.placed
    }


def _reduced(pixels: Pixels) -> NDArray[np.float64]:
    """[24, 32, 3] float64 block means of a 240 x 320 flag."""
    height, width = pixels.shape[0] // 24, pixels.shape[1] // 32
    blocks: NDArray[np.float64] = pixels[: height * 24, : width * 32].reshape(24, height, 32, width, 3).mean((1, 3))
    return blocks


def look_alikes(flags: Mapping[str, Pixels]) -> dict[str, list[str]]:
    """The other flags of each flag, most alike first, with those that cannot be told apart left out."""
    keys = sorted(flags)
    small = np.stack([_reduced(flags[key]) for key in keys])
    found = {}
    for index, key in enumerate(keys):
        apart = np.abs(small - small[index])
        order, largest = np.argsort(apart.mean((1, 2, 3)), kind="stable"), apart.max((1, 2, 3))
        found[key] = [keys[k] for k in order if largest[k] >= TWIN_DIFFERENCE]
    return found


def _never_fits() -> ArtifactError:
    return ArtifactError(f"no scene fitted in {_TRIES} tries; are these the atlas's countries and flags?")


class SetMaker:
    """Draws test items; the same seed, facts and flags give the same items."""

    def __init__(self, countries: Sequence[Country], flags: Mapping[str, Pixels], seed: int) -> None:
        self._rng = np.random.default_rng([seed, 51])
        self._countries = {country.iso: country for country in countries}
        self._by_flag = {country.flag: country for country in countries}
        self._names = {country.iso: country.name for country in countries}
        hidden = held_out(countries)
        self._hidden = [country for country in countries if country.iso in hidden]
        self._alike = look_alikes({country.flag: flags[country.flag] for country in countries})

    def make(self, per_kind: int) -> list[AskedScene]:
        """`per_kind` items of each kind, kinds in turn, so that any first part is balanced too."""
        return [getattr(self, f"_{kind}")() for _ in range(per_kind) for kind in KINDS]

    # --- kinds --------------------------------------------------------------------------------

    def _glance(self) -> AskedScene:
        for _ in range(_TRIES):
            if self._rng.random() < 0.5:
                spec = self._spec(self._fill([], int(self._rng.integers(1, MAX_FLAGS + 1))))
                return self._item("glance", pick(self._rng, COUNT), "count", "", None, (str(len(spec.placed)),), spec)
            spec = self._spec(self._fill([], 2))
            meant = relations(spec)
            for axis, sides in SIDES.items():
                if "largest" in meant and all(side in meant for side in sides):
                    answer = next(word for side, word in sides.items() if meant[side] == meant["largest"])
                    return self._item("glance", pick(self._rng, LARGER[axis]), "larger", "", None, (answer,), spec)
        raise _never_fits()

    def _whole(self) -> AskedScene:
        country, fact = self._asked(SINGLE_FACTS)
        spec = self._spec([country.flag])
        text = ask_fact(self._rng, fact, pick(self._rng, SINGLE))
        return self._item("whole", text, fact, "", 0, self._answers(country, fact), spec)

    def _gaze(self) -> AskedScene:
        country, fact = self._asked(SINGLE_FACTS)
        spec, relation = self._several(country.flag)
        text = ask_fact(self._rng, fact, pick(self._rng, PLACES[relation]))
        return self._item("gaze", text, fact, relation, 0, self._answers(country, fact), spec)

    def _two_hops(self) -> AskedScene:
        bordering = self._rng.random() < 0.5
        for _ in range(_TRIES):
            country = self._pick_hidden()
            answers = self._bordering(country) if bordering else self._same_currency(country)
            if answers:
                spec, relation = self._several(country.flag)
                text = ask_hop(self._rng, BORDERING if bordering else SAME_CURRENCY, pick(self._rng, PLACES[relation]))
                fact = "bordering" if bordering else "same currency"
                return self._item("two_hops", text, fact, relation, 0, answers, spec)
        raise _never_fits()

    def _text(self) -> AskedScene:
        spec = self._spec(self._fill([], int(self._rng.integers(1, 5))))
        if self._rng.random() < 0.25:
            country = self._pick_hidden(lambda c: bool(c.capital))
            text = pick(self._rng, CAPITAL_OF).format(c=country.capital)
            return self._item("text", text, "name", "", None, (country.name,), spec)
        fact = str(self._rng.choice(list(TEXT_FACTS)))
        country = self._pick_hidden(lambda c: bool(fact_value(c, fact, self._names)))
        text = ask_fact_of(self._rng, fact, country.name)
        return self._item("text", text, fact, "", None, (fact_value(country, fact, self._names),), spec)

    def _reflect(self) -> AskedScene:
        country, fact = self._asked(SINGLE_FACTS)
        if self._rng.random() < 0.35:  # partly hidden: the first look may bring nothing
            spec, relation = self._several(country.flag, occluded=0)
            text = ask_fact(self._rng, fact, pick(self._rng, PLACES[relation]))
            return self._item("reflect", text, fact, relation, 0, self._answers(country, fact), spec)
        alike = self._alike[country.flag][:8]
        known = self._by_flag[alike[int(self._rng.integers(len(alike)))]]
        for _ in range(_TRIES):
            spec = self._spec([country.flag, known.flag])
            if "left1" in relations(spec):
                text = ask_beside(self._rng, known.name, fact)
                return self._item("reflect", text, fact, "other", 0, self._answers(country, fact), spec)
        raise _never_fits()

    def _invented(self) -> AskedScene:
        flag = invented_key(int(self._rng.choice(TEST_INVENTED)))
        fact = str(self._rng.choice(list(SINGLE_FACTS)))
        if self._rng.random() < 0.3:
            spec, relation, place = self._spec([flag]), "", pick(self._rng, SINGLE)
        else:
            spec, relation = self._several(flag)
            place = pick(self._rng, PLACES[relation])
        return self._item("invented", ask_fact(self._rng, fact, place), fact, relation, 0, (), spec)

    # --- pieces -------------------------------------------------------------------------------

    def _item(
        self, kind: Kind, text: str, fact: str, relation: str, asked: int | None, answers: tuple[str, ...],
        spec: SceneSpec,
    ) -> AskedScene:  # fmt: skip
        return AskedScene(Question(kind, text, fact, relation, asked, answers), spec)

    def _pick_hidden(self, fits: Callable[[Country], bool] = lambda _: True) -> Country:
        pool = [country for country in self._hidden if fits(country)]
        return pool[int(self._rng.integers(len(pool)))]

    def _asked(self, facts: Sequence[str]) -> tuple[Country, str]:
        fact = str(self._rng.choice(list(facts)))
        return self._pick_hidden(lambda c: fact == "name" or bool(fact_value(c, fact, self._names))), fact

    def _twins(self, country: Country) -> list[Country]:
        """The country and all that fly the same flag."""
        different = set(self._alike[country.flag])
        return [other for flag, other in self._by_flag.items() if flag not in different]

    def _answers(self, country: Country, fact: str) -> tuple[str, ...]:
        twins = self._twins(country)
        values = [other.name if fact == "name" else fact_value(other, fact, self._names) for other in twins]
        return tuple(dict.fromkeys(value for value in values if value))

    def _bordering(self, country: Country) -> tuple[str, ...]:
        neighbours = [self._countries[iso] for twin in self._twins(country) for iso in twin.neighbours]
        return tuple(dict.fromkeys(other.capital for other in neighbours if other.capital))

    def _same_currency(self, country: Country) -> tuple[str, ...]:
        twins = {twin.iso for twin in self._twins(country)}
        codes = {self._countries[iso].currency_code for iso in twins}
        return tuple(
            other.name for other in self._countries.values() if other.currency_code in codes and other.iso not in twins
        )

    def _fill(self, flags: list[str], count: int) -> list[str]:
        """Other flags beside the given ones, none of them the twin of another."""
        keys = sorted(self._by_flag)
        for _ in range(_TRIES):
            if len(flags) >= count:
                return flags
            key = keys[int(self._rng.integers(len(keys)))]
            if all(key in self._alike.get(flag, keys) and key != flag for flag in flags):
                flags = [*flags, key]
        raise _never_fits()

    def _spec(self, flags: list[str], occluded: int | None = None) -> SceneSpec:
        return make_spec(int(self._rng.integers(2**31)) + 2**31, flags, occluded=occluded)

    def _several(self, flag: str, occluded: int | None = None) -> tuple[SceneSpec, str]:
        """A scene of two to six flags in which a place word means the first of them."""
        for _ in range(_TRIES):
            spec = self._spec(self._fill([flag], int(self._rng.integers(2, MAX_FLAGS + 1))), occluded)
            words = [word for word, index in relations(spec).items() if index == 0]
            if words:
                return spec, words[int(self._rng.integers(len(words)))]
        raise _never_fits()


def items_hash(items: Sequence[AskedScene]) -> str:
    """Hex sha256 over questions, answers and scene descriptions; numbers to six places."""

    def rounded(value: object) -> object:
        if isinstance(value, float):
            return f"{value:.6f}" if math.isfinite(value) else str(value)
        if isinstance(value, (list, tuple)):
            return [rounded(one) for one in value]
        return {key: rounded(one) for key, one in value.items()} if isinstance(value, dict) else value

    plain = [rounded(asdict(item)) for item in items]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
