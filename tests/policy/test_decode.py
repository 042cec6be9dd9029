import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest

from gog_edge.errors import InputError
from gog_edge.exporting.policy.checkpoint import Checkpoint
from gog_edge.policy.decoding import Sampler, Sampling, Speech, TextStream, Unconstrained, shortlist


def test_greedy_takes_the_likeliest():
    assert Sampler(Sampling()).choose(np.float32([0.1, 2.0, -1.0]), []) == 1


def test_one_seed_draws_the_same_tokens():
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32)

    def draw(seed):
        sampler = Sampler(Sampling(temperature=1.5, seed=seed))
        return [sampler.choose(logits, []) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.1, 0.8, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 99])
def test_chances_are_those_of_transformers(temperature, top_k, top_p):
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(3).normal(size=50).astype(np.float32) * 3
    theirs = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        theirs.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        theirs.append(TopPLogitsWarper(top_p))
    expected = theirs(torch.zeros(1, 0, dtype=torch.long), torch.tensor(logits)[None]).softmax(-1)[0].numpy()
    ids, chances = shortlist(logits, Sampling(temperature, top_p, top_k))
    assert set(ids) == set(np.flatnonzero(expected))
    assert np.allclose(chances, expected[ids], atol=1e-6)
    assert np.all(np.diff(ids) > 0) and chances.sum() == pytest.approx(1)


def test_what_is_masked_is_never_drawn():
    logits = np.full(30, -np.inf, np.float32)
    logits[[3, 9]] = 0.5, 0.1
    sampler = Sampler(Sampling(temperature=9.0, top_k=20))
    assert {sampler.choose(logits, []) for _ in range(40)} == {3, 9}


def test_top_p_is_obeyed():
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.5))
    logits = np.log(np.float32([0.6, 0.2, 0.2]))
    assert {sampler.choose(logits, []) for _ in range(30)} == {0}


def test_repetition_penalty_is_that_of_transformers_and_leaves_the_given_logits():
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    theirs = RepetitionPenaltyLogitsProcessor(1.7)
    random, said = np.random.default_rng(0), [2, 2, 5]
    sampler = Sampler(Sampling(repetition_penalty=1.7))
    for _ in range(30):
        logits = random.normal(size=12).astype(np.float32)
        kept = logits.copy()
        expected = theirs(torch.tensor(said)[None], torch.tensor(logits)[None])[0].numpy()
        token = sampler.choose(logits, said)
        assert token == expected.argmax()
        assert np.array_equal(logits, kept)
        said.extend([token, int(random.integers(12))])


@pytest.mark.parametrize("wrong", [
    {"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"repetition_penalty": 0},
])  # fmt: skip
def test_impossible_sampling_is_refused(wrong):
    with pytest.raises(InputError, match="impossible"):
        Sampling(**wrong)


def test_text_is_told_in_whole_characters(tiny_model):
    tokenizer = tiny_model.decoder.tokenizer
    text = "Grüße, 日本 🇯🇵 <answer>naïve</answer>"
    stream, pieces = TextStream(tokenizer), []
    for token in tiny_model.decoder.encode(text):
        pieces.append(stream.push(token))
    pieces.append(stream.finish())
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces  # bytes of 日 were held back


def test_a_cut_character_is_told_at_the_end(tiny_model):
    ids = tiny_model.decoder.encode("🇵")[:-1]
    stream = TextStream(tiny_model.decoder.tokenizer)
    assert "".join(stream.push(token) for token in ids) == ""
    assert set(stream.finish()) == {"\ufffd"}
    assert stream.finish() == ""


def test_speech_is_passed_on_as_it_is_said(tiny_model):
    pieces = []
    speech = Speech(TextStream(tiny_model.decoder.tokenizer), pieces.append)
    ids = tiny_model.decoder.encode("Größe 日本")
    for token in ids[:-1]:
        speech.add(token)
    assert speech.tokens == ids[:-1] and "".join(pieces) == speech.text
    assert speech.finish() == "".join(pieces) == "Größe 日\ufffd"


def test_without_a_constraint_anything_may_be_said():
    free, logits = Unconstrained(), np.float32([1, 2])
    free.accept(1)
    free.mask(logits)
    assert free.admits([7, 8]) == 2 and not free.forced() and not free.done and logits.tolist() == [1, 2]


def test_a_checkpoint_says_how_it_is_sampled(checkpoints, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints[True], folder)
    asks = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(asks))
    defaults = Checkpoint.open(folder).generation
    assert Sampling(**asdict(defaults)) == Sampling(0.6, 0.95, 20, 1.05)
    (folder / "generation_config.json").write_text(json.dumps(asks | {"do_sample": False}))
    assert Sampling(**asdict(Checkpoint.open(folder).generation)) == Sampling(repetition_penalty=1.05)
