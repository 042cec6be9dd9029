"""What the decoder is taught, batch by batch: language without pictures, grounding, whole episodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

import numpy as np

from gog_edge.indexing.atlas.questions import PLACES, SINGLE_FACTS, ask_fact, pick
from gog_edge.policy.dialect import Dialect
from gog_edge.types import GazeSearch
from training.policy.batches import Encoded, Encoder
from training.policy.pool import Shard
from training.policy.teacher import Scene, Teacher, Turn, scene_of
from training.policy.worlds import Names, make_world

Lesson: TypeAlias = Literal["language", "ground", "episodes"]
QUESTIONS_PER_PICTURE = 6


class Lessons:
    """Makes lessons from pool pictures and made-up worlds."""

    def __init__(self, encoder: Encoder, dialect: Dialect, names: Names, seed: int) -> None:
        self._rng = np.random.default_rng([seed, 31])
        self._teacher = Teacher(dialect, self._rng)
        self._encoder, self._dialect, self._names = encoder, dialect, names

    def batch(self, shard: Shard, lesson: Lesson) -> list[Encoded]:
        """One trajectory for each picture."""
        return [self._one(scene, lesson) for scene in _scenes(shard)]

    def _one(self, scene: Scene, lesson: Lesson) -> Encoded:
        if lesson == "ground" and scene.relations:
            return self._encoder.encode(self._pointing(scene))
        turns = self._teacher.trajectory(scene, make_world(self._rng, self._names))
        return self._encoder.encode(turns, pictures=lesson != "language")

    def _pointing(self, scene: Scene) -> list[Turn]:
        """Many questions about one picture, each answered by a look: the picture is encoded once for all."""
        teacher, turns = self._teacher, []
        teacher.begin(scene)
        names = list(scene.relations)
        for count in range(QUESTIONS_PER_PICTURE):
            relation = names[int(self._rng.integers(len(names)))]
            question = pick(self._rng, PLACES[relation])
            if self._rng.random() < 0.4:  # mostly the place alone: short, so that more pictures are seen
                question = ask_fact(self._rng, str(self._rng.choice(SINGLE_FACTS)), question)
            segments = self._dialect.render_question(scene.picture, question)
            turns.append(Turn("user", segments if count == 0 else segments[1:]))
            action = GazeSearch(teacher.snapped(scene.boxes[scene.relations[relation]]))
            turns.append(Turn("assistant", (teacher.written(action, teacher.where(relation)),), learn=True))
        return turns


def _scenes(shard: Shard) -> Iterator[Scene]:
    for row in range(len(shard)):
        yield scene_of(shard.pictures[row], shard.boxes[row], int(shard.counts[row]), shard.relations[row])
