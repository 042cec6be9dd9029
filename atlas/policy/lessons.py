"""What the decoder is taught, batch by batch: copying, language without pictures, grounding, whole episodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import numpy as np

from atlas.articles import SEARCH_WORDS, fact_value, sentence
from atlas.policy.batches import Encoded, Encoder, Look
from atlas.policy.pool import Shard
from atlas.policy.teacher import Scene, Teacher, Turn, scene_of
from atlas.policy.worlds import Names, make_world
from atlas.questions import PLACES, SINGLE, SINGLE_FACTS, TEXT_FACTS, ask_fact, ask_fact_of, pick
from gog_edge.policy.dialect.actions import Frame
from gog_edge.policy.dialect.dialect import Dialect
from gog_edge.types import Action, Answer, GazeSearch, Size, TextSearch

Lesson: TypeAlias = Literal["drill", "copy", "language", "ground", "episodes"]
QUESTIONS_PER_PICTURE = 6


class Lessons:
    """Makes lessons from pool pictures and made-up worlds."""

    def __init__(self, encoder: Encoder, dialect: Dialect, names: Names, seed: int) -> None:
        self._vocabulary = encoder.vocabulary
        self._rng = np.random.default_rng([seed, 31])
        self._teacher = Teacher(dialect, self._rng)
        self._encoder, self._dialect, self._names = encoder, dialect, names
        self._frame = Frame(Size(1, 1), Size(1, 1))  # where no box is written

    def batch(self, shard: Shard, lessons: Sequence[Lesson]) -> list[Encoded]:
        """One trajectory for each picture."""
        return [self._one(scene, lesson) for scene, lesson in zip(_scenes(shard), lessons, strict=True)]

    def _one(self, scene: Scene, lesson: Lesson) -> Encoded:
        if lesson == "drill":
            return self._drill()
        if lesson == "copy":
            return self._encoder.encode(
                self._repeating() if self._rng.random() < 0.4 else self._reading(), pictures=False
            )
        if lesson == "ground" and (scene.relations or len(scene.boxes) == 1):
            return self._encoder.encode(self._pointing(scene))
        turns = self._teacher.trajectory(scene, make_world(self._rng, self._names))
        return self._encoder.encode(turns, pictures=lesson != "language")

    def _pointing(self, scene: Scene) -> list[Turn]:
        """Many questions about one picture, each answered by a look: the picture is encoded once for all."""
        teacher, turns = self._teacher, []
        teacher.begin(scene)
        names = list(scene.relations)
        for count in range(QUESTIONS_PER_PICTURE if names else 1):
            relation = names[int(self._rng.integers(len(names)))] if names else ""
            question = pick(self._rng, PLACES[relation] if names else SINGLE)
            if self._rng.random() < 0.4:  # mostly the place alone: short, so that more pictures are seen
                question = ask_fact(self._rng, str(self._rng.choice(SINGLE_FACTS)), question)
            segments = self._dialect.render_question(scene.picture, question)
            turns.append(Turn("user", segments if count == 0 else segments[1:]))
            action = GazeSearch(teacher.snapped(scene.boxes[scene.relations[relation] if names else 0]))
            reason = teacher.where(relation) if names else "Weak. I look closer."
            turns.append(Turn("assistant", (teacher.written(action, reason),), learn=True, looks_at=action.box))
        return turns

    def _drill(self) -> Encoded:
        """Meaningless tokens said again, all in order or key by key: many short steps form the copying circuit."""
        rng = self._rng
        out = Encoded(start=int(rng.integers(200)))
        if rng.random() < 0.5:
            said = rng.integers(0, self._vocabulary, int(rng.integers(6, 97))).tolist()
            out.add(said)
            out.add(said, learn=True)
            out.copies += [Look((len(said) + k - 1,), (k,)) for k in range(1, len(said))]
            return out
        pairs = [
            (rng.integers(0, self._vocabulary, int(rng.integers(1, 4))).tolist(),
             rng.integers(0, self._vocabulary, int(rng.integers(1, 4))).tolist())
            for _ in range(int(rng.integers(2, 25)))
        ]  # fmt: skip
        stands = []
        for key, value in pairs:
            stands.append(len(out.ids) + len(key))
            out.add(key + value)
        for index in rng.permutation(len(pairs)):
            key, value = pairs[index]
            out.add(key)
            out.copies += [Look((len(out.ids) + k - 1,), (stands[index] + k,)) for k in range(len(value))]
            out.add(value, learn=True)
        return out

    def _repeating(self) -> list[Turn]:
        """Names said again: every token of the answer stands in the question."""
        rng, places = self._rng, self._names.places
        said = ", ".join(
            f"{places[int(rng.integers(len(places)))]} {int(10 ** rng.uniform(0, 7)):,}"
            for _ in range(int(rng.integers(4, 11)))
        )
        return [Turn("user", (" " + said,)), Turn("assistant", (" " + said,), True, copies=(said,))]

    def _reading(self) -> list[Turn]:
        """Several articles, then many questions about them, each answered from one paragraph or by a search."""
        rng, dialect = self._rng, self._dialect
        world = make_world(rng, self._names)
        asked = [
            (country, str(fact)) for country in world.countries[:5] for fact in rng.choice(TEXT_FACTS, 2, replace=False)
        ]
        lines = {country.iso: [f"{country.name}:"] for country in world.countries[:5]}
        for country, fact in asked:
            value = fact_value(country, fact, world.names)
            lines[country.iso].append(sentence(country.name, fact, value, code=country.currency_code))
        body = "".join(f"[{n}] {' '.join(line)}\n" for n, line in enumerate(lines.values(), start=1))
        turns = [Turn("user", (dialect.observation.open + body + dialect.observation.close,))]
        for index in rng.permutation(len(asked))[:6]:
            country, fact = asked[int(index)]
            question = ask_fact_of(rng, fact, country.name)
            if rng.random() < 0.6:
                copied = fact_value(country, fact, world.names)
                action: Action = Answer(copied)
            else:
                copied = country.name
                question, action = f"Search: {question}", TextSearch(f"{SEARCH_WORDS[fact]} of {copied}")
            turns.append(Turn("user", (question,)))
            said = dialect.render_action(action, self._frame)
            turns.append(Turn("assistant", (said,), learn=True, copies=(copied,)))
        return turns


def _scenes(shard: Shard) -> Iterator[Scene]:
    for row in range(len(shard)):
        yield scene_of(shard.pictures[row], shard.boxes[row], int(shard.counts[row]), shard.relations[row])
