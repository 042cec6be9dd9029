"""Grammars of all dialects on two tokenizers: what they accept, force and reject, and how thinking is limited."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from playback import FixedPacks
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
from gog_edge.errors import ArtifactError, DialectError, MalformedAction
from gog_edge.picture import decode_picture
from gog_edge.policy.decoding import SamplingParams, ThinkingBudget, Unconstrained
from gog_edge.policy.dialect import grammar as grammar_module
from gog_edge.policy.dialect.actions import ShownImages
from gog_edge.policy.dialect.grammar import Grammar, load_vocabulary
from gog_edge.policy.dialect.loader import load_dialect, shipped
from gog_edge.policy.local import LocalPolicy
from gog_edge.policy.manifest import TOKENIZER
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.retriever import Retriever
from gog_edge.runtime import Runtime
from gog_edge.types import Answer, Box, GazeSearch, ImageSearch, Size, TextSearch

IMAGES = ShownImages(given=Size(400, 300), resized=Size(392, 308))
ACTIONS = (
    Answer("São Tomé, 日本 <b>"), TextSearch('the capital of "Peru"'), ImageSearch(), GazeSearch(Box(8, 20, 96, 200)),
)  # fmt: skip


def atlas_tokenizer() -> Tokenizer:
    """Return the tokenizer of the atlas policy, set up as `Decoder` does: special tokens are encoded as text."""
    tokenizer = Tokenizer.from_file(str(DEFAULT_BUNDLE / "policy" / TOKENIZER))
    tokenizer.encode_special_tokens = True
    return tokenizer


def qwen_tokenizer() -> Tokenizer:
    """Return a tokenizer of the size of Qwen's, whose tokens extend across delimiters and words."""
    from gog_edge.exporting.policy.random_checkpoint import random_tokenizer

    tokenizer = random_tokenizer({"<|endoftext|>": 151_643, "<|im_start|>": 151_644, "<|im_end|>": 151_645})
    tokenizer.encode_special_tokens = True
    return tokenizer


TOKENIZERS = {"atlas": atlas_tokenizer(), "qwen": qwen_tokenizer()}
EOS = {name: tokenizer.token_to_id("<|im_end|>") for name, tokenizer in TOKENIZERS.items()}
VOCAB = {name: tokenizer.get_vocab_size() + 7 for name, tokenizer in TOKENIZERS.items()}  # some ids are unused


def dialects():
    """Yield every dialect of the package, and those with thinking a second time behind a template that opens it."""
    for name in shipped():
        dialect = load_dialect(name)
        yield name, dialect
        if dialect.thinking.open:
            yield f"{name} prefilled", dialect.for_template(f"<|im_start|>assistant\n{dialect.thinking.open}\n")


DIALECTS = dict(dialects())
GRAMMARS = {(name, kind): Grammar(dialect, TOKENIZERS[kind], VOCAB[kind], (EOS[kind], 0))
            for name, dialect in DIALECTS.items() for kind in ("atlas",)}
GRAMMARS |= {("atlas", "qwen"): Grammar(DIALECTS["atlas"], TOKENIZERS["qwen"], VOCAB["qwen"], [EOS["qwen"]])}


def encode(text, kind="atlas"):
    return TOKENIZERS[kind].encode(text, add_special_tokens=False).ids


def follow(constraint, text, kind="atlas"):
    """Feed the tokens of a text; return the text that was accepted and the pieces that were forced."""
    ids, at, forced = encode(text, kind), 0, []
    while at < len(ids) and not constraint.done:
        forced_ids = list(constraint.forced_tokens())
        if forced_ids:
            if forced_ids != ids[at : at + len(forced_ids)]:
                written = TOKENIZERS[kind].decode(forced_ids, skip_special_tokens=False)
                rest = TOKENIZERS[kind].decode(ids[at:], skip_special_tokens=False)
                assert not rest.startswith(written), "forced tokens are not segmented as by the tokenizer"
                break
            forced.append(TOKENIZERS[kind].decode(forced_ids, skip_special_tokens=False))
        if not constraint.count_valid([ids[at]]):
            break
        for token in forced_ids or [ids[at]]:
            constraint.accept_token(token)
        at += max(1, len(forced_ids))
    return TOKENIZERS[kind].decode(ids[:at], skip_special_tokens=False), forced


def rendered_actions(dialect):
    """Yield the actions that a dialect can express, as text."""
    for action in ACTIONS:
        for reason in ("", "One moment: <which>?\n"):
            try:
                text = dialect.render_action(action, IMAGES, reason)
            except DialectError:
                continue
            yield text


@pytest.mark.parametrize(("name", "kind"), GRAMMARS)
def test_rendered_actions_match_the_grammar(name, kind):
    texts = list(rendered_actions(DIALECTS[name]))
    assert len(texts) >= 4
    for text in texts:
        constraint = GRAMMARS[name, kind].turn()
        accepted, _ = follow(constraint, text, kind)
        assert accepted == text
        assert constraint.done or constraint.count_valid([EOS[kind]]) == 1


@pytest.mark.parametrize("name", DIALECTS)
def test_a_complete_call_ends_the_turn(name):
    for text in rendered_actions(DIALECTS[name]):
        if DIALECTS[name].parse_partial(text, IMAGES) is not None and "call" in text:
            constraint = GRAMMARS[name, "atlas"].turn()
            follow(constraint, text)
            assert constraint.done


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(DIALECTS)), st.integers(0, 2**32 - 1))
def test_turns_that_match_the_grammar_are_parsed(name, seed):
    random, dialect = np.random.default_rng(seed), DIALECTS[name]
    constraint, texts, ids = GRAMMARS[name, "atlas"].turn(), list(rendered_actions(dialect)), []
    pieces = [token for text in texts for token in encode(text)]
    for _ in range(200):
        if constraint.done:
            break
        token = pieces[random.integers(len(pieces))]  # delimiters in mostly wrong places
        if random.random() < 0.1 or not constraint.count_valid([token]):
            logits = random.normal(size=VOCAB["atlas"]).astype(np.float32)
            logits[pieces] += 6
            constraint.mask_logits(logits)
            token = int(np.argmax(logits))
        if token == EOS["atlas"]:
            assert constraint.count_valid([token])
            break
        constraint.accept_token(token)
        ids.append(token)
    else:
        return  # the turn is not complete
    try:
        dialect.parse(TOKENIZERS["atlas"].decode(ids, skip_special_tokens=False), IMAGES)
    except MalformedAction as exc:
        assert re.search(r"image \d+ does not exist", str(exc))  # the grammar does not know the number of images


@pytest.mark.parametrize("text", [
    "<answer></answer>", "<answer> \n\t</answer>", "<answer>x</think></answer>", "I think <answer>Peru</answer>",
    "<img_search>[1,2,3]</img_search>", "<img_search>[1,2,3,4,5]</img_search>", "<img_search>[1.5,2,3,4]</img_search>",
    "<img_search>[1,2,3,1000000]</img_search>", "<img_search>[-1,2,3,4]</img_search>", "<img_search></img_search>",
    "<reason>a</reason><reason>b</reason><answer>c</answer>", "<text_search> </text_search>", "<|im_end|>", " " * 9,
    "<answer>a <reason> b</answer>",
])  # fmt: skip
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_malformed_turns_do_not_match_the_grammar(text, kind):
    constraint = GRAMMARS["atlas", kind].turn()
    accepted, _ = follow(constraint, text, kind)
    assert accepted != text
    assert not constraint.done


def test_numbers_are_limited_to_the_coordinate_frame():
    qwen = DIALECTS["qwen_agent"]
    call = '<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [%s, 0, 1, 1]}}\n</tool_call>'
    for number, fits in (("0", True), ("999", True), ("1000", True), ("1001", False), ("1.5", False), ("-1", False)):
        accepted, _ = follow(GRAMMARS["qwen_agent", "atlas"].turn(), call % number)
        assert (accepted == call % number) is fits
    shares = Grammar(replace(qwen, box_frame="rel1"), TOKENIZERS["atlas"], VOCAB["atlas"], [EOS["atlas"]])
    for number, fits in (("0", True), ("0.1234", True), ("1.0", True), ("1.1", False), ("2", False), (".5", False)):
        accepted, _ = follow(shares.turn(), call % number)
        assert (accepted == call % number) is fits


def test_calls_with_unknown_tools_or_arguments_do_not_match():
    for text in ('{"name": "shell", "arguments": {"query": "x"}}', '{"name": "web_search", "arguments": {"q": "x"}}',
                 '{"name": "web_search", "arguments": {}}', '{"name": "web_search", "arguments": {"query": ""}}',
                 '{"name": "web_search", "arguments": {"query": "\\ud800"}}', '{"name":"web_search"}'):
        text = f"<tool_call>\n{text}\n</tool_call>"
        assert follow(GRAMMARS["qwen_agent", "atlas"].turn(), text)[0] != text


def test_text_without_a_choice_is_forced_in_one_piece():
    text = '<tool_call>\n{"name": "text_search_tool", "arguments": {"query": "Peru"}}\n</tool_call>'
    accepted, forced = follow(GRAMMARS["sensenova_mars", "atlas"].turn(), text)
    assert accepted == text
    assert any('"arguments": {' in piece for piece in forced) and "</tool_call>" in forced[-1]
    accepted, forced = follow(GRAMMARS["atlas", "atlas"].turn(), "<img_search>[1,2,3,4]</img_search>")
    assert forced == ["</img_search>"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_mask_allows_exactly_the_valid_tokens(kind):
    constraint = GRAMMARS["atlas", kind].turn()
    for token in [None, *encode("<reason>Größe</reason><img_search>[12,3,40,5", kind)]:
        if token is not None:
            constraint.accept_token(token)
        logits = np.zeros(VOCAB[kind], np.float32)
        constraint.mask_logits(logits)
        assert set(np.unique(logits)) <= {0.0, -np.inf}
        tested = {*encode("<answer>[12],</img_search> a", kind), EOS[kind], 0, VOCAB[kind] - 1}
        assert {token for token in tested if logits[token] == 0} == {
            token for token in tested if constraint.count_valid([token])
        }
        assert logits[EOS[kind]] == -np.inf and logits[VOCAB[kind] - 1] == -np.inf


def test_special_tokens_are_never_valid():
    constraint = GRAMMARS["atlas", "atlas"].turn()
    follow(constraint, "<answer>x")
    logits = np.zeros(VOCAB["atlas"], np.float32)
    constraint.mask_logits(logits)
    for name in ("<|im_start|>", "<|image_pad|>", "<|endoftext|>"):
        assert logits[TOKENIZERS["atlas"].token_to_id(name)] == -np.inf
    assert not constraint.count_valid([EOS["atlas"]])  # no action is complete yet


def test_an_end_token_is_not_valid_as_text():
    (full_stop,) = encode(".")
    constraint = Grammar(DIALECTS["atlas"], TOKENIZERS["atlas"], VOCAB["atlas"], [EOS["atlas"], full_stop]).turn()
    follow(constraint, "<answer>x")
    assert not constraint.count_valid([full_stop])


def test_drafts_are_cut_where_they_leave_the_grammar():
    constraint = GRAMMARS["atlas", "atlas"].turn()
    ids = encode("<img_search>[1,2,3,4]</answer>")
    assert constraint.count_valid(ids) == len(ids) - 1
    assert constraint.count_valid(ids) == len(ids) - 1  # no state has changed
    assert constraint.count_valid([]) == 0


def test_accepting_an_invalid_token_raises():
    constraint = GRAMMARS["atlas", "atlas"].turn()
    with pytest.raises(DialectError, match="does not match the dialect's grammar"):
        constraint.accept_token(EOS["atlas"])


@pytest.mark.parametrize("name", DIALECTS)
def test_a_forced_answer_matches_only_an_answer(name):
    dialect = DIALECTS[name]
    constraint = GRAMMARS[name, "atlas"].answer()
    accepted, _ = follow(constraint, " Lima</answer>" if "</answer>" in str(dialect.syntax.answer) else " Lima")
    assert constraint.done or constraint.count_valid([EOS["atlas"]])
    assert dialect.parse(dialect.answer_open + accepted, IMAGES) == Answer("Lima")
    if name.startswith("qwen_agent"):  # whose answers have no tags
        assert follow(GRAMMARS[name, "atlas"].answer(), " x <tool_call>\n")[0] != " x <tool_call>\n"


def test_constraints_of_two_turns_are_independent():
    first, second = (GRAMMARS["atlas", "atlas"].turn() for _ in range(2))
    follow(first, "<answer>x</answer>")
    assert first.done and not second.done
    assert follow(second, "<text_search>y</text_search>")[0] == "<text_search>y</text_search>"


def test_an_invalid_grammar_is_rejected(monkeypatch):
    monkeypatch.setattr(grammar_module, "turn_grammar", lambda dialect: "start: NOWHERE")
    with pytest.raises(DialectError, match="do not form a valid grammar"):
        Grammar(load_dialect("atlas"), TOKENIZERS["atlas"], VOCAB["atlas"], [EOS["atlas"]])


def test_the_vocabulary_has_the_bytes_of_every_token():
    vocabulary = load_vocabulary(TOKENIZERS["atlas"], VOCAB["atlas"], [2, 0])
    assert vocabulary.vocab_size == VOCAB["atlas"] and vocabulary.eos_tokens == [0, 2]
    for text in ("Größe 日本 <answer>", "\x00\x7f\xad\t"):
        assert vocabulary.decode_bytes(encode(text)) == text.encode()


def test_added_tokens_are_their_own_text():
    tokenizer = Tokenizer.from_str(TOKENIZERS["atlas"].to_str())
    tokenizer.add_tokens(["two words", "日本"])
    ids = [tokenizer.token_to_id(token) for token in ("two words", "日本")]
    vocabulary = load_vocabulary(tokenizer, tokenizer.get_vocab_size(), [2])
    assert vocabulary.decode_bytes([*ids, *encode("Größe")]) == "two words日本Größe".encode()


def test_an_unsupported_tokenizer_is_rejected():
    with pytest.raises(ArtifactError, match="has a token 4095, but the policy has only 4095 logits"):
        load_vocabulary(TOKENIZERS["atlas"], 4095, [2])
    words = Tokenizer(WordLevel({"of": 0, "it": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    with pytest.raises(ArtifactError, match="not byte-level"):
        load_vocabulary(words, 3, [2])


def test_an_answer_that_cannot_begin_with_its_opening_text_is_rejected():
    dialect = load_dialect("qwen_agent")
    dialect = replace(dialect, syntax=replace(dialect.syntax, plain_lead="<tool_call>"))
    with pytest.raises(DialectError, match="an answer of dialect qwen_agent cannot begin with '<tool_call>'"):
        Grammar(dialect, TOKENIZERS["atlas"], VOCAB["atlas"], [EOS["atlas"]])


# --- thinking -------------------------------------------------------------------------------------


def thinking_constraint(budget, *, prefilled, inner=None):
    name = "qwen_agent prefilled" if prefilled else "qwen_agent"
    dialect = DIALECTS[name]
    dialect = replace(dialect, thinking=replace(dialect.thinking, budget=budget))
    return ThinkingBudget(inner or GRAMMARS[name, "atlas"].turn(), dialect, TOKENIZERS["atlas"])


def accept(constraint, text):
    for token in encode(text):
        assert constraint.count_valid([token])
        constraint.accept_token(token)


@pytest.mark.parametrize("inner", [None, Unconstrained()], ids=["grammar", "free"])
def test_long_thinking_is_closed(inner):
    thought = encode("One flag is Peru's.")
    constraint = thinking_constraint(len(thought), prefilled=True, inner=inner)
    for token in thought:
        assert not constraint.forced_tokens()
        constraint.accept_token(token)
    closing = list(constraint.forced_tokens())
    assert TOKENIZERS["atlas"].decode(closing) == "\n</think>\n\n"
    for token in closing:
        constraint.accept_token(token)
    assert list(constraint.forced_tokens()) != closing  # it is forced once
    accept(constraint, "It is Peru.")
    assert constraint.count_valid([EOS["atlas"]]) and not constraint.done


def test_the_limit_of_the_turn_reduces_the_budget():
    thought = encode("One flag is Peru's.")
    name, limit = "qwen_agent prefilled", len(thought) + len(encode("\n</think>\n\n"))
    constraint = ThinkingBudget(GRAMMARS[name, "atlas"].turn(), DIALECTS[name], TOKENIZERS["atlas"], limit)
    for token in thought:
        assert not constraint.forced_tokens()
        constraint.accept_token(token)
    assert TOKENIZERS["atlas"].decode(list(constraint.forced_tokens())) == "\n</think>\n\n"


def test_thinking_within_the_budget_is_not_changed():
    constraint = thinking_constraint(50, prefilled=True)
    accept(constraint, "It may be Peru.</think>\n\n")
    for token in encode("A long answer " * 20):
        assert not constraint.forced_tokens()
        constraint.accept_token(token)


def test_the_budget_applies_only_to_turns_with_thinking():
    constraint = thinking_constraint(3, prefilled=False)
    accept(constraint, "An answer that is longer than three tokens")
    assert not constraint.forced_tokens()
    constraint = thinking_constraint(3, prefilled=False)
    accept(constraint, "<think>A thought that")
    assert "</think>" in TOKENIZERS["atlas"].decode(constraint.forced_tokens())


def test_thinking_is_not_closed_inside_a_character():
    constraint = thinking_constraint(1, prefilled=True)
    parts = encode("🇵")
    assert len(parts) > 1
    constraint.accept_token(parts[0])
    assert not constraint.forced_tokens()
    for token in parts[1:]:
        constraint.accept_token(token)
    assert constraint.forced_tokens()


# --- a trained policy on the samples of the bundle ----------------------------------------


@pytest.fixture(scope="module")
def atlas():
    bundle = open_bundle(DEFAULT_BUNDLE)
    encoder = Encoder.open(bundle.encoder, threads=1)
    retriever = Retriever(encoder, [Pack.open(pack, encoder) for pack in bundle.packs])
    return bundle, LocalPolicy.open(bundle.policy, 1), retriever


def turns(atlas, **decoding):
    bundle, policy, retriever = atlas
    policy = LocalPolicy(policy.model, policy.dialect, SamplingParams(), **decoding)
    runtime = Runtime(bundle.name, policy, FixedPacks(retriever), bundle.limits)
    for sample in bundle.samples:
        picture = sample.picture.read_bytes()
        decode_picture(picture, max_pixels=bundle.limits.picture_pixels)
        for question in sample.questions:
            *_, last = runtime.ask(picture, question)
            yield [(step.utterance.text, step.utterance.new_tokens) for step in last.record.steps if step.utterance]


def test_a_trained_policy_generates_the_same_with_and_without_grammar_and_drafts(atlas):
    plain = list(turns(atlas, grammar=False, drafts=None))
    assert len(plain) >= 10
    assert plain == list(turns(atlas, grammar=True, drafts=None))
    assert plain == list(turns(atlas))
