import numpy as np
import pytest
import torch

from atlas.policy.batches import (
    IGNORE,
    AttentionTarget,
    TokenizedTrajectory,
    TrajectoryTokenizer,
    collate,
    decode_states,
    embed,
)
from atlas.policy.losses import (
    BOX_HEADS,
    COPY_HEADS,
    DecoderBoxHead,
    DenseHead,
    attention_loss,
    decoder_box_loss,
    dense_loss,
    token_loss,
    token_targets,
)
from atlas.policy.model import CELL, build_model, init_previous_token_heads
from atlas.policy.pool import Shard
from atlas.scenes import RELATIONS
from atlas.training import WARM_UP, cosine_rate, save_state

SURE, BINS_SURE = 20.0, 50.0  # logits of a certain prediction


@pytest.fixture(scope="module")
def one_flag():
    """A picture of 2 x 2 tokens (56 x 56 pixels) whose left half is a flag that is "left1"; another flag is tiny."""
    boxes = np.zeros((1, 6, 4), np.float32)
    boxes[0, 0], boxes[0, 1] = (0, 0, 28, 56), (50, 50, 54, 54)
    relations = np.full((1, len(RELATIONS)), -1, np.int64)
    relations[0, RELATIONS.index("left1")], relations[0, RELATIONS.index("right1")] = 0, 1
    return Shard(np.zeros((1, 56, 56, 3), np.uint8), boxes, np.array([2]), relations, np.zeros((1, 6), np.bool_))


def batch_of(tokenizer, dialect, dialogue):
    return collate([TrajectoryTokenizer(tokenizer, dialect.system_prompt).encode(dialogue.turns)], 0)


def test_tokens_belong_to_the_flag_that_contains_their_centre(shard):
    owner, box, centres = token_targets(shard)
    assert owner.shape == (len(shard), len(centres)) and centres[0].tolist() == [CELL / 2, CELL / 2]
    for row in range(len(shard)):
        for token, (x, y) in enumerate(centres.tolist()):
            index = int(owner[row, token])
            inside = [a <= x < c and b <= y < d for a, b, c, d in shard.boxes[row]]
            assert (index >= 0) == any(inside) and (index < 0 or inside[index])
            assert index < 0 or box[row, token].tolist() == shard.boxes[row, index].tolist()


def test_dense_loss_of_known_predictions(one_flag):
    # The centres in raster order are (14, 14), (42, 14), (14, 42), (42, 42); sides are relative to them, in 56 pixels.
    inside = torch.tensor([[SURE, -SURE, SURE, -SURE]])
    sides = torch.zeros(1, 4, 4)
    sides[0, 0] = torch.tensor([-14, -14, 14, 42]) / 56
    sides[0, 2] = torch.tensor([-14, -42, 14, 14]) / 56
    words = torch.full((1, 4, len(RELATIONS)), -SURE)
    words[:, :, RELATIONS.index("left1")] = SURE
    count = torch.zeros(1, 4, 6)
    count[..., 1] = SURE
    loss, figures = dense_loss(lambda _: (inside, sides, words, count), torch.zeros(1), one_flag)
    assert loss < 1e-4 and figures["side_px"] < 1e-4 and figures["words"] == figures["count"] == 1
    sides[0, 0] += 7 / 56  # all four sides of one of two tokens: 7 pixels off
    words[:, :, RELATIONS.index("right1")] = SURE  # wrong for one of two words
    count[..., 2] = 2 * SURE
    _, figures = dense_loss(lambda _: (inside, sides, words, count), torch.zeros(1), one_flag)
    assert figures["side_px"] == pytest.approx(3.5, abs=1e-3) and (figures["words"], figures["count"]) == (0.5, 0)


def test_decoder_box_loss_of_known_predictions(one_flag):
    sides = torch.zeros(1, 4, 4, 41)
    for side, coordinate in enumerate((0, 0, 28, 56)):
        sides[:, :, side, coordinate // 7] = BINS_SURE
    words = torch.full((1, 4, len(RELATIONS)), -SURE)
    words[:, :, RELATIONS.index("left1")] = SURE
    loss, figures = decoder_box_loss(lambda _: (sides, words), torch.zeros(1), one_flag)
    assert loss < 1e-4 and figures == {"px": 0, "words": 1}
    sides[:, :, 3, 56 // 7 + 2] = 2 * BINS_SURE  # one of four sides: 14 pixels off
    _, figures = decoder_box_loss(lambda _: (sides, words), torch.zeros(1), one_flag)
    assert figures["px"] == pytest.approx(3.5)


def test_auxiliary_losses_reach_all_parameters(shard):
    tokens = len(token_targets(shard)[2])
    for head, loss in ((DenseHead(8), dense_loss), (DecoderBoxHead(8), decoder_box_loss)):
        loss(head, torch.randn(len(shard), tokens, 8), shard)[0].backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())


def test_token_loss_equals_transformers(model, tokenizer, dialect, dialogue):
    batch = batch_of(tokenizer, dialect, dialogue)
    with torch.no_grad():
        embeds, _ = embed(model, batch, train_tower=False)
        states, _ = decode_states(model, embeds, batch.positions)
        loss, predicted, truth = token_loss(model, states, batch.labels)
        expected = model(inputs_embeds=embeds, position_ids=batch.positions, labels=batch.labels)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)
    labelled = (batch.labels[0, 1:] != IGNORE).nonzero()[:, 0]
    assert torch.equal(predicted, expected.logits[0, labelled].argmax(-1))
    assert torch.equal(truth, batch.labels[0, 1:][labelled])


@pytest.mark.parametrize("heads", [*BOX_HEADS, *COPY_HEADS])
def test_attention_loss_equals_the_attention_of_transformers(model, tokenizer, dialect, dialogue, heads):
    trajectory = TrajectoryTokenizer(tokenizer, dialect.system_prompt).encode(dialogue.turns)
    targets = [AttentionTarget((150,), (20, 21, 22)), AttentionTarget((160, 161), (7,))]
    trajectory.copy_targets += targets
    batch = collate([trajectory, TokenizedTrajectory([5, 6], [5, 6], [np.zeros((3, 2), np.int64)])], 0)
    layer, group = heads
    eager = model.from_pretrained(None, config=model.config, state_dict=model.state_dict(), attn_implementation="eager")
    with torch.no_grad():
        embeds, _ = embed(model, batch, train_tower=False)
        _, after = decode_states(model, embeds, batch.positions)
        loss = attention_loss(model, heads, after[layer - 1], batch.positions, batch.copy_targets)
        own = eager(inputs_embeds=embeds[:1], position_ids=batch.positions[:, :1], output_attentions=True).attentions
    count = model.model.language_model.layers[layer].self_attn.num_key_value_groups
    weights = own[layer][0, group * count : (group + 1) * count]  # [heads, L, L]
    expected = [-weights[:, query, list(one.keys)].sum(-1).log() for one in targets for query in one.queries]
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-3)


def test_attention_loss_without_targets_is_zero(model, tokenizer, dialect, dialogue):
    batch = batch_of(tokenizer, dialect, dialogue)
    entering = torch.zeros(*batch.ids.shape, model.config.text_config.hidden_size)
    assert attention_loss(model, COPY_HEADS[0], entering, batch.positions, batch.copy_targets).item() == 0


def test_previous_token_heads_attend_to_previous_tokens(model):
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

    fresh = build_model(model.config)
    init_previous_token_heads(fresh)
    language = fresh.model.language_model
    attention, length = language.layers[0].self_attn, 12
    group, dim = attention.num_key_value_groups, attention.head_dim
    q = attention.q_proj.bias[: group * dim].view(1, group, 1, dim).expand(-1, -1, length, -1)
    k = attention.k_proj.bias[:dim].view(1, 1, 1, dim).expand(-1, -1, length, -1)
    positions = torch.arange(length).expand(3, 1, -1)
    q, k = apply_rotary_pos_emb(q, k, *language.rotary_emb(torch.zeros(1, length, 1), positions))
    best = (q @ k.transpose(-1, -2))[0, :, -1].argmax(-1)  # of the last token, for each head
    assert best.tolist() == [length - 2 - head for head in range(group)]


def test_the_learning_rate_warms_up_and_falls():
    rates = [cosine_rate(step, 1000, 2.0) for step in range(1200)]
    assert WARM_UP == 40 and rates[0] == pytest.approx(0.05) and max(rates) == rates[40] == 2.0
    assert rates[520] == pytest.approx(1.05)  # halfway between 2.0 and 0.1
    assert rates[40:] == sorted(rates[40:], reverse=True) and rates[1000:] == [pytest.approx(0.1)] * 200
    assert cosine_rate(40, 40, 1.0) == 1.0  # no step after the warm-up


def test_a_training_state_is_written_atomically(tmp_path):
    save_state(tmp_path / "state.pt", {"x": torch.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    assert torch.load(tmp_path / "state.pt", weights_only=True)["x"].sum() == 3
    with pytest.raises(Exception, match="pickle"):
        save_state(tmp_path / "state.pt", {"x": lambda: None})
    assert torch.load(tmp_path / "state.pt", weights_only=True)["x"].sum() == 3
