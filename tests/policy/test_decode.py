import numpy as np
import pytest

from gog_edge.errors import InputError
from gog_edge.policy.decode import Sampler, Sampling, TextStream, nucleus, penalise


def test_greedy_takes_the_likeliest():
    assert Sampler(Sampling()).choose(np.float32([0.1, 2.0, -1.0]), []) == 1


def test_one_seed_draws_the_same_tokens():
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32)

    def draw(seed):
        sampler = Sampler(Sampling(temperature=1.5, seed=seed))
        return [sampler.choose(logits, []) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)


def test_nucleus_keeps_the_smallest_set_that_holds_top_p():
    kept = nucleus(np.array([0.1, 0.5, 0.3, 0.1]), 0.7)
    assert np.allclose(kept, [0, 0.625, 0.375, 0])
    assert np.allclose(nucleus(np.array([0.2, 0.8]), 0.1), [0, 1])


def test_top_p_is_obeyed():
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.5))
    logits = np.log(np.float32([0.6, 0.2, 0.2]))
    assert {sampler.choose(logits, []) for _ in range(30)} == {0}


def test_repetition_penalty_works_on_both_signs_and_leaves_the_given_logits():
    logits = np.float32([2.0, -2.0, 1.0])
    assert penalise(logits, [0, 1, 1], 2.0).tolist() == [1.0, -4.0, 1.0]
    assert logits.tolist() == [2.0, -2.0, 1.0]
    assert Sampler(Sampling(repetition_penalty=3.0)).choose(logits, [0]) == 2


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"repetition_penalty": 0}])
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
