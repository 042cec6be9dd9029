"""The arguments of a template as its renderer sees them, and the marks that renderers leave in the text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from gog_edge.indexing.sources.mediawiki.site import Site
from gog_edge.indexing.sources.mediawiki.vocabulary import phrases

# Marks in the flattened text of a page. XML 1.0 has no such characters, so no page contains them.
HOLE = "\x01"  # something that a reader sees is missing here
GONE = "\x02"  # something was left out that the sentence does not need
ITEM = "\x03"  # a list item begins
BOX = "\x04"  # an unknown template of several lines
SPOKEN = "\x05"  # phonetic signs were left out: a hole unless it stands in parentheses
MARKS = HOLE + GONE + ITEM + BOX + SPOKEN


class Arguments:
    """The arguments of one template. Texts are flattened when they are asked for, and may contain marks."""

    def __init__(self, template: Any, flatten: Callable[[Any], str], site: Site) -> None:
        """Take a template node, and the function that returns the visible text of wikicode."""
        self.site = site
        self._flatten = flatten
        self._values: dict[str, Any] = {str(param.name).strip(): param.value for param in template.params}
        self._texts: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        """Return whether an argument of this name is given, even if it is empty."""
        return name in self._values

    def get(self, *names: str | int) -> str:
        """Return the text of the first argument of these names that is not empty, without white space around it."""
        for name in map(str, names):
            if name not in self._values:
                continue
            if name not in self._texts:
                self._texts[name] = self._flatten(self._values[name]).strip()
            if self._texts[name]:
                return self._texts[name]
        return ""

    def positional(self, start: int = 1) -> list[str]:
        """Return the texts of the arguments numbered from `start` on, up to the first missing one."""
        texts = []
        while str(start) in self._values:
            texts.append(self.get(start))
            start += 1
        return texts

    def named(self) -> dict[str, str]:
        """Return the texts of the arguments with names that are not numbers."""
        return {name: self.get(name) for name in self._values if not name.isdecimal()}


Renderer: TypeAlias = Callable[[Arguments], str | None]  # None: cannot be rendered


def by_name(*rows: tuple[Renderer, str]) -> dict[str, Renderer]:
    """Return renderers by the names of templates, which are given in lower case, separated by commas."""
    return {name: renderer for renderer, names in rows for name in phrases(names)}
