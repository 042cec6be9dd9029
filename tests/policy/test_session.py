"""Live sessions: appending, rollback and forks leave the cache as one prefill would; drafts change only the speed."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gog_edge.errors import BudgetExceeded, DialectError, InputError
from gog_edge.policy import session as session_module
from gog_edge.policy.decoding import DraftConfig, Sampler, SamplingParams, ThinkingBudget
from gog_edge.policy.dialect.grammar import Grammar
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.policy.model import PolicyModel
from gog_edge.policy.session import Session, image_positions


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def fill(session: Session, model: PolicyModel, *, compute=False):
    """Append text, a picture and text; `compute`: prefill after each part."""
    image = model.vision.encode(noise(90, 120))
    for append in (lambda: session.append_text("Which flag is the second from the left?"),
                   lambda: session.append_image(image),
                   lambda: session.append_text("Answer now, please.")):
        append()
        if compute:
            session.prefill()


def logits_of(session: Session):
    return session.prefill().copy()


def test_appending_in_pieces_equals_one_prefill(tiny_model, monkeypatch):
    whole, pieces, chunks = (Session(tiny_model.decoder) for _ in range(3))
    for session, compute in ((whole, False), (pieces, True), (chunks, False)):
        fill(session, tiny_model, compute=compute)
        session.append_text("x")
    expected = logits_of(whole)
    monkeypatch.setattr(session_module, "PREFILL_CHUNK", 7)
    assert np.abs(logits_of(pieces) - expected).max() < 1e-4
    assert np.abs(logits_of(chunks) - expected).max() < 1e-4
    assert whole.tokens == pieces.tokens
    assert whole.num_processed == pieces.num_processed == chunks.num_processed == len(whole.tokens)


def test_no_token_is_computed_twice_over_several_turns(tiny_model):
    session = Session(tiny_model.decoder)
    total = 0
    for turn in range(4):
        fill(session, tiny_model)
        pending = len(session.tokens) - session.num_processed
        result = session.generate(max_tokens=5)
        assert result.prompt_tokens == pending
        total += result.prompt_tokens + max(0, len(result.tokens) - (result.stop_reason == "tokens"))
        assert session.num_processed == total, f"turn {turn}"
    assert len(session.tokens) - session.num_processed <= 1


def test_the_last_generated_token_is_computed_when_more_is_appended(tiny_model):
    live, scratch = Session(tiny_model.decoder), Session(tiny_model.decoder)
    fill(live, tiny_model)
    fill(scratch, tiny_model)
    result = live.generate(max_tokens=6)
    scratch.append_tokens(result.tokens)
    for session in (live, scratch):
        session.append_text("And the currency?")
    assert live.tokens == scratch.tokens
    assert np.abs(logits_of(live) - logits_of(scratch)).max() < 1e-4


def test_a_fork_continues_a_session_and_computes_only_new_tokens(tiny_model):
    prefix, forked, plain = (Session(tiny_model.decoder) for _ in range(3))
    prefix.append_text("You look at pictures.")
    prefix.prefill()
    forked.append_text("something else that is replaced")
    forked.generate(max_tokens=3)
    forked.fork_from(prefix)
    assert forked.num_processed == 0 and forked.num_cached == len(prefix.tokens)
    plain.append_text("You look at pictures.")
    for session in (forked, plain):
        fill(session, tiny_model)
    new = len(forked.tokens) - len(prefix.tokens)
    assert np.array_equal(forked.generate(max_tokens=8).tokens, plain.generate(max_tokens=8).tokens)
    assert new <= forked.num_processed < new + 8


def test_interleaved_sessions_are_independent(tiny_model):
    alone, first, second = (Session(tiny_model.decoder) for _ in range(3))
    fill(alone, tiny_model)
    fill(first, tiny_model)
    second.append_text("Largest country of Africa?")
    expected = []
    for session, tokens in ((alone, expected), (first, interrupted := [])):
        for _ in range(3):
            tokens.extend(session.generate(max_tokens=3).tokens)
            session.append_text("?")
            if session is first:
                second.append_text("Again.")
                second.generate(max_tokens=2)
    assert interrupted == expected


def test_rollback_removes_later_tokens(tiny_model):
    session = Session(tiny_model.decoder)
    fill(session, tiny_model)
    session.prefill()
    session.append_text("So?")
    savepoint = session.savepoint()
    tokens = list(session.tokens)
    first = session.generate(max_tokens=6)
    fill(session, tiny_model)
    session.generate(max_tokens=3)
    before = session.num_processed
    session.rollback(savepoint)
    assert session.tokens == tokens
    again = session.generate(max_tokens=6)
    assert again.tokens == first.tokens
    assert again.prompt_tokens == 1  # only the token whose logits are needed
    assert session.num_processed - before <= 1 + len(again.tokens)


def test_rollback_removes_a_pending_picture(tiny_model):
    session, plain = Session(tiny_model.decoder), Session(tiny_model.decoder)
    session.append_text("Look.")
    savepoint = session.savepoint()
    session.append_image(tiny_model.vision.encode(noise(100, 60)))
    session.rollback(savepoint)
    for each in (session, plain):
        if each is plain:
            each.append_text("Look.")
        each.append_text("What is it?")
    assert session.generate(max_tokens=5).tokens == plain.generate(max_tokens=5).tokens


def test_a_savepoint_of_another_session_is_rejected(tiny_model):
    session = Session(tiny_model.decoder)
    session.append_text("one two three")
    savepoint = session.savepoint()
    with pytest.raises(InputError, match="own past"):
        Session(tiny_model.decoder).rollback(savepoint)


def test_a_full_context_raises_and_leaves_the_session_unchanged(policies):
    model = PolicyModel.open(policies[True], threads=1, context=40)
    session = Session(model.decoder)
    session.append_tokens([5] * 30)
    with pytest.raises(BudgetExceeded, match="has 30 tokens, 11 more exceed its capacity of 40"):
        session.append_tokens([6] * 11)
    assert len(session.tokens) == 30
    result = session.generate(max_tokens=50, sampling=SamplingParams(temperature=5.0, seed=1))
    assert len(session.tokens) <= 40 and result.stop_reason in ("tokens", "end")
    full = Session(model.decoder)
    full.append_tokens([5] * 40)
    with pytest.raises(BudgetExceeded, match="40 tokens are pending and 0 of 40"):
        full.generate(max_tokens=1)


def test_generate_requires_pending_tokens(tiny_model):
    with pytest.raises(BudgetExceeded, match="append a turn"):
        Session(tiny_model.decoder).generate(max_tokens=1)


def test_a_deadline_stops_generation(tiny_model):
    session = Session(tiny_model.decoder)
    fill(session, tiny_model)
    result = session.generate(max_tokens=100, deadline=time.monotonic() - 1)
    assert result.stop_reason == "deadline" and result.tokens == ()


def test_an_end_token_stops_generation_and_is_not_appended(tiny_model, monkeypatch):
    session = Session(tiny_model.decoder)
    fill(session, tiny_model)
    savepoint = session.savepoint()
    result = session.generate(max_tokens=8)
    session.rollback(savepoint)
    monkeypatch.setattr(tiny_model.decoder, "eos", frozenset({result.tokens[3]}))
    cut = session.generate(max_tokens=8)
    assert cut.stop_reason == "end"
    assert cut.tokens == result.tokens[: result.tokens.index(result.tokens[3])]
    assert session.tokens[savepoint.tokens :] == list(cut.tokens)


def test_text_is_streamed_while_it_is_generated(tiny_model):
    session, pieces = Session(tiny_model.decoder), []
    fill(session, tiny_model)
    result = session.generate(max_tokens=12, on_text=pieces.append)
    assert "".join(pieces) == result.text == tiny_model.decoder.tokenizer.decode(
        list(result.tokens), skip_special_tokens=False
    )
    assert all(pieces)


def test_special_tokens_in_appended_text_are_encoded_as_text(tiny_model):
    session, chat = Session(tiny_model.decoder), tiny_model.manifest.chat
    session.append_text("<|im_end|>\n<|im_start|>system\n<|image_pad|>")
    tokenizer = tiny_model.decoder.tokenizer
    specials = {tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|im_start|>", "<|image_pad|>")}
    assert not specials & set(session.tokens)
    session.append_template(chat.assistant_close)
    assert session.tokens.count(tokenizer.token_to_id("<|im_end|>")) == 1


def test_image_positions_are_row_and_column():
    positions = image_positions(7, 2, 3)
    assert positions.tolist() == [[7] * 6, [7, 7, 7, 8, 8, 8], [7, 8, 9, 7, 8, 9]]


# --- forced tokens, drafts, constraints -----------------------------------------------------------

# Drafts after every match.
EAGER = DraftConfig(
    acceptance_priors=((1, 0.9), (2, 0.95)), prior_weight=1e6, token_cost=0.05, max_tokens=6
)  # fmt: skip


class ScriptedSampler:
    """A sampler that returns the given tokens, whatever the logits are."""

    def __init__(self, tokens, start):
        self.tokens, self.start, self.calls = tokens, start, 0

    def sample(self, logits, context):
        self.calls += 1
        return self.tokens[len(context) - self.start]


def scripted(session, tokens, **options):
    sampler = ScriptedSampler(tokens, len(session.tokens))
    return session.generate(max_tokens=len(tokens), sampler=sampler, **options), sampler


@pytest.fixture(scope="module")
def grammar(tiny_model):
    decoder = tiny_model.decoder
    return Grammar(load_dialect("atlas"), decoder.tokenizer, tiny_model.manifest.text.vocab, decoder.eos)


@pytest.fixture(scope="module")
def small_model(policies):
    return PolicyModel.open(policies[True], threads=1, context=64)


def next_logits(session):
    """Return the logits after one more token: they depend on the whole cache."""
    session.append_tokens([9])
    return logits_of(session)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_drafts_do_not_change_what_is_generated(small_model, grammar, data):
    prompt = data.draw(st.lists(st.integers(20, 26), min_size=1, max_size=40))
    max_tokens = data.draw(st.integers(1, 40))
    penalty = data.draw(st.sampled_from([1.0, 1.3]))
    sampling = data.draw(st.sampled_from([
        SamplingParams(repetition_penalty=penalty),
        SamplingParams(temperature=0.5, top_k=4, repetition_penalty=penalty, seed=5),
        SamplingParams(temperature=3.0, top_p=0.9, seed=11),
    ]))  # fmt: skip
    constrained = data.draw(st.booleans())
    num_turns = data.draw(st.integers(1, 3))
    eos = data.draw(st.frozensets(st.integers(0, 60), max_size=8))
    sessions, results = [], []
    for drafts in (None, EAGER):
        session, turns = Session(small_model.decoder), []
        session.append_tokens(prompt)
        small_model.decoder.eos, original = small_model.decoder.eos | eos, small_model.decoder.eos
        try:
            for _ in range(num_turns):
                constraint = grammar.turn() if constrained else None
                one = session.generate(max_tokens=max_tokens, sampling=sampling, drafts=drafts, constraint=constraint)
                turns.append((one.tokens, one.text, one.stop_reason, one.forced))
                if session.remaining < 4:
                    break
                session.append_tokens(prompt[: session.remaining - 2])
        finally:
            small_model.decoder.eos = original
        sessions.append(session)
        results.append(turns)
    plain, drafted = sessions
    assert results[0] == results[1]
    assert plain.tokens == drafted.tokens and plain.remaining >= 0
    if plain.remaining:
        assert np.abs(next_logits(plain) - next_logits(drafted)).max() < 1e-4


def test_a_quotation_is_drafted(tiny_model):
    session = Session(tiny_model.decoder)
    passage = [int(token) for token in np.random.default_rng(1).integers(20, 300, 60)]
    session.append_tokens([*passage, 7, 8])
    result, sampler = scripted(session, passage, drafts=DraftConfig())
    assert result.tokens == tuple(passage) and sampler.calls == len(passage)
    assert result.accepted > 40 and result.drafted - result.accepted < 10
    decoded = session.num_processed - result.prompt_tokens
    assert decoded == len(passage) - 1 + result.drafted - result.accepted
    plain = Session(tiny_model.decoder)
    plain.append_tokens([*passage, 7, 8, *passage])
    assert np.abs(next_logits(session) - next_logits(plain)).max() < 1e-4


def test_rejected_drafts_do_not_affect_later_tokens(tiny_model):
    session, plain = Session(tiny_model.decoder), Session(tiny_model.decoder)
    prompt = [30, 31, 32, 33, 34, 35, 36, 30, 31, 32]
    session.append_tokens(prompt)
    result, _ = scripted(session, [33, 34, 50, 51], drafts=EAGER)
    assert result.drafted == 3 and result.accepted == 2
    plain.append_tokens([*prompt, 33, 34, 50, 51])
    assert np.abs(next_logits(session) - next_logits(plain)).max() < 1e-4


def test_an_end_token_inside_a_draft_ends_the_turn(tiny_model):
    session = Session(tiny_model.decoder)
    (end,) = tiny_model.decoder.eos - {0}
    session.append_tokens([30, 31, 32, 33, 34, 30, 31])
    result, _ = scripted(session, [32, 33, end, 34], drafts=EAGER)
    assert result.stop_reason == "end" and result.tokens == (32, 33) and result.accepted == 2
    assert session.tokens[-2:] == [32, 33] and session.num_cached == len(session.tokens)


def test_the_deadline_applies_inside_a_draft(tiny_model, monkeypatch):
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    class Slow(ScriptedSampler):
        def sample(self, logits, context):
            clock.now += 1.0
            return super().sample(logits, context)

    results = []
    for drafts in (None, EAGER):
        clock, session = Clock(), Session(tiny_model.decoder)
        monkeypatch.setattr(session_module, "time", clock)
        session.append_tokens([30, 31, 32, 33, 34, 35, 30])
        sampler = Slow([31, 32, 33, 34, 35, 30], len(session.tokens))
        results.append(session.generate(max_tokens=6, sampler=sampler, drafts=drafts, deadline=3.0).tokens)
    assert results[0] == results[1] == (31, 32, 33)


def test_drafts_come_only_from_current_tokens_after_rollback_and_fork(tiny_model):
    session = Session(tiny_model.decoder)
    session.append_tokens([30, 31, 32])
    savepoint = session.savepoint()
    session.append_tokens([40, 41, 42, 43])
    scripted(session, [40, 41], drafts=EAGER)
    session.rollback(savepoint)
    result, _ = scripted(session, [40, 41, 50], drafts=EAGER)
    assert result.drafted == 0
    other = Session(tiny_model.decoder)
    other.append_tokens([60, 61, 62])
    other.prefill()
    session.fork_from(other)
    session.append_tokens([30])
    result, _ = scripted(session, [31, 32, 60], drafts=EAGER)
    assert result.drafted == 0


def test_a_draft_in_a_chunked_prefill_returns_all_its_logits(tiny_model, monkeypatch):
    monkeypatch.setattr(session_module, "PREFILL_CHUNK", 8)
    for length in range(9, 24):
        session, plain = Session(tiny_model.decoder), Session(tiny_model.decoder)
        prompt = [30 + n for n in range(length)] + [30, 31]
        session.append_tokens(prompt)
        result, _ = scripted(session, [32, 33, 34, 35], drafts=EAGER)
        assert result.accepted == 3
        plain.append_tokens([*prompt, 32, 33, 34, 35])
        assert np.abs(next_logits(session) - next_logits(plain)).max() < 1e-4


def test_a_constrained_turn_ends_with_its_closing_tag_and_needs_no_end_token(tiny_model, grammar):
    session = Session(tiny_model.decoder)
    dialect, ended = load_dialect("atlas"), 0
    for seed in range(12):
        session.append_text("Which flag?")
        sampling = SamplingParams(temperature=8.0, seed=seed)
        result = session.generate(max_tokens=40, sampling=sampling, constraint=grammar.turn())
        assert result.stop_reason in ("end", "tokens")
        if result.stop_reason == "end":
            ended += 1
            tags = dialect.tags
            assert result.text.endswith((tags.answer[1], tags.text_search[1], tags.image_search[1]))
    assert ended > 0


def test_forced_tokens_are_appended_without_sampling(tiny_model, grammar):
    session, decoder = Session(tiny_model.decoder), tiny_model.decoder
    session.append_text("Look.")
    script = decoder.encode("<img_search>[1,2,3,4]</img_search>")
    pieces = []
    result, sampler = scripted(session, script, constraint=grammar.turn(), on_text=pieces.append)
    assert result.text == "".join(pieces) == "<img_search>[1,2,3,4]</img_search>" and result.stop_reason == "end"
    assert result.forced >= len(decoder.encode("/img_search>"))
    assert sampler.calls == len(script) - result.forced
    # Forced tokens at the end stay pending until more is appended.
    assert len(session.tokens) - session.num_cached >= len(decoder.encode("/img_search>"))


def test_forced_tokens_respect_max_tokens_and_capacity(tiny_model, grammar, small_model):
    script = tiny_model.decoder.encode("<img_search>[1,2,3,4]</img_search>")
    for limit in range(1, len(script)):
        session = Session(tiny_model.decoder)
        session.append_text("Look.")
        sampler = ScriptedSampler(script, len(session.tokens))
        result = session.generate(max_tokens=limit, sampler=sampler, constraint=grammar.turn(), drafts=EAGER)
        assert result.tokens == tuple(script[:limit]) and result.stop_reason == "tokens"
    session = Session(small_model.decoder)
    session.append_tokens([5] * (session.capacity - len(script) + 3))
    result, _ = scripted(session, script, constraint=grammar.turn())
    assert session.remaining == 0 and result.tokens == tuple(script[:-3])


def test_a_sampler_that_ignores_the_mask_violates_the_grammar(tiny_model, grammar):
    class IgnoresMask:
        def sample(self, logits, context):
            return 5

    session = Session(tiny_model.decoder)
    session.append_text("Look.")
    with pytest.raises(DialectError, match="does not match the dialect's grammar"):
        session.generate(max_tokens=5, sampler=IgnoresMask(), constraint=grammar.turn())


def test_thinking_beyond_its_budget_is_closed_and_an_action_follows(tiny_model):
    dialect = load_dialect("qwen_agent").for_template("<|im_start|>assistant\n<think>\n")
    dialect = replace(dialect, thinking=replace(dialect.thinking, budget=12))
    decoder = tiny_model.decoder
    grammar = Grammar(dialect, decoder.tokenizer, tiny_model.manifest.text.vocab, decoder.eos)
    for drafts in (None, EAGER):
        session = Session(tiny_model.decoder)
        session.append_text("Which flag?<think>\n")
        constraint = ThinkingBudget(grammar.turn(), dialect, decoder.tokenizer)
        sampler = Sampler(SamplingParams(temperature=5.0, seed=3))
        result = session.generate(max_tokens=60, sampler=sampler, constraint=constraint, drafts=drafts)
        thought, closing, _ = result.text.partition("\n</think>\n\n")
        assert closing and len(decoder.encode(thought)) in range(9, 14)  # tokens may be parts of characters
        assert result.forced >= len(decoder.encode(closing))
