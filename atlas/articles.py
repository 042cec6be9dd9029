"""Articles of the atlas: our own sentences, one fact a paragraph, so that a citation points at exactly one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atlas.countries import Country


@dataclass(frozen=True, slots=True)
class Paragraph:
    """One fact. `section` names it in several everyday words, so that a question in other words finds it."""

    fact: str  # key of the fact: one of FACTS
    section: str
    text: str


SECTIONS = {
    "continent": "Continent, part of the world",
    "capital": "Capital city",
    "currency": "Currency, money, pay",
    "population": "Population, people, inhabitants",
    "area": "Area, size, square kilometres",
    "languages": "Languages, speak, spoken",
    "neighbours": "Neighbours, borders, next to",
    "domain": "Internet domain, web addresses",
    "phone": "Dialling code, telephone, calls",
}
FACTS = tuple(SECTIONS)
# What to search for when a fact is wanted: the words of its sentence.
SEARCH_WORDS = {**{fact: fact for fact in FACTS}, "domain": "internet domain", "phone": "dialling code"}


def listed(names: Sequence[str]) -> str:
    """'A', 'A and B', 'A, B and C'."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def fact_value(country: Country, fact: str, names: dict[str, str]) -> str:
    """The span that answers a question about `fact`, exactly as the sentence holds it; empty when unknown.

    `names` maps ISO codes to names, for neighbours.
    """
    match fact:
        case "area":
            return f"{country.area:,}" if country.area else ""
        case "population":
            return f"{country.population:,}" if country.population else ""
        case "languages":
            return listed(country.languages) if country.languages else ""
        case "neighbours":
            return listed([names[iso] for iso in country.neighbours]) if country.neighbours else ""
        case _:
            return str(getattr(country, fact))


def sentence(name: str, fact: str, value: str, *, code: str = "") -> str:
    """The one sentence for a fact. `code` is the currency's. An empty value gives the sentence for 'none'."""
    match fact:
        case "continent":
            return f"{name} lies in {value}."
        case "capital":
            return f"The capital of {name} is {value}."
        case "currency":
            return f"The currency of {name} is the {value} ({code})."
        case "population":
            return f"The population of {name} is {value} people."
        case "area":
            return f"The area of {name} is {value} square kilometres."
        case "languages":
            return f"{name} speaks {value}."
        case "neighbours":
            return f"{name} borders {value}." if value else f"{name} has no land border."
        case "domain":
            return f"The internet domain of {name} is {value}."
        case "phone":
            return f"The dialling code of {name} is {value}."
    raise ValueError(f"no sentence for the fact '{fact}'; known: {', '.join(FACTS)}")


def article(country: Country, names: dict[str, str]) -> list[Paragraph]:
    """The paragraphs of one country, in the order of FACTS; unknown facts are left out."""
    paragraphs = []
    for fact, section in SECTIONS.items():
        value = fact_value(country, fact, names)
        if value or fact == "neighbours":
            text = sentence(country.name, fact, value, code=country.currency_code)
            paragraphs.append(Paragraph(fact, section, text))
    return paragraphs
