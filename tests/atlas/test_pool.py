import numpy as np
from atlas_world import flags

from atlas.policy.pool import GRIDS, Shard, draw_shard, read_shard, shard_path, stream, write_shard
from atlas.scenes import MAX_FLAGS, RELATIONS


def equal(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in Shard.__slots__)


def test_a_shard_depends_on_its_number_alone(shard):
    keys = sorted(flags())
    assert equal(draw_shard(1, flags(), keys, 2), again := draw_shard(1, flags(), keys, 2))
    assert not np.array_equal(draw_shard(2, flags(), keys, 2).boxes, again.boxes)
    assert equal(draw_shard(1, flags(), keys, 1), Shard(*(getattr(again, name)[:1] for name in Shard.__slots__)))


def test_a_shard_contains_consistent_ground_truth(shard):
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


def test_a_written_shard_is_read_unchanged(shard, tmp_path):
    write_shard(tmp_path, 7, shard)
    assert [path.name for path in tmp_path.iterdir()] == ["scenes-0007.npz"]
    assert equal(read_shard(shard_path(tmp_path, 7)), shard)


def test_a_stream_yields_every_scene_once_per_epoch(shard, tmp_path):
    for number in range(3):
        write_shard(tmp_path, number, shard)
    batches = stream(tmp_path, seed=1, batch=4, skip=1)
    one_round = [next(batches) for _ in range(6)]  # two shards of twelve
    seen = np.concatenate([batch.boxes[:, 0] for batch in one_round])
    assert sorted(map(tuple, seen)) == sorted(map(tuple, np.concatenate([shard.boxes[:, 0]] * 2)))
    again = stream(tmp_path, seed=1, batch=4, skip=1)
    assert all(equal(next(again), batch) for batch in one_round)


def test_a_stream_can_leave_out_scenes_of_many_flags(shard, tmp_path):
    write_shard(tmp_path, 0, shard)
    batches = stream(tmp_path, seed=1, batch=1, most=2)
    assert all(next(batches).counts.max() <= 2 for _ in range(20))
