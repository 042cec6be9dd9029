import numpy as np
import pytest
import torch
from atlas_world import flags

from atlas.policy.absolute import BINS, AbsoluteHead, absolute_loss
from atlas.policy.dense import OFFSET_UNIT, DenseHead, dense_loss, token_truth
from atlas.policy.model import CELL
from atlas.policy.pool import GRIDS, Shard, draw_shard, read_shard, shard_path, stream, write_shard
from atlas.policy.schedule import WARM_UP, cosine_rate, save_state
from atlas.policy.teacher import SNAP
from atlas.scenes import MAX_FLAGS, RELATIONS


def equal(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in Shard.__slots__)


def test_a_shard_follows_from_its_number(shard):
    keys = sorted(flags())
    assert equal(draw_shard(1, flags(), keys, 2), again := draw_shard(1, flags(), keys, 2))
    assert not np.array_equal(draw_shard(2, flags(), keys, 2).boxes, again.boxes)
    assert equal(draw_shard(1, flags(), keys, 1), Shard(*(getattr(again, name)[:1] for name in Shard.__slots__)))


def test_a_shard_holds_the_truth_of_its_pictures(shard):
    count, height, width = shard.pictures.shape[:3]
    assert (width, height) in [(grid[0].width, grid[0].height) for grid in GRIDS]
    assert shard.boxes.shape == (count, MAX_FLAGS, 4) and shard.relations.shape == (count, len(RELATIONS))
    for row in range(count):
        flags_here = int(shard.counts[row])
        assert 1 <= flags_here <= MAX_FLAGS and not shard.boxes[row, flags_here:].any()
        boxes = shard.boxes[row, :flags_here]
        assert (boxes[:, 2:] - boxes[:, :2] > 10).all()
        assert (boxes > -8).all() and (boxes < [width + 8, height + 8] * 2).all()
        assert shard.relations[row].max() < flags_here and not shard.occluded[row, flags_here:].any()
        left = shard.relations[row, RELATIONS.index("left1")]
        assert left < 0 or left == np.argmin(boxes[:, 0] + boxes[:, 2])


def test_a_shard_survives_its_file(shard, tmp_path):
    write_shard(tmp_path, 7, shard)
    assert [path.name for path in tmp_path.iterdir()] == ["scenes-0007.npz"]
    assert equal(read_shard(shard_path(tmp_path, 7)), shard)


def test_a_stream_serves_every_scene_once_a_round(shard, tmp_path):
    for number in range(3):
        write_shard(tmp_path, number, shard)
    batches = stream(tmp_path, seed=1, batch=4, skip=1)
    one_round = [next(batches) for _ in range(6)]  # two shards of twelve
    seen = np.concatenate([batch.boxes[:, 0] for batch in one_round])
    assert sorted(map(tuple, seen)) == sorted(map(tuple, np.concatenate([shard.boxes[:, 0]] * 2)))
    again = stream(tmp_path, seed=1, batch=4, skip=1)
    assert all(equal(next(again), batch) for batch in one_round)


def test_a_stream_can_leave_crowded_scenes_out(shard, tmp_path):
    write_shard(tmp_path, 0, shard)
    batches = stream(tmp_path, seed=1, batch=1, most=2)
    assert all(next(batches).counts.max() <= 2 for _ in range(20))


def test_tokens_know_the_flag_they_lie_in(shard):
    owner, box, centres = token_truth(shard)
    assert owner.shape == (len(shard), len(centres)) and centres[0].tolist() == [CELL / 2, CELL / 2]
    for row in range(len(shard)):
        for token, (x, y) in enumerate(centres.tolist()):
            index = int(owner[row, token])
            x0, y0, x1, y1 = shard.boxes[row, index] if index >= 0 else (0, 0, 0, 0)
            inside = [a <= x < c and b <= y < d for a, b, c, d in shard.boxes[row]]
            assert (index >= 0) == any(inside) and (index < 0 or inside[index])
            assert index < 0 or box[row, token].tolist() == [x0, y0, x1, y1]


def test_the_dense_loss_is_small_where_the_head_is_right(shard):
    owner, box, centres = token_truth(shard)
    meant = torch.from_numpy(shard.relations)
    truth = (
        torch.where(owner >= 0, 20.0, -20.0),
        (box - torch.cat([centres, centres], -1)) / OFFSET_UNIT,
        torch.where(meant[:, None, :] == owner[..., None], 20.0, -20.0),
        torch.nn.functional.one_hot(torch.from_numpy(shard.counts) - 1, MAX_FLAGS)[:, None] * 30.0
        + torch.zeros(*owner.shape, MAX_FLAGS),
    )
    loss, figures = dense_loss(lambda tokens: truth, torch.zeros(1), shard)
    assert loss < 1e-4 and figures["side_px"] < 1e-3 and figures["words"] == figures["count"] == 1
    head = DenseHead(8)
    loss, figures = dense_loss(head, torch.randn(*owner.shape, 8), shard)
    loss.backward()
    assert loss > 0.5 and all(parameter.grad is not None for parameter in head.parameters())


def test_the_absolute_loss_is_small_where_the_head_is_right(shard):
    owner, box, _ = token_truth(shard)
    height, width = shard.pictures.shape[1:3]
    bins = (torch.minimum(box.clamp(min=0), torch.tensor([width, height] * 2)) / SNAP).round().long()
    assert bins.max() < BINS
    meant = torch.from_numpy(shard.relations)
    words = torch.where(meant[:, None, :] == owner[..., None], 20.0, -20.0)
    sides = torch.nn.functional.one_hot(bins, BINS) * 50.0
    loss, figures = absolute_loss(lambda states: (sides, words), torch.zeros(1), shard)
    assert loss < 1e-4 and figures == {"px": 0, "words": 1}
    loss, figures = absolute_loss(AbsoluteHead(8), torch.randn(*owner.shape, 8), shard)
    assert loss > 1 and figures["px"] > SNAP


def test_the_rate_warms_up_and_falls():
    rates = [cosine_rate(step, 1000, 2.0) for step in range(1200)]
    assert rates[0] == pytest.approx(2.0 / WARM_UP) and max(rates) == rates[WARM_UP] == 2.0
    assert rates[WARM_UP:] == sorted(rates[WARM_UP:], reverse=True) and rates[1000:] == [pytest.approx(0.1)] * 200
    assert cosine_rate(WARM_UP, WARM_UP, 1.0) == 1.0  # no steps after the warm-up: no division by nothing


def test_a_state_is_written_whole(tmp_path):
    save_state(tmp_path / "state.pt", {"x": torch.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    assert torch.load(tmp_path / "state.pt", weights_only=True)["x"].sum() == 3
