import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from atlas.policy.batches import (
    CHAT,
    IGNORE,
    TokenizedTrajectory,
    TrajectoryTokenizer,
    collate,
    crop_view,
    decode_states,
    embed,
)
from atlas.policy.model import CELL, CROP_PIXELS
from gog_edge.picture import Picture
from gog_edge.policy.decoding import SamplingParams
from gog_edge.policy.local import LocalPolicy
from gog_edge.policy.manifest import TOKENIZER
from gog_edge.policy.session import Generated
from gog_edge.types import Box, Observation


@pytest.fixture
def trajectory(tokenizer, dialect, dialogue):
    return TrajectoryTokenizer(tokenizer, dialect.system_prompt).encode(dialogue.turns)


def test_positions_equal_those_of_transformers(model, tokenizer, dialogue, trajectory):
    ids = torch.tensor([trajectory.ids])
    grids = [(pixels.shape[0] // 14, pixels.shape[1] // 14) for _, pixels in trajectory.pictures]
    image_token = tokenizer.token_to_id("<|image_pad|>")
    assert trajectory.ids.count(image_token) == sum(rows * columns // 4 for rows, columns in grids) and len(grids) == 2
    expected, _ = model.model.get_rope_index(
        ids, (ids == image_token).int(), image_grid_thw=torch.tensor([(1, *grid) for grid in grids])
    )
    assert np.array_equal(np.concatenate(trajectory.positions, 1), expected[:, 0].numpy())
    for place, pixels in trajectory.pictures:
        cells = pixels.shape[0] // CELL * (pixels.shape[1] // CELL)
        assert trajectory.ids[place : place + cells] == [image_token] * cells
    assert np.array_equal(trajectory.pictures[0][1], dialogue.picture)
    assert np.array_equal(trajectory.pictures[1][1], crop_view(dialogue.crop))


def test_tokens_equal_those_of_the_runtime_session(tiny_model, policies, dialect, dialogue, monkeypatch):
    policy = LocalPolicy(tiny_model, dialect, SamplingParams())
    conversation = policy.begin(Picture(dialogue.picture), dialogue.question)
    session = conversation._session
    texts = iter(dialogue.texts)

    def generate(*, on_text, **_):
        text = next(texts)
        session.append_text(text)
        on_text(text)
        return Generated((), text, "end", 0, 0.0, 0.0)

    monkeypatch.setattr(session, "generate", generate)
    assert conversation.generate(max_tokens=9, deadline=None).action == dialogue.gaze
    conversation.observe(Observation(dialogue.result, dialogue.turns[2].segments[1]))
    assert conversation.generate(max_tokens=9, deadline=None).action == dialogue.answer
    conversation._append(conversation._queued, 0)  # the end of the last turn
    tokenizer = Tokenizer.from_file(str(policies[True] / TOKENIZER))
    trajectory = TrajectoryTokenizer(tokenizer, dialect.system_prompt).encode(dialogue.turns)
    assert session.tokens == trajectory.ids
    pending = np.concatenate([piece.positions for piece in session._pending], 1)
    assert np.array_equal(pending, np.concatenate(trajectory.positions, 1)[:, -pending.shape[1] :])
    assert pending.shape[1] > 100  # includes both pictures
    conversation.close()


def test_only_turns_to_learn_have_labels(tokenizer, dialogue, trajectory):
    labelled = [token for token, label in zip(trajectory.ids, trajectory.labels, strict=True) if label != IGNORE]
    assert labelled == [label for label in trajectory.labels if label != IGNORE]
    tokenizer.encode_special_tokens = True
    assert labelled == [*tokenizer.encode(dialogue.texts[1]).ids, tokenizer.token_to_id("<|im_end|>")]


def test_special_tokens_in_texts_are_plain_text(tokenizer, trajectory):
    # One for the system prompt and one for each of the four turns; question and answer contain the strings too.
    assert trajectory.ids.count(tokenizer.token_to_id("<|im_end|>")) == 5
    assert trajectory.ids.count(tokenizer.token_to_id("<|im_start|>")) == 5
    assert len(trajectory.pictures) == 2


def test_pictures_can_be_left_out(tokenizer, dialect, dialogue):
    text = TrajectoryTokenizer(tokenizer, dialect.system_prompt).encode(dialogue.turns, pictures=False)
    assert not text.pictures and tokenizer.token_to_id(CHAT.image_token) not in text.ids
    assert np.array_equal(np.concatenate(text.positions, 1), np.tile(np.arange(len(text.ids)), (3, 1)))


@pytest.mark.parametrize(("height", "width"), [(28, 28), (196, 252), (14, 112), (70, 77)])
def test_crops_are_limited_in_pixels(dialogue, height, width):
    view = crop_view(dialogue.noise(height, width))
    assert view.shape[0] % CELL == view.shape[1] % CELL == 0 and view.shape[0] * view.shape[1] <= CROP_PIXELS


def test_gaze_targets_are_the_tokens_with_centres_in_the_box(dialogue):
    trajectory = TokenizedTrajectory()
    trajectory.add([5, 6])
    trajectory.add_picture(dialogue.noise(56, 84), 9)
    trajectory.add([1, 2, 3])
    trajectory.add_gaze_target(9, Box(28, 0, 84, 28))
    trajectory.add_gaze_target(9, Box(0, 0, 10, 10))  # contains no centre
    assert [(target.queries, target.keys) for target in trajectory.gaze_targets] == [((9, 10), (3, 4))]


def test_copy_targets_are_all_earlier_occurrences():
    trajectory = TokenizedTrajectory()
    trajectory.add([7, 1, 2, 7, 1])
    trajectory.add([9, 7, 1, 2], learn=True)
    trajectory.add_copy_targets([7, 1], 5)
    trajectory.add_copy_targets([3], 5)  # does not occur
    trajectory.add_copy_targets([9], 5)  # does not occur before
    assert [(one.queries, one.keys) for one in trajectory.copy_targets] == [((5,), (0, 3)), ((6,), (1, 4))]


def test_padding_does_not_change_hidden_states(model, tokenizer, dialect, dialogue):
    encoder, pad = TrajectoryTokenizer(tokenizer, dialect.system_prompt), tokenizer.token_to_id("<|endoftext|>")
    items = [encoder.encode(dialogue.turns), encoder.encode(dialogue.turns[:2])]
    batch = collate(items, pad)
    assert batch.ids.shape == batch.labels.shape == batch.positions.shape[1:] and batch.ids.shape[1] % 32 == 0
    with torch.no_grad():
        states, after = decode_states(model, embed(model, batch, train_tower=False)[0], batch.positions)
        single = collate(items[1:], pad)
        alone, _ = decode_states(model, embed(model, single, train_tower=False)[0], single.positions)
    count = len(items[1].ids)
    assert (states[1, :count] - alone[0, :count]).abs().max() < 1e-4
    assert [part.shape for part in after] == [states.shape] * model.config.text_config.num_hidden_layers


def test_forward_pass_equals_transformers(model, tokenizer, trajectory):
    batch = collate([trajectory], tokenizer.token_to_id("<|endoftext|>"))
    with torch.no_grad():
        embeds, pictures = embed(model, batch, train_tower=False)
        states, _ = decode_states(model, embeds, batch.positions)
        expected = model(inputs_embeds=embeds, position_ids=batch.positions).logits
    assert (model.lm_head(states) - expected).abs().max() < 1e-4
    assert set(pictures) == {(0, place) for place, _ in trajectory.pictures}
    place = trajectory.pictures[1][0]
    assert torch.equal(embeds[0, place : place + len(pictures[0, place])], pictures[0, place])
