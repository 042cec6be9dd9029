"""Sampling against transformers, and incremental detokenization."""

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest

from gog_edge.errors import InputError
from gog_edge.exporting.policy.checkpoint import Checkpoint
from gog_edge.policy.decoding import (
    Detokenizer,
    Sampler,
    SamplingParams,
    TokenStream,
    Unconstrained,
    sampling_distribution,
)


def test_greedy_sampling_takes_the_largest_logit():
    assert Sampler(SamplingParams()).sample(np.float32([0.1, 2.0, -1.0]), []) == 1


def test_the_same_seed_samples_the_same_tokens():
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32)

    def draw(seed):
        sampler = Sampler(SamplingParams(temperature=1.5, seed=seed))
        return [sampler.sample(logits, []) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.1, 0.8, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 99])
def test_probabilities_equal_those_of_transformers(temperature, top_k, top_p):
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(3).normal(size=50).astype(np.float32) * 3
    theirs = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        theirs.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        theirs.append(TopPLogitsWarper(top_p))
    expected = theirs(torch.zeros(1, 0, dtype=torch.long), torch.tensor(logits)[None]).softmax(-1)[0].numpy()
    ids, probabilities = sampling_distribution(logits, SamplingParams(temperature, top_p, top_k))
    assert set(ids) == set(np.flatnonzero(expected))
    assert np.allclose(probabilities, expected[ids], atol=1e-6)
    assert np.all(np.diff(ids) > 0) and probabilities.sum() == pytest.approx(1)


def test_masked_tokens_are_never_sampled():
    logits = np.full(30, -np.inf, np.float32)
    logits[[3, 9]] = 0.5, 0.1
    sampler = Sampler(SamplingParams(temperature=9.0, top_k=20))
    assert {sampler.sample(logits, []) for _ in range(40)} == {3, 9}


def test_top_p_excludes_tokens_outside_the_nucleus():
    sampler = Sampler(SamplingParams(temperature=1.0, top_p=0.5))
    logits = np.log(np.float32([0.6, 0.2, 0.2]))
    assert {sampler.sample(logits, []) for _ in range(30)} == {0}


def test_the_repetition_penalty_equals_that_of_transformers_and_does_not_change_its_input():
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    theirs = RepetitionPenaltyLogitsProcessor(1.7)
    random, context = np.random.default_rng(0), [2, 2, 5]
    sampler = Sampler(SamplingParams(repetition_penalty=1.7))
    for _ in range(30):
        logits = random.normal(size=12).astype(np.float32)
        original = logits.copy()
        expected = theirs(torch.tensor(context)[None], torch.tensor(logits)[None])[0].numpy()
        token = sampler.sample(logits, context)
        assert token == expected.argmax()
        assert np.array_equal(logits, original)
        context.extend([token, int(random.integers(12))])


@pytest.mark.parametrize("wrong", [
    {"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"repetition_penalty": 0},
])  # fmt: skip
def test_invalid_sampling_parameters_are_rejected(wrong):
    with pytest.raises(InputError, match="sampling parameters must be"):
        SamplingParams(**wrong)


def test_text_is_decoded_in_whole_characters(tiny_model):
    tokenizer = tiny_model.decoder.tokenizer
    text = "Grüße, 日本 🇯🇵 <answer>naïve</answer>"
    detokenizer, pieces = Detokenizer(tokenizer), []
    for token in tiny_model.decoder.encode(text):
        pieces.append(detokenizer.push(token))
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces  # bytes of 日 were held back


def test_an_incomplete_character_is_returned_at_the_end(tiny_model):
    ids = tiny_model.decoder.encode("🇵")[:-1]
    detokenizer = Detokenizer(tiny_model.decoder.tokenizer)
    assert "".join(detokenizer.push(token) for token in ids) == ""
    assert set(detokenizer.finish()) == {"\ufffd"}
    assert detokenizer.finish() == ""


def test_a_token_stream_passes_text_on_as_it_is_decoded(tiny_model):
    pieces = []
    stream = TokenStream(Detokenizer(tiny_model.decoder.tokenizer), pieces.append)
    ids = tiny_model.decoder.encode("Größe 日本")
    for token in ids[:-1]:
        stream.add(token)
    assert stream.tokens == ids[:-1] and "".join(pieces) == stream.text
    assert stream.finish() == "".join(pieces) == "Größe 日\ufffd"


def test_unconstrained_allows_every_token():
    free, logits = Unconstrained(), np.float32([1, 2])
    free.accept_token(1)
    free.mask_logits(logits)
    assert free.count_valid([7, 8]) == 2 and not free.forced_tokens() and not free.done
    assert logits.tolist() == [1, 2]


def test_sampling_defaults_come_from_the_checkpoint(checkpoints, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints[True], folder)
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(config))
    defaults = Checkpoint.open(folder).generation
    assert SamplingParams(**asdict(defaults)) == SamplingParams(0.6, 0.95, 20, 1.05)
    (folder / "generation_config.json").write_text(json.dumps(config | {"do_sample": False}))
    assert SamplingParams(**asdict(Checkpoint.open(folder).generation)) == SamplingParams(repetition_penalty=1.05)
