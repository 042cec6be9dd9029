"""A fictional atlas: thirty countries with invented flags, two of which are the same."""

from __future__ import annotations

from functools import cache

from atlas.countries import Country
from atlas.flags import invented_flag
from gog_edge.types import Pixels

COUNT = 30
MONEY = (("Crown", "CRN"), ("Shell", "SHL"), ("Bead", "BED"), ("Coin", "CON"))
# Indices of the countries with the same flag. Every fifth country is held out (5th, 10th, ...), so that the second is.
TWINS = (2, 4)


def key(index: int) -> str:
    """Return the ISO code of a country: AA, AB, ..."""
    return chr(65 + index // 26) + chr(65 + index % 26)


@cache
def countries() -> tuple[Country, ...]:
    """Return the countries; each borders the next one."""
    return tuple(
        Country(
            iso=key(n), iso3=key(n) + "X", name=f"Land {key(n)}", capital=f"City {key(n)}", continent="Europe",
            area=1000 + n, population=10_000_000 - n, currency=MONEY[n % 4][0], currency_code=MONEY[n % 4][1],
            languages=("Latin", "Greek", "Maltese")[: 1 + n % 3], neighbours=(key((n + 1) % COUNT),),
            domain=f".{key(n).lower()}", phone=f"+{100 + n}", aliases=(key(n),),
        )
        for n in range(COUNT)
    )  # fmt: skip


@cache
def flags() -> dict[str, Pixels]:
    """Return the flags by flag key."""
    drawn = {country.flag: invented_flag(20_000 + n) for n, country in enumerate(countries())}
    first, second = (countries()[n].flag for n in TWINS)
    return drawn | {second: drawn[first]}

