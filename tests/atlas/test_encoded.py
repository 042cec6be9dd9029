import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from atlas.policy.batches import (
    CHAT,
    IGNORE,
    Encoded,
    Encoder,
    Look,
    collate,
    crop_view,
    decode_states,
    embed,
    token_loss,
)
from atlas.policy.lessons import QUESTIONS_PER_PICTURE, Lessons
from atlas.policy.model import CELL, CROP_PIXELS, add_look_back_heads, atlas_config, build_model
from atlas.policy.pointing import BOX_HEADS, COPY_HEADS, attention_loss
from atlas.policy.teacher import Turn
from atlas.policy.tokens import SPECIAL
from gog_edge.picture import Picture
from gog_edge.policy.decoding import Sampling
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.policy.local import LocalPolicy
from gog_edge.policy.manifest import TOKENIZER
from gog_edge.policy.session import Generated
from gog_edge.types import Answer, Box, Evidence, GazeSearch, Observation, SearchResult


@pytest.fixture
def tokenizer(tokenizer_file):
    return Tokenizer.from_file(str(tokenizer_file))


@pytest.fixture(scope="module")
def model(tokenizer_file):
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    special = {name: tokenizer.token_to_id(name) for name in SPECIAL}
    return build_model(atlas_config(tokenizer.get_vocab_size(), special)).eval()


def noise(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def dialogue(dialect, frame_box=(28, 0, 140, 98)):
    """Picture, gaze, crop, answer."""
    picture, crop = noise(196, 252), noise(98, 112)
    found = SearchResult((Evidence(("Peru",), (), None, 0.9),), 0.2)
    gaze, answer = GazeSearch(Box(*frame_box)), Answer("Peru <|im_end|>")
    say = [f"<reason>Left.</reason><img_search>[{','.join(str(v) for v in frame_box)}]</img_search>",
           f"<answer> {answer.text}</answer>"]  # fmt: skip
    turns = [
        Turn("user", dialect.render_question(picture, "Which flag is it? <|image_pad|>")),
        Turn("assistant", (say[0],), learn=False),
        Turn("user", dialect.render_observation(Observation(found, crop))),
        Turn("assistant", (say[1],), learn=True),
    ]
    return turns, (picture, crop, gaze, found, say)


def test_a_dialogue_has_transformers_own_positions(model, tokenizer, dialect):
    turns, (picture, crop, *_) = dialogue(dialect)
    encoded = Encoder(tokenizer, dialect.system_prompt).encode(turns)
    ids = torch.tensor([encoded.ids])
    grids = [(image.shape[0] // 14, image.shape[1] // 14) for _, image in encoded.pictures]
    image_token = tokenizer.token_to_id("<|image_pad|>")
    assert encoded.ids.count(image_token) == sum(rows * columns // 4 for rows, columns in grids) and len(grids) == 2
    own, _ = model.model.get_rope_index(
        ids, (ids == image_token).int(), image_grid_thw=torch.tensor([(1, *grid) for grid in grids])
    )
    assert np.array_equal(np.concatenate(encoded.positions, 1), own[:, 0].numpy())
    for place, image in encoded.pictures:
        cells = image.shape[0] // CELL * (image.shape[1] // CELL)
        assert encoded.ids[place : place + cells] == [image_token] * cells
    assert np.array_equal(encoded.pictures[0][1], picture)
    assert np.array_equal(encoded.pictures[1][1], crop_view(crop))


def test_a_dialogue_is_tokenised_as_the_live_session_does_it(tiny_model, policies, monkeypatch):
    dialect = load_dialect("atlas")
    turns, (picture, _, _, found, say) = dialogue(dialect)
    crop = turns[2].segments[1]
    policy = LocalPolicy(tiny_model, dialect, Sampling())
    talk = policy.begin(Picture(picture), "Which flag is it? <|image_pad|>")
    session = talk._session
    said = iter(say)

    def speak(*, on_text, **_):
        text = next(said)
        session.append_text(text)
        on_text(text)
        return Generated((), text, "end", 0, 0.0, 0.0)

    monkeypatch.setattr(session, "generate", speak)
    assert isinstance(talk.generate(max_tokens=9, deadline=None).action, GazeSearch)
    talk.observe(Observation(found, crop))
    assert talk.generate(max_tokens=9, deadline=None).action == Answer("Peru <|im_end|>")
    talk._append(talk._queued, 0)  # the last turn's end
    encoded = Encoder(Tokenizer.from_file(str(policies[True] / TOKENIZER)), dialect.system_prompt).encode(turns)
    assert session.tokens == encoded.ids
    waiting = np.concatenate([piece.positions for piece in session._waiting], 1)
    assert np.array_equal(waiting, np.concatenate(encoded.positions, 1)[:, -waiting.shape[1] :])
    assert waiting.shape[1] > 100  # both pictures among them
    talk.close()


def test_only_what_should_be_learned_is(tokenizer, dialect):
    turns, (*_, say) = dialogue(dialect)
    encoded = Encoder(tokenizer, dialect.system_prompt).encode(turns)
    learned = [token for token, label in zip(encoded.ids, encoded.labels, strict=True) if label != IGNORE]
    assert learned == [label for label in encoded.labels if label != IGNORE]
    tokenizer.encode_special_tokens = True
    assert learned == [*tokenizer.encode(say[1]).ids, tokenizer.token_to_id("<|im_end|>")]


def test_special_tokens_in_what_is_said_stay_text(tokenizer, dialect):
    encoded = Encoder(tokenizer, dialect.system_prompt).encode(dialogue(dialect)[0])
    ends = encoded.ids.count(tokenizer.token_to_id("<|im_end|>"))
    assert ends == 5  # the system's, and one for each turn
    assert encoded.ids.count(tokenizer.token_to_id("<|im_start|>")) == 5
    assert len(encoded.pictures) == 2


def test_language_lessons_leave_pictures_out(tokenizer, dialect):
    encoded = Encoder(tokenizer, dialect.system_prompt).encode(dialogue(dialect)[0], pictures=False)
    assert not encoded.pictures and tokenizer.token_to_id(CHAT.image_token) not in encoded.ids
    assert np.array_equal(np.concatenate(encoded.positions, 1), np.tile(np.arange(len(encoded.ids)), (3, 1)))


@pytest.mark.parametrize(("height", "width"), [(28, 28), (196, 252), (14, 112), (70, 77)])
def test_a_crop_is_seen_small(height, width):
    seen = crop_view(noise(height, width))
    assert seen.shape[0] % CELL == seen.shape[1] % CELL == 0 and seen.shape[0] * seen.shape[1] <= CROP_PIXELS


def test_a_batch_is_what_its_rows_are_alone(model, tokenizer, dialect):
    encoder = Encoder(tokenizer, dialect.system_prompt)
    turns = dialogue(dialect)[0]
    items, pad = [encoder.encode(turns), encoder.encode(turns[:2])], tokenizer.token_to_id("<|endoftext|>")
    batch = collate(items, pad)
    assert batch.ids.shape == batch.labels.shape == batch.positions.shape[1:] and batch.ids.shape[1] % 32 == 0
    with torch.no_grad():
        states, after = decode_states(model, embed(model, batch, tower_learns=False)[0], batch.positions)
        single = collate(items[1:], pad)
        alone, _ = decode_states(model, embed(model, single, tower_learns=False)[0], single.positions)
        loss, guess, truth = token_loss(model, states, batch.labels)
    count = len(items[1].ids)
    assert (states[1, :count] - alone[0, :count]).abs().max() < 1e-4
    assert [part.shape for part in after] == [states.shape] * model.config.text_config.num_hidden_layers
    assert len(guess) == len(truth) == int((batch.labels != IGNORE).sum())
    assert torch.isfinite(loss)


def test_a_forward_is_transformers_own(model, tokenizer, dialect):
    encoded = Encoder(tokenizer, dialect.system_prompt).encode(dialogue(dialect)[0])
    batch = collate([encoded], tokenizer.token_to_id("<|endoftext|>"))
    with torch.no_grad():
        embeds, pictures = embed(model, batch, tower_learns=False)
        states, _ = decode_states(model, embeds, batch.positions)
        own = model(inputs_embeds=embeds, position_ids=batch.positions).logits
    assert (model.lm_head(states) - own).abs().max() < 1e-4
    assert set(pictures) == {(0, place) for place, _ in encoded.pictures}
    place = encoded.pictures[1][0]
    assert torch.equal(embeds[0, place : place + len(pictures[0, place])], pictures[0, place])


@pytest.mark.parametrize("lesson", ["drill", "copy", "language", "ground", "episodes"])
def test_lessons_fill_batches(tokenizer, dialect, names, shard, lesson):
    def lessons():
        encoder = Encoder(tokenizer, dialect.system_prompt)
        return Lessons(encoder, dialect, names, seed=1).batch(shard, [lesson] * len(shard))

    encoded = lessons()
    assert len(encoded) == len(shard) and [item.ids for item in lessons()] == [item.ids for item in encoded]
    for item, count, meant in zip(encoded, shard.counts, shard.relations, strict=True):
        assert len(item.ids) == len(item.labels) == sum(part.shape[1] for part in item.positions)
        assert any(label != IGNORE for label in item.labels)
        assert bool(item.pictures) == (lesson in ("ground", "episodes"))
        if lesson == "ground" and count > 1 and (meant >= 0).any():
            assert len(item.pictures) == 1
            assert item.labels.count(tokenizer.token_to_id("<|im_end|>")) == QUESTIONS_PER_PICTURE
        for look in item.looks:  # from the mark to the turn's end, at tokens of the picture
            assert item.ids[look.writers[0]] == tokenizer.token_to_id("<img_search>")
            assert item.ids[look.writers[-1] + 1] == tokenizer.token_to_id("<|im_end|>")
            assert {item.ids[place] for place in look.targets} == {tokenizer.token_to_id("<|image_pad|>")}
        for copy in item.copies:  # the token written next is the very one that is looked at
            (writer,) = copy.writers
            assert {item.ids[place] for place in copy.targets} == {item.labels[writer + 1]}
            assert all(place <= writer for place in copy.targets)
    assert any(item.copies for item in encoded) == (lesson != "ground")


def test_a_look_is_at_the_tokens_whose_centres_lie_in_its_box():
    encoded = Encoded()
    encoded.add([5, 6])
    encoded.add_picture(noise(56, 84), 9)
    encoded.add([1, 2, 3])
    encoded.add_look(9, Box(28, 0, 84, 28))
    encoded.add_look(9, Box(0, 0, 10, 10))  # no centre lies in it
    assert [(look.writers, look.targets) for look in encoded.looks] == [((9, 10), (3, 4))]


def test_copies_are_read_wherever_the_words_stood_before():
    encoded = Encoded()
    encoded.add([7, 1, 2, 7, 1])
    encoded.add([9, 7, 1, 2], learn=True)
    encoded.add_copies([7, 1], 5)
    encoded.add_copies([3], 5)  # stands nowhere
    encoded.add_copies([9], 5)  # not said before
    assert [(look.writers, look.targets) for look in encoded.copies] == [((5,), (0, 3)), ((6,), (1, 4))]


@pytest.mark.parametrize("heads", [*BOX_HEADS, *COPY_HEADS])
def test_the_attention_that_is_taught_is_the_decoders_own(model, tokenizer, dialect, heads):
    encoded = Encoder(tokenizer, dialect.system_prompt).encode(dialogue(dialect)[0])
    meant = [Look((150,), (20, 21, 22)), Look((160, 161), (7,))]
    encoded.copies += meant
    batch = collate([encoded, Encoded([5, 6], [5, 6], [np.zeros((3, 2), np.int64)])], 0)
    layer, group = heads
    eager = model.from_pretrained(None, config=model.config, state_dict=model.state_dict(), attn_implementation="eager")
    with torch.no_grad():
        embeds, _ = embed(model, batch, tower_learns=False)
        _, after = decode_states(model, embeds, batch.positions)
        loss = attention_loss(model, heads, after[layer - 1], batch.positions, batch.copies)
        own = eager(inputs_embeds=embeds[:1], position_ids=batch.positions[:, :1], output_attentions=True).attentions
    count = model.model.language_model.layers[layer].self_attn.num_key_value_groups
    shares = own[layer][0, group * count : (group + 1) * count]  # [heads, L, L]
    right = [-shares[:, writer, list(look.targets)].sum(-1).log() for look in meant for writer in look.writers]
    assert loss.item() == pytest.approx(torch.stack(right).mean().item(), rel=1e-3)


def test_where_nothing_is_meant_nothing_is_lost(model, tokenizer, dialect):
    batch = collate([Encoder(tokenizer, dialect.system_prompt).encode(dialogue(dialect)[0])], 0)
    entering = torch.zeros(*batch.ids.shape, model.config.text_config.hidden_size)
    assert attention_loss(model, COPY_HEADS[0], entering, batch.positions, batch.copies).item() == 0


def test_heads_that_look_back_do(model):
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

    fresh = build_model(model.config)
    add_look_back_heads(fresh)
    language = fresh.model.language_model
    attention, length = language.layers[0].self_attn, 12
    group, dim = attention.num_key_value_groups, attention.head_dim
    q = attention.q_proj.bias[: group * dim].view(1, group, 1, dim).expand(-1, -1, length, -1)
    k = attention.k_proj.bias[:dim].view(1, 1, 1, dim).expand(-1, -1, length, -1)
    positions = torch.arange(length).expand(3, 1, -1)
    q, k = apply_rotary_pos_emb(q, k, *language.rotary_emb(torch.zeros(1, length, 1), positions))
    best = (q @ k.transpose(-1, -2))[0, :, -1].argmax(-1)  # of the last token, for each head
    assert best.tolist() == [length - 2 - head for head in range(group)]
