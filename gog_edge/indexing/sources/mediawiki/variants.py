"""Chooses one variant of the language-variant markup `-{...}-` of Chinese, Serbian and others.

Syntax: https://www.mediawiki.org/wiki/Writing_systems/Syntax. Only the markup is resolved; text outside of it is not
converted between scripts.
"""

from __future__ import annotations

import re

# Languages that MediaWiki converts, with their variants in the order in which one takes the place of another.
_VARIANTS = {
    "zh": "zh-hans zh-cn zh-hant zh-tw zh-hk zh-mo zh-sg zh-my zh", "gan": "gan-hans gan-hant gan",
    "wuu": "wuu-hans wuu-hant wuu", "sr": "sr-ec sr-el sr", "sh": "sh-latn sh-cyrl sh",
    "kk": "kk-cyrl kk-latn kk-arab kk-kz kk-tr kk-cn kk", "ku": "ku-latn ku-arab ku", "uz": "uz-latn uz-cyrl uz",
    "tg": "tg-latn tg", "tly": "tly tly-cyrl", "crh": "crh-latn crh-cyrl crh", "shi": "shi-tfng shi-latn shi",
    "iu": "ike-cans ike-latn iu", "ban": "ban ban-bali", "mni": "mni mni-beng",
}  # fmt: skip
# What stands in for a variant that a page does not give, nearest first (MediaWiki's fallbacks).
_FALLBACKS = {
    "zh-cn": "zh-hans zh-sg zh-my", "zh-sg": "zh-hans zh-cn zh-my", "zh-my": "zh-hans zh-sg zh-cn",
    "zh-hans": "zh-cn zh-sg zh-my", "zh-hant": "zh-tw zh-hk zh-mo", "zh-tw": "zh-hant zh-hk zh-mo",
    "zh-hk": "zh-hant zh-mo zh-tw", "zh-mo": "zh-hant zh-hk zh-tw",
}  # fmt: skip
_OPEN_OR_CLOSE = re.compile(r"-\{(?!\{(?!\{))|(?:(?<!\})|(?<=\}\}))\}-(?!\})")  # neither `-{{` nor `}}-`
_CODE = r"[a-zA-Z]{2,3}(?:-[a-zA-Z]+)*"
_RULE = re.compile(rf"\s*(?:(?P<source>[^=]*?)=>\s*)?(?P<code>{_CODE})\s*:(?!//)(?P<text>.*)", re.DOTALL)
_NEXT_RULE = re.compile(rf";\s*(?=(?:[^;=]*=>\s*)?{_CODE}\s*:)")
_FLAG = rf"(?:[A-Z+\-]|{_CODE})"
_FLAGS = re.compile(rf"\s*{_FLAG}(?:\s*;\s*{_FLAG})*\s*;?\s*|\s*")
_NESTED = re.compile(r"\{\{[^{}]*\}\}|\[\[[^\[\]]*\]\]")
_CERTAIN = re.compile(r"-\{[^{}]*?\b(?:zh|sr|gan|kk|uz|ku|crh)-[a-z]+\s*:")  # cannot be anything else in any wiki
# Codes of the same variants in newer pages.
_BCP47 = {"zh-hans-cn": "zh-cn", "zh-hant-tw": "zh-tw", "zh-hant-hk": "zh-hk", "zh-hant-mo": "zh-mo",
          "zh-hans-sg": "zh-sg", "zh-hans-my": "zh-my", "sr-cyrl": "sr-ec", "sr-latn": "sr-el"}  # fmt: skip
_HIDDEN_FLAGS = frozenset("HT-")
_MAX_DEPTH = 20


def resolve_variants(text: str, language: str, variant: str = "") -> str:
    """Replace the variant markup of a page by the text of one variant.

    Args:
        text: wikitext.
        language: code of the wiki's language. Markup without variants, `-{x}-`, is literal in other languages.
        variant: the wanted variant; the first one of the language by default.
    """
    base = language.split("-")[0] if language not in _VARIANTS else language
    if "-{" not in text or (base not in _VARIANTS and not _CERTAIN.search(text)):
        return text
    wanted = _order(base, variant)
    if base in _VARIANTS:
        return _resolve(text, wanted)
    return re.sub(r"-\{[^{}]*\}-", lambda found: _choose(found[0][2:-2],
        wanted) if _CERTAIN.match(found[0]) else found[0], text)


def _order(language: str, variant: str) -> list[str]:
    base = language if language in _VARIANTS else "zh"
    known = _VARIANTS[base].split()
    first = _BCP47.get(variant, variant) or known[0]
    return list(dict.fromkeys((first, *_FALLBACKS.get(first, "").split(), base, *known)))


def _resolve(text: str, wanted: list[str]) -> str:
    """Replace from the inside out, matching each `}-` with the nearest open `-{`."""
    parts: list[list[str]] = [[]]
    at = 0
    for mark in _OPEN_OR_CLOSE.finditer(text):
        opening = mark[0] == "-{"
        if (opening and len(parts) > _MAX_DEPTH) or (not opening and len(parts) == 1):
            continue
        parts[-1].append(text[at : mark.start()])
        at = mark.end()
        if opening:
            parts.append([])
        else:
            inner = "".join(parts.pop())
            parts[-1].append(_choose(inner, wanted))
    parts[-1].append(text[at:])
    return "-{".join("".join(part) for part in parts)  # those that are never closed stay


def _choose(inner: str, wanted: list[str]) -> str:
    """Return the text that the inside of a `-{...}-` displays."""
    flags, text = "", inner
    head, bar, rest = _hide(inner).partition("|")
    if bar and _FLAGS.fullmatch(head):
        flags, text = inner[: len(head)], inner[len(head) + 1 :]
    given = {flag.strip() for flag in flags.split(";")}
    if given & _HIDDEN_FLAGS:
        return ""
    if "R" in given:
        return text
    rules = _rules(text)
    if not rules:
        return text
    return next((rules[code] for code in wanted if code in rules), next(iter(rules.values())))


def _hide(text: str) -> str:
    """Return the text with links and templates blanked out, of the same length."""
    return _NESTED.sub(lambda found: " " * len(found[0]), text)


def _rules(text: str) -> dict[str, str]:
    """Return the text of each variant; empty if the text has no rules."""
    rules = dict[str, str]()
    shadow, start, pieces = _hide(text), 0, list[str]()
    for cut in _NEXT_RULE.finditer(shadow):
        pieces.append(text[start : cut.start()])
        start = cut.end()
    for piece in (*pieces, text[start:]):
        if not piece.strip():
            continue
        found = _RULE.fullmatch(piece)
        if found is None:
            return {}
        code = found["code"].lower()
        rules.setdefault(_BCP47.get(code, code), found["text"].strip().removesuffix(";").strip())
    return rules
