"""A policy on engines that were built from its graphs; without a GPU, ONNX Runtime's CPU provider runs them."""

import numpy as np
import pytest
from toy_bundle import build

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.engines.registry import EngineChoice
from gog_edge.picture import decode_picture
from gog_edge.policy.local import LocalPolicy
from gog_edge.policy.model import PolicyModel
from gog_edge.policy.session import Session
from gog_edge.retrieval.encoder import Encoder

pytestmark = pytest.mark.usefixtures("cuda_on_cpu")
CONTEXT = 768


@pytest.fixture
def engines(toy):
    build(toy, context=CONTEXT)
    return EngineChoice("ort-cuda").read_engines(toy.root)


@pytest.mark.parametrize("requested, capacity", [(None, CONTEXT), (300, 300), (10_000, CONTEXT)])
def test_the_context_is_limited_by_the_request_and_by_the_engines(toy, engines, requested, capacity):
    model = PolicyModel.open(toy.policy, threads=1, context=requested, engines=engines)
    assert Session(model.decoder).capacity == capacity


def test_engines_generate_the_same_text_as_the_graphs_of_the_folder(toy, engines):
    picture = decode_picture((DEFAULT_BUNDLE / "samples/row.jpg").read_bytes())
    texts = []
    for built in (None, engines):
        policy = LocalPolicy.open(toy.policy, 1, engines=built)
        conversation = policy.begin(picture, "How many flags are there?")
        texts.append(conversation.generate(max_tokens=64, deadline=None).text)
        conversation.close()
    assert texts[0] == texts[1] != ""


def test_the_prompt_is_cached_in_the_folder_of_the_engines(toy, engines):
    first = LocalPolicy.open(toy.policy, 1, engines=engines)
    (folder,) = engines.cache().iterdir()
    states = np.load(folder / "states.npy")
    assert states.shape[2] == first._prefix.num_cached > 0 and not (toy.policy / "cache").exists()
    again = LocalPolicy.open(toy.policy, 1, engines=engines)
    assert again._prefix.num_processed == 0 < first._prefix.num_processed
    np.testing.assert_array_equal(again._prefix.snapshot().states, states)


def test_engines_give_the_same_embeddings_as_the_graphs_of_the_folder(toy, engines):
    own, built = Encoder.open(toy.encoder, threads=1), Encoder.open(toy.encoder, engines=engines)
    pictures = [np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8) for seed in range(20)]
    for ours, theirs in ((own.embed_images(pictures), built.embed_images(pictures)),
                         (own.embed_texts(["red", "blue white"]), built.embed_texts(["red", "blue white"]))):
        assert (ours * theirs).sum(axis=1).min() > 0.999
    assert own.fingerprint == built.fingerprint
