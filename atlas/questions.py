"""Questions about scenes of flags, in varied everyday wording.

Training asks them about fictional countries, the test sets about held-out real ones; both take the wording from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

Kind: TypeAlias = Literal["glance", "whole", "gaze", "two_hops", "text", "reflect", "invented"]
KINDS: tuple[Kind, ...] = ("glance", "whole", "gaze", "two_hops", "text", "reflect", "invented")

PLACES: dict[str, tuple[str, ...]] = {
    "left1": ("the leftmost flag", "the flag on the far left", "the first flag from the left"),
    "left2": ("the second flag from the left", "flag number two counted from the left"),
    "left3": ("the third flag from the left", "flag number three counted from the left"),
    "right1": ("the rightmost flag", "the flag on the far right", "the first flag from the right"),
    "right2": ("the second flag from the right", "flag number two counted from the right"),
    "top1": ("the topmost flag", "the highest flag", "the flag at the very top"),
    "bottom1": ("the lowest flag", "the flag at the very bottom", "the bottommost flag"),
    "middle": ("the middle flag", "the flag in the middle"),
    "top left": ("the flag at the top left", "the flag in the upper left corner"),
    "top right": ("the flag at the top right", "the flag in the upper right corner"),
    "bottom left": ("the flag at the bottom left", "the flag in the lower left corner"),
    "bottom right": ("the flag at the bottom right", "the flag in the lower right corner"),
    "largest": ("the largest flag", "the biggest flag"),
    "smallest": ("the smallest flag", "the tiniest flag"),
}
SINGLE = ("this flag", "the flag in the picture", "the flag shown here")

# {s} is replaced by a noun phrase for the country, {f} by one for the flag.
FACT_QUESTIONS: dict[str, tuple[str, ...]] = {
    "name": ("Which country does {f} belong to?", "Which country has {f}?", "Name the country of {f}."),
    "capital": ("What is the capital of {s}?", "Name the capital city of {s}.", "Which city is the capital of {s}?"),
    "currency": ("What is the currency of {s}?", "Which money do people pay with in {s}?", "Name the currency of {s}."),
    "population": ("How many people live in {s}?", "What is the population of {s}?", "How many inhabitants has {s}?"),
    "area": ("How many square kilometres is {s}?", "What is the area of {s}?", "What size is {s}?"),
    "continent": ("On which continent is {s}?", "In which part of the world is {s}?"),
    "languages": ("Which languages are spoken in {s}?", "What languages do people speak in {s}?"),
    "domain": ("What is the internet domain of {s}?", "How do web addresses of {s} end?"),
    "phone": ("What is the dialling code of {s}?", "Which telephone code has {s}?"),
}
SINGLE_FACTS = tuple(FACT_QUESTIONS)
TEXT_FACTS = tuple(fact for fact in FACT_QUESTIONS if fact != "name")
OF_FLAG = ("the country of {f}", "the country with {f}", "the land of {f}")

COUNT = ("How many flags are there?", "How many flags does the picture show?", "Count the flags.")
LARGER = {
    "across": ("Which flag is larger, the left or the right one?", "Is the left or the right flag larger?"),
    "upright": ("Which flag is larger, the upper or the lower one?", "Is the upper or the lower flag larger?"),
}
SIDES = {"across": {"left1": "left", "right1": "right"}, "upright": {"top1": "upper", "bottom1": "lower"}}
BORDERING = ("What is the capital of a country that borders {s}?", "Name the capital of a neighbour of {s}.")
SAME_CURRENCY = (
    "Which other country uses the same currency as {s}?",
    "Who else pays with the currency of {s}?",
)
OTHER_FLAG_QUESTIONS = (
    "Beside the flag of {k} hangs another flag. {q}",
    "One flag is that of {k}. About the other one: {q}",
)
OTHER_FLAG = "the other flag"
CAPITAL_OF = ("Which country has the capital {c}?", "Of which country is {c} the capital?")


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Choose one of the wordings at random."""
    return options[int(rng.integers(len(options)))]


def ask_fact(rng: np.random.Generator, fact: str, flag: str) -> str:
    """Return a question about the country of a flag; `flag` is a noun phrase such as 'the leftmost flag'."""
    subject = pick(rng, OF_FLAG).format(f=flag)
    return pick(rng, FACT_QUESTIONS[fact]).format(s=subject, f=flag)


def ask_fact_of(rng: np.random.Generator, fact: str, name: str) -> str:
    """Return a question about the country called `name`."""
    return pick(rng, FACT_QUESTIONS[fact]).format(s=name)


def ask_hop(rng: np.random.Generator, wordings: Sequence[str], flag: str) -> str:
    """Return a question that requires a second search; `wordings` is BORDERING or SAME_CURRENCY."""
    return pick(rng, wordings).format(s=pick(rng, OF_FLAG).format(f=flag))


def ask_about_other(rng: np.random.Generator, known: str, fact: str) -> str:
    """Return a question about the other of two flags, of which one is that of the country called `known`."""
    return pick(rng, OTHER_FLAG_QUESTIONS).format(k=known, q=ask_fact(rng, fact, OTHER_FLAG))


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a test set, without its picture. The hash of a test set covers these field names."""

    kind: Kind
    text: str
    fact: str  # key of FACT_QUESTIONS, or "count", "larger", "bordering", "same currency"
    relation: str  # key of PLACES for the flag asked about; "other" or empty if there is none
    asked: int | None  # index in the scene of the flag asked about
    answers: tuple[str, ...]  # the accepted answers; empty if the policy must refuse
