"""A policy on engines that were built from its graphs. Here they run on the processor, for want of a GPU."""

import numpy as np
import pytest
from built_engines import build, cuda_on_processor, toy  # noqa: F401
from little_fixtures import little_pack_folder, tiny_encoder, tiny_encoder_folder  # noqa: F401

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.engines.registry import EngineChoice
from gog_edge.picture import decode_picture
from gog_edge.policy.local import LocalPolicy
from gog_edge.policy.model import PolicyModel
from gog_edge.policy.session import Session
from gog_edge.retrieval.encoder import Encoder

pytestmark = pytest.mark.usefixtures("cuda_on_processor")
CONTEXT = 768


@pytest.fixture
def engines(toy):  # noqa: F811
    build(toy, context=CONTEXT)
    return EngineChoice("ort-cuda").read(toy.root)


@pytest.mark.parametrize("asked, given", [(None, CONTEXT), (300, 300), (10_000, CONTEXT)])
def test_a_conversation_holds_what_was_asked_for_and_what_was_built(toy, engines, asked, given):  # noqa: F811
    model = PolicyModel.open(toy.policy, threads=1, context=asked, engines=engines)
    assert Session(model.decoder).capacity == given


def test_it_says_what_the_folders_own_graphs_say(toy, engines):  # noqa: F811
    picture = decode_picture((DEFAULT_BUNDLE / "samples/row.jpg").read_bytes())
    said = []
    for built in (None, engines):
        policy = LocalPolicy.open(toy.policy, 1, engines=built)
        conversation = policy.begin(picture, "How many flags are there?")
        said.append(conversation.generate(max_tokens=64, deadline=None).text)
        conversation.close()
    assert said[0] == said[1] != ""


def test_the_prompt_is_kept_with_the_engines_and_taken_from_there(toy, engines):  # noqa: F811
    first = LocalPolicy.open(toy.policy, 1, engines=engines)
    (folder,) = engines.cache().iterdir()
    states = np.load(folder / "states.npy")
    assert states.shape[2] == first._prefix.computed > 0 and not (toy.policy / "cache").exists()
    again = LocalPolicy.open(toy.policy, 1, engines=engines)
    assert again._prefix.prefilled == 0 < first._prefix.prefilled
    np.testing.assert_array_equal(again._prefix.snapshot().states, states)


def test_an_encoder_on_engines_points_where_its_own_graphs_do(toy, engines):  # noqa: F811
    own, built = Encoder.open(toy.encoder, threads=1), Encoder.open(toy.encoder, engines=engines)
    pictures = [np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8) for seed in range(20)]
    for ours, theirs in ((own.embed_images(pictures), built.embed_images(pictures)),
                         (own.embed_texts(["red", "blue white"]), built.embed_texts(["red", "blue white"]))):
        assert (ours * theirs).sum(axis=1).min() > 0.999
    assert own.fingerprint == built.fingerprint
