"""The teacher: writes trajectories for supervised fine-tuning from the ground truth of a scene.

Some trajectories contain wrong gazes followed by reflection. Search results are generated as `types.SearchResult` and
rendered by the dialect, as in the agent loop. The texts are part of the training data: do not edit them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atlas.countries import FACTS, SEARCH_WORDS, Country, article, fact_value
from atlas.policy.worlds import World
from atlas.questions import (
    BORDERING,
    CAPITAL_OF,
    COUNT,
    KINDS,
    LARGER,
    PLACES,
    SAME_CURRENCY,
    SIDES,
    SINGLE,
    SINGLE_FACTS,
    TEXT_FACTS,
    ask_about_other,
    ask_fact,
    ask_fact_of,
    ask_hop,
    pick,
)
from atlas.scenes import RELATIONS
from gog_edge.policy.dialect.actions import ShownImages
from gog_edge.policy.dialect.dialect import Dialect, TurnPart
from gog_edge.types import (
    Action,
    Answer,
    Box,
    Evidence,
    GazeSearch,
    ImageSearch,
    Observation,
    Passage,
    Pixels,
    SearchResult,
    Size,
    TextSearch,
)

BOX_GRID = 7  # pixels, a quarter of a merged token; the model is too small to learn finer coordinates
KIND_WEIGHTS = dict(zip(KINDS, (0.12, 0.11, 0.22, 0.18, 0.11, 0.16, 0.10), strict=True))


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture in the policy's resolution with its ground truth."""

    picture: Pixels
    boxes: tuple[Box, ...]  # of the flags, in pixels
    relations: dict[str, int]  # index of the flag that each place word refers to


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a trajectory."""

    role: str  # "user" or "assistant"
    segments: tuple[TurnPart, ...]
    learn: bool = False  # whether the policy is trained to write this turn
    gaze_box: Box | None = None  # the box of a gaze
    copied: tuple[str, ...] = ()  # words of an assistant turn that occur earlier in the trajectory


class Teacher:
    """Writes trajectories about a scene and a fictional world."""

    def __init__(self, dialect: Dialect, rng: np.random.Generator) -> None:
        self.dialect = dialect
        self.rng = rng

    # --- one trajectory -----------------------------------------------------------------------

    def trajectory(self, scene: Scene, world: World, kind: str | None = None) -> list[Turn]:
        """Write a trajectory about the first country of the world; without `kind`, sample one that fits the scene."""
        self.begin(scene)
        self.world, self.asked = world, world.countries[0]
        kind = kind or self._draw_kind()
        getattr(self, f"_{kind}")()
        return self.turns

    def begin(self, scene: Scene) -> None:
        """Begin a trajectory about a picture. Boxes are written in its pixels."""
        self.scene = scene
        self.turns: list[Turn] = []
        size = Size(scene.picture.shape[1], scene.picture.shape[0])
        self.frame = ShownImages(size, size)

    def _draw_kind(self) -> str:
        several = bool(self.scene.relations)
        allowed = {
            "glance": True, "text": True, "two_hops": several, "gaze": several, "invented": True,
            "whole": len(self.scene.boxes) == 1,
            "reflect": several,
        }  # fmt: skip
        if len(self.scene.boxes) == 1:  # rare in the pool, and the only scenes for "whole"
            return str(self.rng.choice(["whole", "whole", "glance", "text", "invented"]))
        kinds = [kind for kind in KINDS if allowed[kind]]
        weights = np.array([KIND_WEIGHTS[kind] for kind in kinds])
        return str(self.rng.choice(kinds, p=weights / weights.sum()))

    # --- kinds --------------------------------------------------------------------------------

    def _glance(self) -> None:
        meant, options = self.scene.relations, []
        if len(self.scene.boxes) == 2:
            options = [axis for axis, sides in SIDES.items() if "largest" in meant and all(s in meant for s in sides)]
        if options and self.rng.random() < 0.7:
            axis = str(self.rng.choice(options))
            answer = next(word for side, word in SIDES[axis].items() if meant[side] == meant["largest"])
            self._ask(pick(self.rng, LARGER[axis]))
        else:
            answer = str(len(self.scene.boxes))
            self._ask(pick(self.rng, COUNT))
        self._answer("I see it.", answer)

    def _whole(self) -> None:
        fact = self._fact(SINGLE_FACTS)
        self._ask(ask_fact(self.rng, fact, pick(self.rng, SINGLE)))
        self._say("One flag fills it.", ImageSearch())
        if self.rng.random() < 0.2:
            self._observe(self._weak_match())
            self._gaze_at(0, "Weak. I look closer.")
            self._observe(self._strong_match(self.asked, fact), self._crop(0))
        else:
            self._observe(self._strong_match(self.asked, fact))
        self._answer_fact(fact)

    def _gaze(self) -> None:
        relation, index = self._place()
        fact = self._fact(SINGLE_FACTS)
        self._ask(ask_fact(self.rng, fact, pick(self.rng, PLACES[relation])))
        self._first_gaze(relation, index)
        self._observe(self._strong_match(self.asked, fact), self._crop(index))
        self._answer_fact(fact)

    def _two_hops(self) -> None:
        relation, index = self._place()
        place = pick(self.rng, PLACES[relation])
        if self.rng.random() < 0.5:
            self._ask(ask_hop(self.rng, BORDERING, place))
            self._first_gaze(relation, index)
            self._observe(self._strong_match(self.asked, "neighbours", also="capital"), self._crop(index))
            neighbour = self._country(self.asked.neighbours[0])
            query = TextSearch(f"capital of {neighbour.name}")
            self._say(f"A neighbour is {neighbour.name}.", query, neighbour.name)
            self._observe(self._article(neighbour, "capital"))
            self._answer("Found.", neighbour.capital, neighbour.capital)
            return
        self._ask(ask_hop(self.rng, SAME_CURRENCY, place))
        self._first_gaze(relation, index)
        self._observe(self._strong_match(self.asked, "currency"), self._crop(index))
        money = f"{self.asked.currency} ({self.asked.currency_code})"
        self._say(f"The currency is the {money}.", TextSearch(f"currency {money}"), money.rstrip(")"))
        users = [c for c in self.world.countries if c.currency_code == self.asked.currency_code]
        shown = [users[int(k)] for k in self.rng.permutation(len(users))[:3]]
        if all(c.iso == self.asked.iso for c in shown):
            shown[0] = self.world.countries[1]
        self._observe(self._several_articles(shown, "currency"))
        other = next(c for c in shown if c.iso != self.asked.iso)
        self._answer(f"Not {self.asked.name}.", other.name, self.asked.name, other.name)

    def _text(self) -> None:
        if self.rng.random() < 0.25:
            self._ask(pick(self.rng, CAPITAL_OF).format(c=self.asked.capital))
            self._say("I need no picture.", TextSearch(f"capital {self.asked.capital}"), self.asked.capital)
            shown = (self.asked, *self.world.countries[3:5])
            self._observe(self._several_articles([shown[int(k)] for k in self.rng.permutation(3)], "capital"))
            self._answer("Found.", self.asked.name, self.asked.name)
            return
        fact = self._fact(TEXT_FACTS)
        self._ask(ask_fact_of(self.rng, fact, self.asked.name))
        query = TextSearch(f"{SEARCH_WORDS[fact]} of {self.asked.name}")
        self._say("I need no picture.", query, self.asked.name)
        if self.rng.random() < 0.08:
            self._observe(self._weak_match())
            self._answer("Weak.", self.dialect.not_found)
            return
        self._observe(self._article(self.asked, fact))
        self._answer_fact(fact)

    def _reflect(self) -> None:
        if len(self.scene.boxes) != 2 or "left1" not in self.scene.relations:
            self._gaze_again()
            return
        fact = self._fact(SINGLE_FACTS)
        known = self.world.countries[2]
        self._ask(ask_about_other(self.rng, known.name, fact))
        left, right = self.scene.relations["left1"], self.scene.relations["right1"]
        self._gaze_at(left, "I look at the left one.")
        if self.rng.random() < 0.5:
            self._observe(self._strong_match(self.asked, fact), self._crop(left))
            self._answer_fact(fact, f"This is {self.asked.name}.", self.asked.name)
            return
        self._observe(self._strong_match(known, fact), self._crop(left))
        self._gaze_at(right, f"This is {known.name}. I look at the other one.", known.name)
        self._observe(self._strong_match(self.asked, fact), self._crop(right))
        self._answer_fact(fact)

    def _gaze_again(self) -> None:
        relation, index = self._place()
        fact = self._fact(SINGLE_FACTS)
        self._ask(ask_fact(self.rng, fact, pick(self.rng, PLACES[relation])))
        self._wrong_gaze(relation, index)
        self._gaze_at(index, "Weak. I look again.")
        self._observe(self._strong_match(self.asked, fact), self._crop(index))
        self._answer_fact(fact)

    def _invented(self) -> None:
        fact = self._fact(SINGLE_FACTS)
        if len(self.scene.boxes) == 1 or not self.scene.relations:
            index = 0
            self._ask(ask_fact(self.rng, fact, pick(self.rng, SINGLE)))
            self._say("One flag fills it.", ImageSearch())
            self._observe(self._weak_match())
            self._gaze_at(index, "Weak. I look closer.")
            self._observe(self._weak_match(), self._crop(index))
        else:
            relation, index = self._place()
            self._ask(ask_fact(self.rng, fact, pick(self.rng, PLACES[relation])))
            self._gaze_at(index, self.place_reason(relation))
            self._observe(self._weak_match(), self._crop(index))
            self._gaze_at(index, "Weak. I look again.")
            cached = self.rng.random() < 0.7  # the loop shows no new crop for a gaze at the same place
            self._observe(self._weak_match(cached), None if cached else self._crop(index))
        self._answer("Weak again.", self.dialect.not_found)

    # --- parts of a trajectory ----------------------------------------------------------------

    def _ask(self, question: str) -> None:
        self.turns.append(Turn("user", self.dialect.render_question(self.scene.picture, question)))

    def _say(self, reason: str, action: Action, *copied: str, learn: bool = True) -> None:
        """Append an assistant turn, rarely after a malformed turn and its correction."""
        if self.rng.random() < 0.015:
            self.turns.append(Turn("assistant", (reason,)))
            notice = Observation(notice="malformed", detail="it contains no action")
            self.turns.append(Turn("user", self.dialect.render_observation(notice)))
        gaze_box = action.box if isinstance(action, GazeSearch) else None
        self.turns.append(Turn("assistant", (self.render(action, reason),), learn, gaze_box, copied))

    def render(self, action: Action, reason: str) -> str:
        """Return the text of an assistant turn."""
        return self.dialect.render_action(action, self.frame, reason)

    def _observe(self, result: SearchResult, crop: Pixels | None = None) -> None:
        observation = Observation(result=result, crop=crop)
        self.turns.append(Turn("user", self.dialect.render_observation(observation)))

    def _answer(self, reason: str, text: str, *copied: str) -> None:
        # When the budget is spent, the runtime forces the answer without a reason.
        self._say("" if self.rng.random() < 0.08 else reason, Answer(text), *copied)

    def _answer_fact(self, fact: str, reason: str = "Found.", *copied: str) -> None:
        value = self.asked.name if fact == "name" else fact_value(self.asked, fact, self.world.names)
        self._answer(reason, value, value, *copied)

    def _fact(self, facts: Sequence[str]) -> str:
        return str(self.rng.choice(list(facts)))

    def _place(self) -> tuple[str, int]:
        names = list(self.scene.relations)
        relation = names[int(self.rng.integers(len(names)))]
        return relation, self.scene.relations[relation]

    def place_reason(self, relation: str) -> str:
        """Return the place as a reason in plain words; a policy that writes it first finds the place more easily."""
        return PLACES[relation][0].removeprefix("the ").capitalize() + "."

    def _first_gaze(self, relation: str, index: int) -> None:
        if self.rng.random() < 0.15:
            self._wrong_gaze(relation, index)
            self._gaze_at(index, "Weak. I look again.")
        else:
            self._gaze_at(index, self.place_reason(relation))

    def _gaze_at(self, index: int, reason: str, *copied: str) -> None:
        self._say(reason, GazeSearch(self.snap(self.scene.boxes[index])), *copied)

    def _wrong_gaze(self, relation: str, index: int) -> None:
        """Gaze at another flag, or next to the right one, without training on it."""
        box = self.scene.boxes[index]
        others = [other for k, other in enumerate(self.scene.boxes) if k != index]
        if others and self.rng.random() < 0.35:
            box = others[int(self.rng.integers(len(others)))]
        else:
            dx, dy = self.rng.uniform(0.3, 0.8, 2) * self.rng.choice([-1, 1], 2) * (box.width, box.height)
            box = Box(box.x0 + dx, box.y0 + dy, box.x1 + dx, box.y1 + dy)
        wrong = self.snap(box)
        self._say(self.place_reason(relation), GazeSearch(wrong), learn=False)
        self._observe(self._weak_match(), self._cut(wrong))

    def _clamp(self, box: Box) -> Box:
        width, height = self.frame.given.width, self.frame.given.height
        x0, y0 = min(max(box.x0, 0), width - 28), min(max(box.y0, 0), height - 28)
        return Box(x0, y0, min(max(box.x1, x0 + 28), width), min(max(box.y1, y0 + 28), height))

    def snap(self, box: Box) -> Box:
        """Return the box clamped to the picture and rounded to multiples of BOX_GRID pixels."""
        box = self._clamp(box)
        return Box(*(round(value / BOX_GRID) * BOX_GRID for value in (box.x0, box.y0, box.x1, box.y1)))

    def _crop(self, index: int) -> Pixels:
        return self._cut(self.snap(self.scene.boxes[index]))

    def _cut(self, box: Box) -> Pixels:
        return self.scene.picture[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)]

    # --- generated search results -------------------------------------------------------------

    def _country(self, iso: str) -> Country:
        return next(country for country in self.world.countries if country.iso == iso)

    def _paragraphs(self, country: Country) -> dict[str, str]:
        return {paragraph.fact: paragraph.text for paragraph in article(country, self.world.names)}

    def _strong_match(self, country: Country, fact: str, also: str = "") -> SearchResult:
        """Return a strong match: the article, mostly with the wanted paragraphs alone, then two other names."""
        if self.rng.random() < 0.1:
            return self._shared_flag(country, fact)
        keys = self._ranked_facts(country, [fact, also], extra=int(self.rng.choice(3, p=(0.7, 0.15, 0.15))))
        best = Evidence((country.name,), self._passages(country, keys), None, 0.9)
        return SearchResult((best, *self._other_names()), float(self.rng.uniform(0.6, 1)))

    def _shared_flag(self, country: Country, fact: str) -> SearchResult:
        """Return a strong match of a flag that several countries use: all names, with a paragraph of each.

        The answer is that of the first country.
        """
        sharing = [country, *self.world.countries[3 : 3 + int(self.rng.integers(1, 4))]]
        key = fact if fact in FACTS else "continent"
        passages = [self._passages(one, self._ranked_facts(one, [key], extra=0))[0] for one in sharing[:3]]
        best = Evidence(tuple(one.name for one in sharing), tuple(passages), None, 0.9)
        return SearchResult((best, *self._other_names()), float(self.rng.uniform(0.6, 1)))

    def _ranked_facts(self, country: Country, wanted: Sequence[str], extra: int) -> list[str]:
        """Return the wanted facts that the article has, else its first, and `extra` others; rarely in random order."""
        texts = self._paragraphs(country)
        keys = [key for key in wanted if key in texts] or ["continent"]
        others = [key for key in FACTS if key in texts and key not in keys]
        keys += [others[int(k)] for k in self.rng.permutation(len(others))[: min(extra, 3 - len(keys))]]
        if self.rng.random() < 0.15 or len([key for key in wanted if key]) > 1:
            keys = [keys[int(k)] for k in self.rng.permutation(len(keys))]
        return keys

    def _passages(self, country: Country, keys: Sequence[str]) -> tuple[Passage, ...]:
        texts = self._paragraphs(country)
        return tuple(Passage("atlas", country.name, "", 0, texts[key], "") for key in keys)

    def _weak_match(self, cached: bool = False) -> SearchResult:
        """Return a weak match: three names without passages."""
        return SearchResult(tuple(self._other_names(3)), float(self.rng.uniform(0, 0.4)), cached)

    def _other_names(self, count: int = 2) -> list[Evidence]:
        return [Evidence((c.name,), (), None, 0.3) for c in self.world.countries[5 : 5 + count]]

    def _article(self, country: Country, fact: str) -> SearchResult:
        """Return the result of a text search about one country: its article mostly first, then two other names."""
        keys = self._ranked_facts(country, [fact], extra=int(self.rng.choice(3, p=(0.3, 0.2, 0.5))))
        best = Evidence((country.name,), self._passages(country, keys), None, 0.5)
        if self.rng.random() < 0.85:
            return SearchResult((best, *self._other_names()), float(self.rng.uniform(0.6, 1)))
        return self._several_articles([country, *self.world.countries[3:5]], fact)

    def _several_articles(self, countries: Sequence[Country], fact: str) -> SearchResult:
        """Return the result of a text search that matches several articles, with one paragraph of each."""
        found = [Evidence((c.name,), self._passages(c, self._ranked_facts(c, [fact], 0)), None, 0.5) for c in countries]
        return SearchResult(tuple(found), float(self.rng.uniform(0.6, 1)))


def scene_of(picture: Pixels, boxes: np.ndarray, count: int, meant: np.ndarray) -> Scene:
    """Return the scene in a row of a pool shard."""
    return Scene(
        picture,
        tuple(Box(*(float(v) for v in row)) for row in boxes[:count]),
        {name: int(index) for name, index in zip(RELATIONS, meant, strict=True) if index >= 0},
    )

