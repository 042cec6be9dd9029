"""A picture of three flags, and a fixture that plays an episode with a scripted policy."""

import numpy as np
import pytest
from scripted_policy import ScriptedPolicy
from scripted_world import GREEN, INVENTED, RED, SKY, ColourRetriever, Outcome, without_timings

from gog_edge.agent.loop import run_episode
from gog_edge.config import Budget, GazeConfig
from gog_edge.picture import Picture


@pytest.fixture(scope="session")
def picture():
    pixels = np.full((100, 300, 3), SKY, dtype=np.uint8)
    for n, colour in enumerate([RED, GREEN, INVENTED]):
        pixels[20:80, 100 * n + 20 : 100 * n + 80] = colour
    return Picture(pixels)


@pytest.fixture
def play(picture):
    """Play an episode in which the policy generates these texts.

    Scripts without a policy or retriever of their own are also played with speculative searches, which must lead to
    the same events.
    """

    def run(*texts, question="What is the currency of the flag on the left?", retriever=None,
            policy=None, **options):
        options.setdefault("budget", Budget())
        speculative = None
        if policy is None and retriever is None:
            speculative = []
            run_episode(picture, question, policy=ScriptedPolicy(texts), retriever=ColourRetriever(),
                        on_event=speculative.append, **{**options, "trace": None})
        policy = policy or ScriptedPolicy(texts)
        retriever = retriever or ColourRetriever()
        events = []
        record = run_episode(picture, question, policy=policy, retriever=retriever, on_event=events.append,
                             gaze=GazeConfig(early=False), **options)
        assert speculative is None or without_timings(speculative) == without_timings(events)
        assert events[-1].record is record
        return Outcome(events, policy, retriever)

    return run
