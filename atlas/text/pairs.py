"""Pairs of a query and the paragraph that answers it, for contrastive training.

Half of the countries of a batch have invented names and random facts, so that the encoder learns to compare names by
their letters and does not memorise the 200 of the training set. Held-out countries do not occur.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from atlas.countries import CONTINENTS, LANGUAGES, Country, article, fact_value, held_out
from atlas.text.wordings import NAMED, REVERSE
from gog_edge.retrieval.text.encoder import passage_text

QUERY_PREFIX, PASSAGE_PREFIX = "query: ", "passage: "  # those of E5
COUNTRIES = 16  # per batch, each with all its facts
INVENTED_RATE = 0.5
SIMILAR_RATE = 0.35  # of invented countries: named after another of the batch, like Guinea-Bissau
REVERSE_RATE = 0.2  # of queries: with the value of the fact instead of the country
ALIAS_RATE = 0.2  # of queries about a country that has other names
MISSPELT_RATE = 0.1  # of queries
MAX_LETTERS = 12  # of an invented word
SIMILAR_FORMS = ("New {n}", "{n} Islands", "North {n}", "South {n}", "{n}-{w}", "{n} and {w}", "Republic of {n}",
             "Equatorial {n}", "{n} {w}", "West {n}", "Saint {n}", "British {n} Territory")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pair:
    """A query and the paragraph that answers it."""

    query: str
    passage: str
    fact: str


class NameGenerator:
    """Invents names with the letter trigrams of the names it was given."""

    def __init__(self, names: Sequence[str]) -> None:
        self._next: dict[str, list[str]] = {}
        for word in (word for name in names for word in name.split() if len(word) > 2):
            letters = f"\n\n{word.strip('(),.')}\n"
            for at in range(2, len(letters)):
                self._next.setdefault(letters[at - 2 : at], []).append(letters[at])

    def word(self, rng: np.random.Generator) -> str:
        """Return a capitalised word of 3 to MAX_LETTERS letters."""
        while True:
            word = "\n\n"
            while len(word) < 2 + MAX_LETTERS and not word.endswith("\n", 2):
                following = self._next[word[-2:]]
                word += following[int(rng.integers(len(following)))]
            if len(word.strip()) > 2:
                return word.strip().capitalize()


def seen_countries(countries: Sequence[Country]) -> list[Country]:
    """Return the countries that are not held out, without their held-out neighbours."""
    hidden = held_out(countries)
    return [replace(country, neighbours=tuple(iso for iso in country.neighbours if iso not in hidden))
            for country in countries if country.iso not in hidden]


def make_batch(
    rng: np.random.Generator, real: Sequence[Country], names: Mapping[str, str], generator: NameGenerator
) -> list[Pair]:
    """Return one pair for each fact of COUNTRIES countries.

    Args:
        rng: Decides everything.
        real: The countries of the training set.
        names: Their names by ISO code, for paragraphs about neighbours.
        generator: Names the invented countries.
    """
    chosen = [real[int(k)] for k in rng.choice(len(real), COUNTRIES, replace=False)]
    called = dict(names)
    for place in range(COUNTRIES):
        if rng.random() < INVENTED_RATE:
            base = chosen[int(rng.integers(COUNTRIES))].name if rng.random() < SIMILAR_RATE else ""
            chosen[place] = _invented(rng, generator, chosen[place], base)
    seen = Counter((fact, _value(country, fact)) for country in chosen for fact in REVERSE)
    pairs = []
    for country in chosen:
        title = country.name
        for paragraph in article(country, called):
            value = _value(country, paragraph.fact)
            alone = seen[paragraph.fact, value] == 1 and bool(value)
            query = ask(rng, country, paragraph.fact, value if alone else "")
            pairs.append(Pair(query, passage_text(title, paragraph.section, paragraph.text), paragraph.fact))
    return pairs


def ask(rng: np.random.Generator, country: Country, fact: str, value: str) -> str:
    """Return a query about a fact of a country; with a `value`, at REVERSE_RATE a query for the country that has it."""
    if value and rng.random() < REVERSE_RATE:
        return _one(rng, REVERSE[fact].seen).format(v=value)
    aliases = [alias for alias in country.aliases if len(alias) > 3]
    name = _one(rng, aliases) if aliases and rng.random() < ALIAS_RATE else country.name
    if rng.random() < MISSPELT_RATE:
        name = misspell(rng, name)
    return _one(rng, NAMED[fact].seen).format(s=name)


def misspell(rng: np.random.Generator, name: str) -> str:
    """Drop, double or swap a letter inside the longest word of a name; a word below five letters is not changed."""
    longest = max(name.split(), key=len)
    if len(longest) < 5:
        return name
    at = int(rng.integers(1, len(longest) - 1))
    kind = int(rng.integers(3))
    if kind == 0:
        wrong = longest[:at] + longest[at + 1 :]
    elif kind == 1:
        wrong = longest[:at] + longest[at] + longest[at:]
    else:
        wrong = longest[:at] + longest[at + 1] + longest[at] + longest[at + 2 :]
    return name.replace(longest, wrong, 1)


def training_texts(
    real: Sequence[Country], names: Mapping[str, str], generator: NameGenerator, batches: int
) -> Iterator[str]:
    """Yield texts to train the tokenizer on: those of some batches, and the printable characters of ASCII."""
    yield string.ascii_letters + string.digits + string.punctuation
    for number in range(batches):
        for pair in make_batch(np.random.default_rng([7, number]), real, names, generator):
            yield from (QUERY_PREFIX + pair.query, PASSAGE_PREFIX + pair.passage)


def _invented(rng: np.random.Generator, generator: NameGenerator, like: Country, base: str) -> Country:
    """Return a country with invented facts, the neighbours of `like`, and a name that contains `base`."""
    word = generator.word(rng)
    name = _one(rng, SIMILAR_FORMS).format(n=base, w=word) if base else word
    languages = rng.choice(np.array(list(LANGUAGES.values())), int(rng.integers(1, 4)), replace=False)
    letters = "".join(chr(97 + int(k)) for k in rng.integers(0, 26, 2))
    return replace(
        like,
        name=name,
        capital=generator.word(rng),
        continent=_one(rng, tuple(CONTINENTS.values())),
        area=int(10 ** rng.uniform(1.3, 7.2)),
        population=int(10 ** rng.uniform(2.0, 9.1)),
        currency=generator.word(rng) if rng.random() < 0.5 else like.currency,
        currency_code=letters.upper() + chr(65 + int(rng.integers(26))),
        languages=tuple(str(language) for language in languages),
        neighbours=like.neighbours if rng.random() < 0.7 else (),
        domain=f".{letters}",
        phone=f"+{int(rng.integers(1, 999))}" + (f"-{int(rng.integers(100, 999))}" if rng.random() < 0.25 else ""),
        aliases=(),
    )


def _value(country: Country, fact: str) -> str:
    return fact_value(country, fact, {}) if fact in REVERSE else ""


def _one(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]
