import threading
from dataclasses import replace

import numpy as np
import pytest

from gog_edge.errors import BudgetExceeded, PictureError
from gog_edge.picture import Picture
from gog_edge.policy.base import Policy
from gog_edge.policy.decoding import Sampling
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


def test_a_turn_is_told_with_its_costs(conversation):
    pieces = []
    said = generate(conversation, on_text=pieces.append)
    assert said.text == "".join(pieces)
    assert said.new_tokens <= 6 and said.prompt_tokens > 40
    assert said.action is None and said.malformed  # random weights speak no dialect
    assert said.prefill_ms > 0


def test_a_forced_turn_opens_with_the_answer_tag(conversation):
    said = generate(conversation, force_answer=True)
    assert said.text.startswith("<answer>")
    assert isinstance(said.action, Answer) or "empty" in said.malformed


def test_the_session_holds_what_the_chat_template_renders(policy, conversation):
    from jinja2 import Template

    dialect, tokenizer = policy.dialect, policy.model.decoder.tokenizer
    said = generate(conversation)
    crop = picture(1, 80, 120).pixels
    conversation.observe(found(crop))
    generate(conversation)

    def content(segments):
        return [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in segments]

    asked = dialect.render_question(picture().pixels, QUESTION)
    messages = [
        {"role": "system", "content": dialect.system_prompt},
        {"role": "user", "content": content(asked)},
        {"role": "assistant", "content": said.text},
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


def test_later_turns_prefill_only_what_is_new(conversation):
    generate(conversation)
    session = conversation._session
    before = session.computed
    conversation.observe(found())
    second = generate(conversation)
    assert second.prompt_tokens == len(session.tokens) - before - second.new_tokens


def test_nothing_is_computed_by_observe(policy, conversation):
    generate(conversation)
    before, encoded = conversation._session.prefilled, policy.model.vision.encoded
    conversation.observe(found(picture(9, 60, 60).pixels))
    assert (conversation._session.prefilled, policy.model.vision.encoded) == (before, encoded)


def test_crops_have_the_crop_budget(policy, conversation):
    generate(conversation)
    tokens = len(conversation._session.tokens)
    conversation.observe(found(picture(5, 300, 400).pixels))
    generate(conversation)
    image = policy.model.manifest.image_token
    spec = policy.model.manifest.vision
    assert 0 < conversation._session.tokens[tokens:].count(image) <= spec.crop_max_pixels // spec.factor**2


def test_the_system_prompt_is_computed_once_and_caches_are_reused(policy):
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


def test_conversations_in_threads_say_what_they_say_alone(policy):
    def talk(seed):
        conversation = policy.begin(picture(seed), QUESTION)
        texts = [generate(conversation).text]
        conversation.observe(found())
        texts.append(generate(conversation).text)
        conversation.close()
        return texts

    alone = [talk(seed) for seed in range(3)]
    together = [None] * 3
    threads = [threading.Thread(target=lambda i=i: together.__setitem__(i, talk(i))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_when_the_context_is_full_an_answer_can_still_be_forced(policies):
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
        pytest.fail("fifty turns fitted 900 tokens")
    said = generate(conversation, force_answer=True)
    assert said.text.startswith("<answer>") and said.new_tokens > 0


def test_a_notice_on_top_of_what_waits_belongs_to_its_turn(policy, conversation):
    user = policy.model.manifest.chat.user_open
    conversation.observe(Observation(notice="malformed", detail="one"))
    generate(conversation)
    conversation.observe(Observation(notice="malformed", detail="two"))
    conversation.observe(Observation(notice="malformed", detail="three"))
    generate(conversation)
    text = policy.model.decoder.tokenizer.decode(conversation._session.tokens, skip_special_tokens=False)
    asked, told = (turn.partition(policy.model.manifest.chat.user_close)[0] for turn in text.split(user)[1:])
    assert QUESTION in asked and "one" in asked and "two" not in asked
    assert told == "\n".join(policy.dialect.notices["malformed"].replace("{detail}", n) for n in ("two", "three"))


def test_a_picture_that_cannot_be_looked_at_leaves_the_conversation_whole(conversation):
    first = generate(conversation)
    tokens = len(conversation._session.tokens)
    conversation.observe(found(np.zeros((3, 900, 3), np.uint8)))
    with pytest.raises(PictureError, match="too thin"):
        generate(conversation)
    assert first.new_tokens and len(conversation._session.tokens) == tokens
    assert generate(conversation, force_answer=True).text.startswith("<answer>")


def test_a_turn_with_room_enough_is_always_an_action(policies):
    policy = LocalPolicy.open(policies[True], 1, sampling=Sampling(temperature=6.0, seed=2))
    for seed in range(4):
        conversation = policy.begin(picture(seed), QUESTION)
        said = generate(conversation, max_tokens=400)
        assert said.action is not None or said.new_tokens == 400


def thinking(model, budget):
    """The same policy behind a template that opens a thought."""
    chat = replace(model.manifest.chat, assistant_open=model.manifest.chat.assistant_open + "<think>\n")
    manifest = replace(model.manifest, chat=chat)
    decoder = Decoder(model.decoder.engine, manifest, model.decoder.table, model.decoder.tokenizer)
    dialect = load_dialect("gog")
    dialect = replace(dialect, thinking=replace(dialect.thinking, open="<think>", budget=budget))
    return LocalPolicy(replace(model, manifest=manifest, decoder=decoder), dialect, Sampling())


def test_a_policy_that_never_stops_thinking_is_made_to_act(tiny_model):
    conversation, pieces = thinking(tiny_model, 8).begin(picture(), QUESTION), []
    said = generate(conversation, max_tokens=40, on_text=pieces.append)
    thought, mark, rest = said.text.partition("\n</think>\n\n")
    assert thought and mark and "".join(pieces) == said.text
    assert rest.lstrip().startswith("<"[: len(rest)])  # on to a tag


def test_an_answer_forced_on_a_thinking_policy_closes_the_thought_first(tiny_model):
    conversation = thinking(tiny_model, 8).begin(picture(), QUESTION)
    said = generate(conversation, force_answer=True)
    assert said.text.startswith("</think>\n\n<answer>") and isinstance(said.action, Answer)
