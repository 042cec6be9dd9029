"""A retriever that knows two of three flags, and what an episode leaves behind."""

from dataclasses import dataclass, field

import numpy as np
from scripted_policy import ScriptedPolicy

from gog_edge.agent.events import Answered
from gog_edge.types import Evidence, ImageQuery, ImageRef, Passage, SearchResult, TextQuery

SKY, RED, GREEN, INVENTED = (120, 160, 220), (200, 0, 0), (0, 160, 0), (90, 0, 90)
FACTS = {
    "Redland": (RED, "Redland is a country in the north.", "The currency of Redland is the rubel."),
    "Greenia": (GREEN, "Greenia is a country in the south.", "The currency of Greenia is the leaf."),
}
GAZE_RED = "<reason>the left one</reason><img_search>[20, 20, 80, 80]</img_search>"
GAZE_GREEN = "<img_search>[120, 20, 180, 80]</img_search>"
GAZE_INVENTED = "<img_search>[220, 20, 280, 80]</img_search>"


def without_timings(events):
    """The events as JSON without durations and trace paths, for comparing two episodes."""

    def strip(value):
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key not in ("ms", "timings_ms", "trace")}
        return [strip(item) for item in value] if isinstance(value, list | tuple) else value

    return [strip(event.to_json()) for event in events]


def answer(text):
    return f"<answer>{text}</answer>"


def evidence(title, passages=()):
    number = list(FACTS).index(title)
    shown = tuple(Passage("test", title, "Facts", 10 * number + n, text, "CC0") for n, text in enumerate(passages))
    return Evidence((title,), shown, ImageRef("test", number, f"Flag of {title}", "MIT", "nobody"), 0.9)


@dataclass
class ColourRetriever:
    """Recognises a flag by the mean colour of the pixels, and an article by its title in the query."""

    queries: list = field(default_factory=list)
    fails_at: int = -1

    def search(self, queries):
        results = []
        for query in queries:
            if len(self.queries) == self.fails_at:
                raise OSError("the disk went away")
            self.queries.append(query)
            results.append(self._image(query) if isinstance(query, ImageQuery) else self._text(query))
        return tuple(results)

    def _image(self, query):
        mean = query.pixels.reshape(-1, 3).mean(axis=0)
        ranked = sorted(FACTS, key=lambda title: np.abs(mean - FACTS[title][0]).sum())
        near = np.abs(mean - FACTS[ranked[0]][0]).sum() < 90
        passages = FACTS[ranked[0]][1:] if "currency" in query.question else FACTS[ranked[0]][1:2]
        return SearchResult((evidence(ranked[0], passages), evidence(ranked[1])), 0.97 if near else 0.08)

    def _text(self, query: TextQuery):
        named = [title for title in FACTS if title.lower() in query.text.lower()]
        return SearchResult(tuple(evidence(title, FACTS[title][1:]) for title in named), 0.9 if named else 0.02)


@dataclass
class Outcome:
    """The events of an episode, with the policy and the retriever that took part."""

    events: list
    policy: ScriptedPolicy
    retriever: ColourRetriever

    @property
    def record(self):
        assert isinstance(self.events[-1], Answered)
        return self.events[-1].record

    @property
    def observations(self):
        return self.policy.observations

    @property
    def actions(self):
        return [step.action for step in self.record.steps]

    @property
    def notices(self):
        return [observation.notice for observation in self.observations if observation.notice]
