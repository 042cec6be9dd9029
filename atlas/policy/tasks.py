"""The training tasks of the decoder: copying drills, reading, language without pictures, grounding, whole episodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import numpy as np

from atlas.countries import SEARCH_WORDS, fact_value, sentence
from atlas.policy.batches import AttentionTarget, TokenizedTrajectory, TrajectoryTokenizer
from atlas.policy.pool import Shard
from atlas.policy.teacher import Scene, Teacher, Turn, scene_of
from atlas.policy.worlds import Names, make_world
from atlas.questions import PLACES, SINGLE, SINGLE_FACTS, TEXT_FACTS, ask_fact, ask_fact_of, pick
from gog_edge.policy.dialect.actions import ShownImages
from gog_edge.policy.dialect.dialect import Dialect
from gog_edge.types import Action, Answer, GazeSearch, Size, TextSearch

Task: TypeAlias = Literal["drill", "copy", "language", "ground", "episodes"]
QUESTIONS_PER_PICTURE = 6


class TaskSampler:
    """Samples training trajectories from pictures of the pool and fictional worlds."""

    def __init__(self, tokenizer: TrajectoryTokenizer, dialect: Dialect, names: Names, seed: int) -> None:
        self._rng = np.random.default_rng([seed, 31])
        self._teacher = Teacher(dialect, self._rng)
        self._tokenizer, self._dialect, self._names = tokenizer, dialect, names
        self._frame = ShownImages(Size(1, 1), Size(1, 1))  # for actions without a box

    def batch(self, shard: Shard, tasks: Sequence[Task]) -> list[TokenizedTrajectory]:
        """Return one trajectory for each picture; `tasks` has one entry per picture."""
        return [self._sample(scene, task) for scene, task in zip(_scenes(shard), tasks, strict=True)]

    def _sample(self, scene: Scene, task: Task) -> TokenizedTrajectory:
        if task == "drill":
            return self._drill()
        if task == "copy":
            return self._tokenizer.encode(
                self._repetition() if self._rng.random() < 0.4 else self._reading(), pictures=False
            )
        if task == "ground" and (scene.relations or len(scene.boxes) == 1):
            return self._tokenizer.encode(self._grounding(scene))
        turns = self._teacher.trajectory(scene, make_world(self._rng, self._names))
        return self._tokenizer.encode(turns, pictures=task != "language")

    def _grounding(self, scene: Scene) -> list[Turn]:
        """Ask several questions about one picture, each answered by a gaze; the picture is encoded only once."""
        teacher, turns = self._teacher, []
        teacher.begin(scene)
        names = list(scene.relations)
        for count in range(QUESTIONS_PER_PICTURE if names else 1):
            relation = names[int(self._rng.integers(len(names)))] if names else ""
            question = pick(self._rng, PLACES[relation] if names else SINGLE)
            if self._rng.random() < 0.4:  # else the place alone, which is shorter and leaves room for more pictures
                question = ask_fact(self._rng, str(self._rng.choice(SINGLE_FACTS)), question)
            segments = self._dialect.render_question(scene.picture, question)
            turns.append(Turn("user", segments if count == 0 else segments[1:]))
            action = GazeSearch(teacher.snap(scene.boxes[scene.relations[relation] if names else 0]))
            reason = teacher.place_reason(relation) if names else "Weak. I look closer."
            turns.append(Turn("assistant", (teacher.render(action, reason),), learn=True, gaze_box=action.box))
        return turns

    def _drill(self) -> TokenizedTrajectory:
        """Repeat random tokens, as a whole or as values of keys, which trains induction heads in many short steps."""
        rng, vocabulary = self._rng, self._tokenizer.vocabulary
        out = TokenizedTrajectory(start=int(rng.integers(200)))
        if rng.random() < 0.5:
            tokens = rng.integers(0, vocabulary, int(rng.integers(6, 97))).tolist()
            out.add(tokens)
            out.add(tokens, learn=True)
            out.copy_targets += [AttentionTarget((len(tokens) + k - 1,), (k,)) for k in range(1, len(tokens))]
            return out
        pairs = [
            (rng.integers(0, vocabulary, int(rng.integers(1, 4))).tolist(),
             rng.integers(0, vocabulary, int(rng.integers(1, 4))).tolist())
            for _ in range(int(rng.integers(2, 25)))
        ]  # fmt: skip
        starts = []
        for key, value in pairs:
            starts.append(len(out.ids) + len(key))
            out.add(key + value)
        for index in rng.permutation(len(pairs)):
            key, value = pairs[index]
            out.add(key)
            first, start = len(out.ids) - 1, starts[index]
            out.copy_targets += [AttentionTarget((first + k,), (start + k,)) for k in range(len(value))]
            out.add(value, learn=True)
        return out

    def _repetition(self) -> list[Turn]:
        """Repeat a list of names and numbers."""
        rng, places = self._rng, self._names.places
        text = ", ".join(
            f"{places[int(rng.integers(len(places)))]} {int(10 ** rng.uniform(0, 7)):,}"
            for _ in range(int(rng.integers(4, 11)))
        )
        return [Turn("user", (" " + text,)), Turn("assistant", (" " + text,), True, copied=(text,))]

    def _reading(self) -> list[Turn]:
        """Show several articles, then ask questions that are answered from a paragraph or by a search."""
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
            text = dialect.render_action(action, self._frame)
            turns.append(Turn("assistant", (text,), learn=True, copied=(copied,)))
        return turns


def _scenes(shard: Shard) -> Iterator[Scene]:
    for row in range(len(shard)):
        yield scene_of(shard.pictures[row], shard.boxes[row], int(shard.counts[row]), shard.relations[row])
