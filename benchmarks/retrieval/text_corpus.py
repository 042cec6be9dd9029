"""Synthetic paragraphs with the statistics that decide the cost of a word search, in several languages.

Words are drawn by the law of Zipf and Mandelbrot from vocabularies of up to 400,000 words. English has its own function
words at the head, endings that stemming removes, and three paragraphs in ten with an accent, a dash or a curly quote.
The words of other languages are random strings of their letters; Chinese, Japanese and Thai have no blanks. The same
seed gives the same corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

WORDS = 60  # of a paragraph, on average
PARAGRAPHS = 4  # of an article
SECTIONS = ("", "History", "Geography", "Economy")
HEAD = (
    "the of and in to a is was for as on with by that from at are it his an were be which this or has had also first "
    "one their its not after new who two her they have been other more when time all there into than some most only"
)
_ENDINGS = ("", "", "", "", "s", "ed", "ing", "ly", "er", "ation", "al", "ness", "ity", "ies")
_SPECIAL = ("café", "–", "“well-known”", "Zoë’s", "naïve", "10 km²", "São", "Łódź", "façade", "—")
_ONSETS = ("b", "c", "d", "f", "g", "h", "l", "m", "n", "p", "r", "s", "t", "v", "w", "br", "ch", "cl", "dr", "gr",
           "pr", "sh", "sp", "st", "th", "tr")  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "a", "e", "i", "o", "ai", "ea", "ee", "oo", "ou")
_CODAS = ("l", "m", "n", "r", "s", "t", "d", "ck", "nd", "nt", "rd", "rk", "rn", "st", "x")
LETTERS = {
    "Russian": "оеаинтсрвлкмдпуяыьгзбчйхжшюцщёэ", "Greek": "αοιετνσηρπκμλυγδχθφβξζψώίάόέήύ",
    "Arabic": "اليمونرتبةعدسفهكقأحجشطصخىذزثئءغضظؤ",
    "Hindi": "क ा र त न ि ी े स म ह ल प ् य ो व द ज ग ब ु श च थ भ ध ख ट",
    "Korean": "이다는의에하고가을로은지한기사시를리자어인도대수아정나",
    "Thai": "านรอกเงมยลวดทสตะปบคหแจพชขโใไผณถ่้ัิีุู็์",
    "Japanese": "のにはをたがでてとしれさいるなもからきつりくこアイスルントリクラドレ国日本年人大会東京学生",
}  # fmt: skip
# Further letters: ideographs, and Hangul syllables.
RARE_LETTERS = {"Chinese": range(0x4E00, 0x8E00, 4), "Japanese": range(0x4E00, 0x7E00, 8),
                "Korean": range(0xAC00, 0xD700, 11)}  # fmt: skip
BLANKS = frozenset({"English", "Russian", "Greek", "Arabic", "Hindi", "Korean"})
LANGUAGES = ("English", *LETTERS, "Chinese")


@dataclass(frozen=True)
class Language:
    """A language: its words, the most frequent first."""

    name: str
    words: Sequence[str] = field(repr=False)
    shares: NDArray[np.float64] = field(repr=False)  # [n] cumulative probabilities

    @classmethod
    def make(cls, name: str, size: int, seed: int = 0) -> Language:
        """Create a language of `size` words."""
        rng = np.random.default_rng((seed, LANGUAGES.index(name)))
        words = list(dict.fromkeys(_english(rng, size) if name == "English" else _foreign(rng, name, size)))
        weights = 1 / (np.arange(len(words)) + 2.7) ** 1.05
        return cls(name, words, np.cumsum(weights / weights.sum()))

    def paragraph(self, rng: np.random.Generator) -> str:
        """Return a paragraph of about WORDS words in sentences."""
        count = int(rng.integers(WORDS // 2, WORDS * 3 // 2))
        numbers = np.searchsorted(self.shares, rng.random(count))
        words = [self.words[number] for number in numbers.tolist()]
        if self.name == "English" and rng.random() < 0.3:
            words[len(words) // 2] = _SPECIAL[int(rng.integers(len(_SPECIAL)))]
        gap, stop = (" ", ". ") if self.name in BLANKS else ("", "，" if self.name != "Thai" else " ")
        sentences = (gap.join(words[at : at + 12]).capitalize() for at in range(0, len(words), 12))
        return stop.join(sentences) + stop.strip()

    def query(self, paragraph: str, rng: np.random.Generator) -> str:
        """Return words of a paragraph as one might ask for them: neighbours, or a part of a text without blanks."""
        if self.name not in BLANKS:
            start = int(rng.integers(max(1, len(paragraph) - 8)))
            return paragraph[start : start + int(rng.integers(3, 9))]
        words = paragraph.replace(".", "").split()
        start = int(rng.integers(max(1, len(words) - 6)))
        chosen = " ".join(words[start : start + int(rng.integers(3, 7))])
        return f"What is the {chosen}?" if self.name == "English" else chosen


def _english(rng: np.random.Generator, size: int) -> Iterator[str]:
    yield from HEAD.split()
    onsets, vowels, codas, endings = (rng.integers(len(part), size=(3, size)).tolist()
                                      for part in (_ONSETS, _VOWELS, _CODAS, _ENDINGS))  # fmt: skip
    for word, syllables in enumerate(rng.choice((1, 2, 3), size, p=(0.2, 0.5, 0.3)).tolist()):
        stem = "".join(_ONSETS[onsets[n][word]] + _VOWELS[vowels[n][word]] for n in range(syllables))
        yield stem + _CODAS[codas[0][word]] + _ENDINGS[endings[0][word]]
    yield from (f"{prefix}{number}" for number in range(size // 8) for prefix in ("", "b"))  # years and codes


def _foreign(rng: np.random.Generator, name: str, size: int) -> Iterator[str]:
    letters = [*LETTERS.get(name, "").replace(" ", ""), *(chr(code) for code in RARE_LETTERS.get(name, ()))]
    weights = np.cumsum(1 / (np.arange(len(letters)) + (8 if name == "Chinese" else 4)))
    lengths = {"Chinese": (1, 2, 2, 2, 3, 4), "Japanese": (1, 2, 2, 3, 3, 4), "Korean": (1, 2, 2, 3, 3, 4)}.get(
        name, (2, 3, 4, 5, 6, 8))
    drawn = np.searchsorted(weights / weights[-1], rng.random((size, 8))).tolist()
    chosen = rng.choice(lengths, size).tolist()
    for rank, (numbers, length) in enumerate(zip(drawn, chosen, strict=True)):
        yield "".join(letters[number] for number in numbers[: length if rank > 40 else lengths[0]])


@dataclass(frozen=True, slots=True)
class TextArticle:
    """An article of a corpus."""

    title: str
    language: str
    paragraphs: tuple[tuple[str, str], ...]  # section and text


def articles(languages: Sequence[str], paragraphs: int, vocabulary: int, seed: int = 0) -> Iterator[TextArticle]:
    """Yield articles with that many paragraphs in total, in turns of the languages."""
    known = [Language.make(name, vocabulary, seed) for name in languages]
    rng = np.random.default_rng((seed, 100))
    for number in range(paragraphs // PARAGRAPHS):
        language = known[number % len(known)]
        words = language.words[200 + number % 5_000], language.words[number * 7 % len(language.words)]
        title = (" " if language.name in BLANKS else "").join(words).title()
        texts = tuple((section, language.paragraph(rng)) for section in SECTIONS)
        yield TextArticle(f"{title} {number}", language.name, texts)
