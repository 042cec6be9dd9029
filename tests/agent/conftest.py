"""A picture to stand before, and a way to tell a story about it: with searches ahead it is the same story."""

import numpy as np
import pytest
from stories import GREEN, INVENTED, RED, SKY, ColourRetriever, Told, without_times

from gog_edge.agent.loop import run_episode
from gog_edge.config import Budget, GazeConfig
from gog_edge.picture import Picture
from gog_edge.policy.scripted import ScriptedPolicy


@pytest.fixture(scope="session")
def picture():
    pixels = np.full((100, 300, 3), SKY, dtype=np.uint8)
    for n, colour in enumerate([RED, GREEN, INVENTED]):
        pixels[20:80, 100 * n + 20 : 100 * n + 80] = colour
    return Picture(pixels)


@pytest.fixture
def tell(picture):
    """Run an episode in which the policy says these texts."""

    def run(*texts, question="What is the currency of the flag on the left?", retriever=None,
            policy=None, **options):
        options.setdefault("budget", Budget())
        ahead = None
        if policy is None and retriever is None:
            ahead = list(run_episode(picture, question, policy=ScriptedPolicy(texts), retriever=ColourRetriever(),
                                     **{**options, "trace": None}))
        policy = policy or ScriptedPolicy(texts)
        retriever = retriever or ColourRetriever()
        events = list(run_episode(picture, question, policy=policy, retriever=retriever,
                                  gaze=GazeConfig(early=False), **options))
        assert ahead is None or without_times(ahead) == without_times(events)
        return Told(events, policy, retriever)

    return run
