"""Conversations of a local policy: what they append, generate and reuse."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from gog_edge.errors import BudgetExceeded, PictureError
from gog_edge.picture import Picture
from gog_edge.policy.base import Policy
from gog_edge.policy.decoding import SamplingParams
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.policy.local import LocalPolicy
from gog_edge.policy.model import Decoder
from gog_edge.types import Answer, Evidence, Observation, SearchResult

QUESTION = "Which country's flag is the second from the left?"


def picture(seed=0, height=200, width=260):
    return Picture(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def found(crop=None):
    return Observation(result=SearchResult((Evidence(("Peru",), (), None, 0.9),), 0.8), crop=crop)


@pytest.fixture(scope="module")
def policy(policies) -> Policy:
    return LocalPolicy.open(policies[True], 1)


@pytest.fixture
def conversation(policy):
    conversation = policy.begin(picture(), QUESTION)
    yield conversation
    conversation.close()


def generate(conversation, **options):
    return conversation.generate(**{"max_tokens": 6, "deadline": None, **options})


def test_an_utterance_has_text_token_counts_and_times(conversation):
    pieces = []
    utterance = generate(conversation, on_text=pieces.append)
    assert utterance.text == "".join(pieces)
    assert utterance.new_tokens <= 6 and utterance.prompt_tokens > 40
    assert utterance.action is None and utterance.malformed  # random weights write no action
    assert utterance.prefill_ms > 0


def test_a_forced_answer_opens_with_the_answer_tag(conversation):
    utterance = generate(conversation, force_answer=True)
    assert utterance.text.startswith("<answer>")
    assert isinstance(utterance.action, Answer) or "empty" in utterance.malformed


def test_the_session_equals_the_rendered_chat_template(policy, conversation):
    from jinja2 import Template

    dialect, tokenizer = policy.dialect, policy.model.decoder.tokenizer
    utterance = generate(conversation)
    crop = picture(1, 80, 120).pixels
    conversation.observe(found(crop))
    generate(conversation)

    def content(segments):
        return [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in segments]

    asked = dialect.render_question(picture().pixels, QUESTION)
    messages = [
        {"role": "system", "content": dialect.system_prompt},
        {"role": "user", "content": content(asked)},
        {"role": "assistant", "content": utterance.text},
        {"role": "user", "content": content(dialect.render_observation(found(crop)))},
    ]
    from tiny_policy import TEMPLATE

    expected = Template(TEMPLATE, trim_blocks=True, lstrip_blocks=True).render(
        messages=messages, add_generation_prompt=True
    )
    text = tokenizer.decode(conversation._session.tokens, skip_special_tokens=False)
    while "<|image_pad|><|image_pad|>" in text:
        text = text.replace("<|image_pad|><|image_pad|>", "<|image_pad|>")
    assert text.startswith(expected)


def test_later_turns_prefill_only_new_tokens(conversation):
    generate(conversation)
    session = conversation._session
    before = session.num_cached
    conversation.observe(found())
    second = generate(conversation)
    assert second.prompt_tokens == len(session.tokens) - before - second.new_tokens


def test_observe_computes_nothing(policy, conversation):
    generate(conversation)
    before, encoded = conversation._session.num_processed, policy.model.vision.encoded
    conversation.observe(found(picture(9, 60, 60).pixels))
    assert (conversation._session.num_processed, policy.model.vision.encoded) == (before, encoded)


def test_crops_are_resized_to_the_crop_limit(policy, conversation):
    generate(conversation)
    tokens = len(conversation._session.tokens)
    conversation.observe(found(picture(5, 300, 400).pixels))
    generate(conversation)
    image = policy.model.manifest.image_token
    spec = policy.model.manifest.vision
    assert 0 < conversation._session.tokens[tokens:].count(image) <= spec.crop_max_pixels // spec.factor**2


def test_sessions_are_reused_and_the_system_prompt_is_computed_once(policy):
    first = policy.begin(picture(), QUESTION)
    once = generate(first)
    session = first._session
    first.close()
    first.close()
    second = policy.begin(picture(), QUESTION)
    assert second._session is session
    again = generate(second)
    assert (again.text, again.prompt_tokens) == (once.text, once.prompt_tokens)
    second.close()


def test_parallel_conversations_generate_the_same_as_sequential_ones(policy):
    def converse(seed):
        conversation = policy.begin(picture(seed), QUESTION)
        texts = [generate(conversation).text]
        conversation.observe(found())
        texts.append(generate(conversation).text)
        conversation.close()
        return texts

    sequential = [converse(seed) for seed in range(3)]
    parallel = [None] * 3
    threads = [threading.Thread(target=lambda i=i: parallel.__setitem__(i, converse(i))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert parallel == sequential


def test_an_answer_can_be_forced_when_the_context_is_full(policies):
    policy = LocalPolicy.open(policies[True], 1, context=900)
    conversation = policy.begin(picture(), QUESTION)
    generate(conversation)
    for _ in range(50):
        conversation.observe(found(picture(3, 150, 150).pixels))
        conversation.observe(Observation(notice="malformed", detail="x" * 100))
        try:
            generate(conversation)
        except BudgetExceeded as full:
            assert "900" in str(full)
            break
    else:
        pytest.fail("fifty turns fit into 900 tokens")
    utterance = generate(conversation, force_answer=True)
    assert utterance.text.startswith("<answer>") and utterance.new_tokens > 0


def test_a_notice_after_a_queued_turn_becomes_part_of_it(policy, conversation):
    user = policy.model.manifest.chat.user_open
    conversation.observe(Observation(notice="malformed", detail="one"))
    generate(conversation)
    conversation.observe(Observation(notice="malformed", detail="two"))
    conversation.observe(Observation(notice="malformed", detail="three"))
    generate(conversation)
    text = policy.model.decoder.tokenizer.decode(conversation._session.tokens, skip_special_tokens=False)
    first, last = (turn.partition(policy.model.manifest.chat.user_close)[0] for turn in text.split(user)[1:])
    assert QUESTION in first and "one" in first and "two" not in first
    assert last == "\n".join(policy.dialect.notices["malformed"].replace("{detail}", n) for n in ("two", "three"))


def test_a_crop_that_is_too_narrow_leaves_the_conversation_unchanged(conversation):
    first = generate(conversation)
    tokens = len(conversation._session.tokens)
    conversation.observe(found(np.zeros((3, 900, 3), np.uint8)))
    with pytest.raises(PictureError, match="too narrow"):
        generate(conversation)
    assert first.new_tokens and len(conversation._session.tokens) == tokens
    assert generate(conversation, force_answer=True).text.startswith("<answer>")


def test_a_turn_with_enough_tokens_is_always_an_action(policies):
    policy = LocalPolicy.open(policies[True], 1, sampling=SamplingParams(temperature=6.0, seed=2))
    for seed in range(4):
        conversation = policy.begin(picture(seed), QUESTION)
        utterance = generate(conversation, max_tokens=400)
        assert utterance.action is not None or utterance.new_tokens == 400


def thinking(model, budget):
    """Return a policy whose chat template opens the thinking."""
    chat = replace(model.manifest.chat, assistant_open=model.manifest.chat.assistant_open + "<think>\n")
    manifest = replace(model.manifest, chat=chat)
    decoder = Decoder(model.decoder.engine, manifest, model.decoder.table, model.decoder.tokenizer)
    dialect = load_dialect("gog")
    dialect = replace(dialect, thinking=replace(dialect.thinking, open="<think>", budget=budget))
    return LocalPolicy(replace(model, manifest=manifest, decoder=decoder), dialect, SamplingParams())


def test_thinking_is_closed_when_its_budget_is_used(tiny_model):
    conversation, pieces = thinking(tiny_model, 8).begin(picture(), QUESTION), []
    utterance = generate(conversation, max_tokens=40, on_text=pieces.append)
    thought, closing, rest = utterance.text.partition("\n</think>\n\n")
    assert thought and closing and "".join(pieces) == utterance.text
    assert rest.lstrip().startswith("<"[: len(rest)])  # an action begins


def test_a_forced_answer_closes_the_thinking_first(tiny_model):
    conversation = thinking(tiny_model, 8).begin(picture(), QUESTION)
    utterance = generate(conversation, force_answer=True)
    assert utterance.text.startswith("</think>\n\n<answer>") and isinstance(utterance.action, Answer)
