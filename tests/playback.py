"""A runtime for tests of the server and the command line: a policy that plays back a script, over three flags."""

import io
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from gog_edge.bundle import Sample
from gog_edge.config import Limits
from gog_edge.policy.dialect.dialect import LoopRules
from gog_edge.retrieval.text.segment import ImageFile
from gog_edge.runtime import Runtime
from gog_edge.types import (
    Action,
    Answer,
    Box,
    Evidence,
    GazeSearch,
    ImageQuery,
    ImageRef,
    Passage,
    SearchResult,
    Utterance,
)

STRIPES = {
    "France": ((0, 38, 84), (255, 255, 255), (206, 17, 38)),
    "Italy": ((0, 146, 70), (255, 255, 255), (206, 43, 55)),
    "Romania": ((0, 43, 127), (252, 209, 22), (206, 17, 38)),
}
CURRENCY = {"France": "euro", "Italy": "euro", "Romania": "Romanian leu"}
BOXES = {"France": Box(40, 60, 160, 140), "Italy": Box(220, 60, 340, 140), "Romania": Box(400, 60, 520, 140)}
QUESTION = "What is the currency of the country on the right?"

Turn = tuple[str, Action]
SCRIPT: tuple[Turn, ...] = (
    ("<reason>The flag on the right has a blue, a yellow and a red stripe. I look closer.</reason>"
     "<img_search>[400,60,520,140]</img_search>",
     GazeSearch(BOXES["Romania"])),
    ("<reason>This is Romania, and the paragraph names its currency.</reason><answer>The Romanian leu.</answer>",
     Answer("The Romanian leu.")),
)


def flag(name: str, size: tuple[int, int] = (120, 80)) -> Image.Image:
    """A flag of three vertical stripes."""
    stripes = Image.new("RGB", (3, 1))
    stripes.putdata(STRIPES[name])
    return stripes.resize(size, Image.Resampling.NEAREST)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def scene() -> Image.Image:
    """The three flags in a row on grey."""
    picture = Image.new("RGB", (560, 200), (150, 158, 163))
    for name, box in BOXES.items():
        picture.paste(flag(name), (int(box.x0), int(box.y0)))
    return picture


@dataclass
class FixedPacks:
    """A pack registry whose packs never change."""

    retriever: object

    def lease(self):
        return nullcontext(self.retriever)

    def states(self):
        return ()

    def watch(self):
        return nullcontext()

    def request_refresh(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class FlagRetriever:
    """A retriever, and its only pack, that finds the flag with the nearest colours."""

    name: str = "flags"

    @property
    def packs(self) -> dict[str, "FlagRetriever"]:
        return {self.name: self}

    def search(self, queries: Sequence[ImageQuery]) -> tuple[SearchResult, ...]:
        return tuple(self._one(query) for query in queries)

    def image_file(self, image: int) -> ImageFile | None:
        names = list(STRIPES)
        return ImageFile(png(flag(names[image])), "image/png") if 0 <= image < len(names) else None

    def _one(self, query: object) -> SearchResult:
        seen = query.pixels if isinstance(query, ImageQuery) else np.asarray(flag(self._named(query.text)))
        small = np.asarray(Image.fromarray(seen).resize((3, 1), Image.Resampling.BOX), dtype=float)
        far = {name: float(np.abs(small - np.array([stripes])).mean()) for name, stripes in STRIPES.items()}
        order = sorted(far, key=far.get)
        evidence = tuple(self._evidence(name, 1 - far[name] / 255, best=name == order[0]) for name in order)
        return SearchResult(evidence, found=0.97 if far[order[0]] < 40 else 0.08)

    def _named(self, text: str) -> str:
        return next((name for name in STRIPES if name in text), "France")

    def _evidence(self, name: str, score: float, *, best: bool) -> Evidence:
        number = list(STRIPES).index(name)
        text = f"The currency of {name} is the {CURRENCY[name]}."
        passage = Passage(self.name, name, "Money", 10 + number, text, "CC0")
        image = ImageRef(self.name, number, f"The flag of {name}", "CC0", "painted for a test")
        return Evidence((name,), (passage,) if best else (), image, score)


@dataclass
class PlaybackPolicy:
    """A policy that plays back a script; it can be made to wait, and to fail."""

    script: Sequence[Turn] = SCRIPT
    pause_s: float = 0.0  # before each piece of text
    gate: threading.Event | None = None  # waited for before each turn
    fault: Exception | None = None
    name: str = "player"
    rules: LoopRules = LoopRules()
    opened: list["PlaybackConversation"] = field(default_factory=list)

    def begin(self, picture: object, question: str) -> "PlaybackConversation":
        self.opened.append(PlaybackConversation(self, iter(self.script)))
        return self.opened[-1]


@dataclass
class PlaybackConversation:
    """One conversation of a `PlaybackPolicy`."""

    player: PlaybackPolicy
    turns: object
    closed: threading.Event = field(default_factory=threading.Event)

    def generate(self, *, max_tokens: int, deadline: float | None, force_answer: bool = False,
                 on_text: Callable[[str], None] | None = None,
                 on_action: Callable[[Action], None] | None = None) -> Utterance:
        if self.player.fault is not None:
            raise self.player.fault
        if self.player.gate is not None:
            self.player.gate.wait(60)
        text, action = ("", Answer("I cannot tell.")) if force_answer else next(self.turns)
        for word in text.split(" "):
            time.sleep(self.player.pause_s)
            if on_text is not None:
                on_text(word + " ")
        return Utterance(text, action, "", 10, 5, 1.0, 2.0)

    def observe(self, observation: object) -> None:
        pass

    def close(self) -> None:
        self.closed.set()


def playback_runtime(folder: Path, policy: PlaybackPolicy | None = None, **limits: int) -> Runtime:
    """A runtime around a `PlaybackPolicy`, its sample picture in `folder`; keyword arguments go to its Limits."""
    picture = folder / "three flags.png"
    scene().save(picture)
    sample = Sample(picture, "Three flags", (QUESTION, "Which country is on the left?"))
    return Runtime("toy", policy or PlaybackPolicy(), FixedPacks(FlagRetriever()), Limits(**limits), (sample,))
