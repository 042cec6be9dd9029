from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from played import Still
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
from gog_edge.errors import ArtifactError, DialectError, MalformedAction
from gog_edge.picture import decode_picture
from gog_edge.policy.decoding import Sampling, Unconstrained
from gog_edge.policy.dialect import grammar as grammar_module
from gog_edge.policy.dialect.actions import Frame
from gog_edge.policy.dialect.grammar import Grammar, ThinkBudget, load_vocabulary
from gog_edge.policy.dialect.loader import load_dialect, shipped
from gog_edge.policy.local import LocalPolicy
from gog_edge.policy.manifest import TOKENIZER
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.retriever import Retriever
from gog_edge.runtime import Runtime
from gog_edge.types import Answer, Box, GazeSearch, ImageSearch, Size, TextSearch

FRAME = Frame(given=Size(400, 300), resized=Size(392, 308))
ACTIONS = (
    Answer("São Tomé, 日本 <b>"), TextSearch('the capital of "Peru"'), ImageSearch(), GazeSearch(Box(8, 20, 96, 200)),
)  # fmt: skip


def atlas_tokenizer() -> Tokenizer:
    """As a decoder keeps it: what is said is text, the chat's special tokens are not in it."""
    tokenizer = Tokenizer.from_file(str(DEFAULT_BUNDLE / "policy" / TOKENIZER))
    tokenizer.encode_special_tokens = True
    return tokenizer


def qwen_tokenizer() -> Tokenizer:
    """Of Qwen's size: marks and words meet within tokens."""
    from gog_edge.exporting.policy.random_checkpoint import random_tokenizer

    tokenizer = random_tokenizer({"<|endoftext|>": 151_643, "<|im_start|>": 151_644, "<|im_end|>": 151_645})
    tokenizer.encode_special_tokens = True
    return tokenizer


TOKENIZERS = {"atlas": atlas_tokenizer(), "qwen": qwen_tokenizer()}
EOS = {name: tokenizer.token_to_id("<|im_end|>") for name, tokenizer in TOKENIZERS.items()}
VOCAB = {name: tokenizer.get_vocab_size() + 7 for name, tokenizer in TOKENIZERS.items()}  # some ids stand for nothing


def dialects():
    """Every dialect that ships, and every one that can think behind a template that has opened the thought."""
    for name in shipped():
        dialect = load_dialect(name)
        yield name, dialect
        if dialect.thinking.open:
            yield f"{name} prefilled", dialect.after(f"<|im_start|>assistant\n{dialect.thinking.open}\n")


DIALECTS = dict(dialects())
GRAMMARS = {(name, kind): Grammar(dialect, TOKENIZERS[kind], VOCAB[kind], (EOS[kind], 0))
            for name, dialect in DIALECTS.items() for kind in ("atlas",)}
GRAMMARS |= {("atlas", "qwen"): Grammar(DIALECTS["atlas"], TOKENIZERS["qwen"], VOCAB["qwen"], [EOS["qwen"]])}


def encode(text, kind="atlas"):
    return TOKENIZERS[kind].encode(text, add_special_tokens=False).ids


def follow(constraint, text, kind="atlas"):
    """Say a text; returns (how much of it was admitted, the forced pieces)."""
    ids, at, forced = encode(text, kind), 0, []
    while at < len(ids) and not constraint.done:
        must = list(constraint.forced())
        if must:
            if must != ids[at : at + len(must)]:
                written = TOKENIZERS[kind].decode(must, skip_special_tokens=False)
                rest = TOKENIZERS[kind].decode(ids[at:], skip_special_tokens=False)
                assert not rest.startswith(written), "what is forced is not written as the tokenizer writes it"
                break
            forced.append(TOKENIZERS[kind].decode(must, skip_special_tokens=False))
        if not constraint.admits([ids[at]]):
            break
        for token in must or [ids[at]]:
            constraint.accept(token)
        at += max(1, len(must))
    return TOKENIZERS[kind].decode(ids[:at], skip_special_tokens=False), forced


def sayable(dialect):
    """The actions that a dialect can write."""
    for action in ACTIONS:
        for reason in ("", "One moment: <which>?\n"):
            try:
                text = dialect.render_action(action, FRAME, reason)
            except DialectError:
                continue
            yield text


@pytest.mark.parametrize(("name", "kind"), GRAMMARS)
def test_whatever_the_dialect_writes_is_in_its_grammar(name, kind):
    texts = list(sayable(DIALECTS[name]))
    assert len(texts) >= 4
    for text in texts:
        constraint = GRAMMARS[name, kind].turn()
        said, _ = follow(constraint, text, kind)
        assert said == text
        assert constraint.done or constraint.admits([EOS[kind]]) == 1


@pytest.mark.parametrize("name", DIALECTS)
def test_a_closed_action_ends_the_turn(name):
    for text in sayable(DIALECTS[name]):
        if DIALECTS[name].closed_action(text, FRAME) is not None and "call" in text:
            constraint = GRAMMARS[name, "atlas"].turn()
            follow(constraint, text)
            assert constraint.done


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(DIALECTS)), st.integers(0, 2**32 - 1))
def test_whatever_the_grammar_admits_can_be_read(name, seed):
    random, dialect = np.random.default_rng(seed), DIALECTS[name]
    constraint, texts, ids = GRAMMARS[name, "atlas"].turn(), list(sayable(dialect)), []
    pieces = [token for text in texts for token in encode(text)]
    for _ in range(200):
        if constraint.done:
            break
        token = pieces[random.integers(len(pieces))]  # marks, mostly where they do not belong
        if random.random() < 0.1 or not constraint.admits([token]):
            logits = random.normal(size=VOCAB["atlas"]).astype(np.float32)
            logits[pieces] += 6
            constraint.mask(logits)
            token = int(np.argmax(logits))
        if token == EOS["atlas"]:
            assert constraint.admits([token])
            break
        constraint.accept(token)
        ids.append(token)
    else:
        return  # it would still go on
    try:
        dialect.parse(TOKENIZERS["atlas"].decode(ids, skip_special_tokens=False), FRAME)
    except MalformedAction as exc:
        assert "there is no image" in str(exc)  # how many there are is not the grammar's to know


@pytest.mark.parametrize("text", [
    "<answer></answer>", "<answer> \n\t</answer>", "<answer>x</think></answer>", "I think <answer>Peru</answer>",
    "<img_search>[1,2,3]</img_search>", "<img_search>[1,2,3,4,5]</img_search>", "<img_search>[1.5,2,3,4]</img_search>",
    "<img_search>[1,2,3,1000000]</img_search>", "<img_search>[-1,2,3,4]</img_search>", "<img_search></img_search>",
    "<reason>a</reason><reason>b</reason><answer>c</answer>", "<text_search> </text_search>", "<|im_end|>", " " * 9,
    "<answer>a <reason> b</answer>",
])  # fmt: skip
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_cannot_be_read_cannot_be_said(text, kind):
    constraint = GRAMMARS["atlas", kind].turn()
    said, _ = follow(constraint, text, kind)
    assert said != text
    assert not constraint.done


def test_numbers_stay_in_their_frame():
    qwen = DIALECTS["qwen_agent"]
    call = '<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [%s, 0, 1, 1]}}\n</tool_call>'
    for number, fits in (("0", True), ("999", True), ("1000", True), ("1001", False), ("1.5", False), ("-1", False)):
        said, _ = follow(GRAMMARS["qwen_agent", "atlas"].turn(), call % number)
        assert (said == call % number) is fits
    shares = Grammar(replace(qwen, box_frame="rel1"), TOKENIZERS["atlas"], VOCAB["atlas"], [EOS["atlas"]])
    for number, fits in (("0", True), ("0.1234", True), ("1.0", True), ("1.1", False), ("2", False), (".5", False)):
        said, _ = follow(shares.turn(), call % number)
        assert (said == call % number) is fits


def test_calls_name_known_tools_and_arguments():
    for text in ('{"name": "shell", "arguments": {"query": "x"}}', '{"name": "web_search", "arguments": {"q": "x"}}',
                 '{"name": "web_search", "arguments": {}}', '{"name": "web_search", "arguments": {"query": ""}}',
                 '{"name": "web_search", "arguments": {"query": "\\ud800"}}', '{"name":"web_search"}'):
        text = f"<tool_call>\n{text}\n</tool_call>"
        assert follow(GRAMMARS["qwen_agent", "atlas"].turn(), text)[0] != text


def test_what_leaves_no_choice_is_forced_in_one_piece():
    text = '<tool_call>\n{"name": "text_search_tool", "arguments": {"query": "Peru"}}\n</tool_call>'
    said, forced = follow(GRAMMARS["sensenova_mars", "atlas"].turn(), text)
    assert said == text
    assert any('"arguments": {' in piece for piece in forced) and "</tool_call>" in forced[-1]
    said, forced = follow(GRAMMARS["atlas", "atlas"].turn(), "<img_search>[1,2,3,4]</img_search>")
    assert forced == ["</img_search>"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_mask_holds_what_is_admitted(kind):
    constraint = GRAMMARS["atlas", kind].turn()
    for token in [None, *encode("<reason>Größe</reason><img_search>[12,3,40,5", kind)]:
        if token is not None:
            constraint.accept(token)
        logits = np.zeros(VOCAB[kind], np.float32)
        constraint.mask(logits)
        assert set(np.unique(logits)) <= {0.0, -np.inf}
        tested = {*encode("<answer>[12],</img_search> a", kind), EOS[kind], 0, VOCAB[kind] - 1}
        assert {token for token in tested if logits[token] == 0} == {
            token for token in tested if constraint.admits([token])
        }
        assert logits[EOS[kind]] == -np.inf and logits[VOCAB[kind] - 1] == -np.inf


def test_special_tokens_are_never_part_of_what_is_said():
    constraint = GRAMMARS["atlas", "atlas"].turn()
    follow(constraint, "<answer>x")
    logits = np.zeros(VOCAB["atlas"], np.float32)
    constraint.mask(logits)
    for name in ("<|im_start|>", "<|image_pad|>", "<|endoftext|>"):
        assert logits[TOKENIZERS["atlas"].token_to_id(name)] == -np.inf
    assert not constraint.admits([EOS["atlas"]])  # no action is closed yet


def test_a_token_that_ends_turns_is_no_text_whatever_it_looks_like():
    (full_stop,) = encode(".")
    constraint = Grammar(DIALECTS["atlas"], TOKENIZERS["atlas"], VOCAB["atlas"], [EOS["atlas"], full_stop]).turn()
    follow(constraint, "<answer>x")
    assert not constraint.admits([full_stop])


def test_drafts_are_cut_where_the_grammar_ends_them():
    constraint = GRAMMARS["atlas", "atlas"].turn()
    ids = encode("<img_search>[1,2,3,4]</answer>")
    assert constraint.admits(ids) == len(ids) - 1
    assert constraint.admits(ids) == len(ids) - 1  # asking changes nothing
    assert constraint.admits([]) == 0


def test_saying_what_is_not_admitted_is_an_error():
    constraint = GRAMMARS["atlas", "atlas"].turn()
    with pytest.raises(DialectError, match="left the dialect's grammar"):
        constraint.accept(EOS["atlas"])


@pytest.mark.parametrize("name", DIALECTS)
def test_a_forced_answer_is_nothing_but_an_answer(name):
    dialect = DIALECTS[name]
    constraint = GRAMMARS[name, "atlas"].answer()
    said, _ = follow(constraint, " Lima</answer>" if "</answer>" in str(dialect.syntax.answer) else " Lima")
    assert constraint.done or constraint.admits([EOS["atlas"]])
    assert dialect.parse(dialect.answer_open + said, FRAME) == Answer("Lima")
    if name.startswith("qwen_agent"):  # which has no marks around an answer
        assert follow(GRAMMARS[name, "atlas"].answer(), " x <tool_call>\n")[0] != " x <tool_call>\n"


def test_turns_do_not_disturb_each_other():
    first, second = (GRAMMARS["atlas", "atlas"].turn() for _ in range(2))
    follow(first, "<answer>x</answer>")
    assert first.done and not second.done
    assert follow(second, "<text_search>y</text_search>")[0] == "<text_search>y</text_search>"


def test_a_grammar_that_cannot_be_followed_is_refused(monkeypatch):
    monkeypatch.setattr(grammar_module, "turn_grammar", lambda dialect: "start: NOWHERE")
    with pytest.raises(DialectError, match="make no grammar"):
        Grammar(load_dialect("atlas"), TOKENIZERS["atlas"], VOCAB["atlas"], [EOS["atlas"]])


def test_a_vocabulary_is_bytes_and_ends_where_it_should():
    vocabulary = load_vocabulary(TOKENIZERS["atlas"], VOCAB["atlas"], [2, 0])
    assert vocabulary.vocab_size == VOCAB["atlas"] and vocabulary.eos_tokens == [0, 2]
    for text in ("Größe 日本 <answer>", "\x00\x7f\xad\t"):
        assert vocabulary.decode_bytes(encode(text)) == text.encode()


def test_added_tokens_stand_for_their_own_text():
    tokenizer = Tokenizer.from_str(TOKENIZERS["atlas"].to_str())
    tokenizer.add_tokens(["two words", "日本"])
    ids = [tokenizer.token_to_id(token) for token in ("two words", "日本")]
    vocabulary = load_vocabulary(tokenizer, tokenizer.get_vocab_size(), [2])
    assert vocabulary.decode_bytes([*ids, *encode("Größe")]) == "two words日本Größe".encode()


def test_a_tokenizer_that_cannot_be_followed_is_refused():
    with pytest.raises(ArtifactError, match="has a token 4095, the policy 4095 logits"):
        load_vocabulary(TOKENIZERS["atlas"], 4095, [2])
    words = Tokenizer(WordLevel({"of": 0, "it": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    with pytest.raises(ArtifactError, match="not byte-level"):
        load_vocabulary(words, 3, [2])


def test_an_answer_that_cannot_begin_as_the_dialect_says_is_refused():
    dialect = load_dialect("qwen_agent")
    dialect = replace(dialect, syntax=replace(dialect.syntax, plain_lead="<tool_call>"))
    with pytest.raises(DialectError, match="no answer of dialect qwen_agent can begin with '<tool_call>'"):
        Grammar(dialect, TOKENIZERS["atlas"], VOCAB["atlas"], [EOS["atlas"]])


# --- thinking -------------------------------------------------------------------------------------


def thinker(budget, *, prefilled, inner=None):
    name = "qwen_agent prefilled" if prefilled else "qwen_agent"
    dialect = DIALECTS[name]
    dialect = replace(dialect, thinking=replace(dialect.thinking, budget=budget))
    return ThinkBudget(inner or GRAMMARS[name, "atlas"].turn(), dialect, TOKENIZERS["atlas"])


def say(constraint, text):
    for token in encode(text):
        assert constraint.admits([token])
        constraint.accept(token)


@pytest.mark.parametrize("inner", [None, Unconstrained()], ids=["grammar", "free"])
def test_a_long_thought_is_closed(inner):
    thought = encode("One flag is Peru's.")
    constraint = thinker(len(thought), prefilled=True, inner=inner)
    for token in thought:
        assert not constraint.forced()
        constraint.accept(token)
    cut = list(constraint.forced())
    assert TOKENIZERS["atlas"].decode(cut) == "\n</think>\n\n"
    for token in cut:
        constraint.accept(token)
    assert list(constraint.forced()) != cut  # once is enough
    say(constraint, "It is Peru.")
    assert constraint.admits([EOS["atlas"]]) and not constraint.done


def test_a_turn_of_few_tokens_spares_fewer_for_a_thought():
    thought = encode("One flag is Peru's.")
    name = "qwen_agent prefilled"
    cut = len(encode("\n</think>\n\n"))
    constraint = ThinkBudget(GRAMMARS[name, "atlas"].turn(), DIALECTS[name], TOKENIZERS["atlas"], len(thought) + cut)
    for token in thought:
        assert not constraint.forced()
        constraint.accept(token)
    assert TOKENIZERS["atlas"].decode(list(constraint.forced())) == "\n</think>\n\n"


def test_a_thought_that_ends_in_time_is_left_alone():
    constraint = thinker(50, prefilled=True)
    say(constraint, "It may be Peru.</think>\n\n")
    for token in encode("A long answer " * 20):
        assert not constraint.forced()
        constraint.accept(token)


def test_only_a_turn_that_opens_a_thought_pays_for_one():
    constraint = thinker(3, prefilled=False)
    say(constraint, "An answer that is longer than three tokens")
    assert not constraint.forced()
    constraint = thinker(3, prefilled=False)
    say(constraint, "<think>A thought that")
    assert "</think>" in TOKENIZERS["atlas"].decode(constraint.forced())


def test_a_thought_is_not_cut_inside_a_character():
    constraint = thinker(1, prefilled=True)
    parts = encode("🇵")
    assert len(parts) > 1
    constraint.accept(parts[0])
    assert not constraint.forced()
    for token in parts[1:]:
        constraint.accept(token)
    assert constraint.forced()


# --- the whole: a trained policy over the bundle's samples ----------------------------------------


@pytest.fixture(scope="module")
def atlas():
    bundle = open_bundle(DEFAULT_BUNDLE)
    encoder = Encoder.open(bundle.encoder, threads=1)
    retriever = Retriever(encoder, [Pack.open(pack, encoder) for pack in bundle.packs])
    return bundle, LocalPolicy.open(bundle.policy, 1), retriever


def turns(atlas, **decoding):
    bundle, policy, retriever = atlas
    policy = LocalPolicy(policy.model, policy.dialect, Sampling(), **decoding)
    runtime = Runtime(bundle.name, policy, Still(retriever), bundle.limits)
    for sample in bundle.samples:
        picture = sample.picture.read_bytes()
        decode_picture(picture, bundle.limits.picture)
        for question in sample.questions:
            *_, last = runtime.ask(picture, question)
            yield [(step.utterance.text, step.utterance.new_tokens) for step in last.record.steps if step.utterance]


def test_a_trained_policy_says_the_same_with_and_without_grammar_and_drafts(atlas):
    plain = list(turns(atlas, grammar=False, drafts=None))
    assert len(plain) >= 10
    assert plain == list(turns(atlas, grammar=True, drafts=None))
    assert plain == list(turns(atlas))
