import pytest

from atlas.policy.batches import IGNORE, TrajectoryTokenizer
from atlas.policy.tasks import QUESTIONS_PER_PICTURE, TaskSampler
from atlas.train_policy import parse_mix


@pytest.mark.parametrize("task", ["drill", "copy", "language", "ground", "episodes"])
def test_tasks_have_labels_and_attention_targets(tokenizer, dialect, names, shard, task):
    def sample():
        encoder = TrajectoryTokenizer(tokenizer, dialect.system_prompt)
        return TaskSampler(encoder, dialect, names, seed=1).batch(shard, [task] * len(shard))

    trajectories = sample()
    assert len(trajectories) == len(shard) and [one.ids for one in sample()] == [one.ids for one in trajectories]
    token = tokenizer.token_to_id
    for item, count, meant in zip(trajectories, shard.counts, shard.relations, strict=True):
        assert len(item.ids) == len(item.labels) == sum(part.shape[1] for part in item.positions)
        assert any(label != IGNORE for label in item.labels)
        assert bool(item.pictures) == (task in ("ground", "episodes"))
        if task == "ground" and count > 1 and (meant >= 0).any():
            assert len(item.pictures) == 1
            assert item.labels.count(token("<|im_end|>")) == QUESTIONS_PER_PICTURE
        for target in item.gaze_targets:  # queries from the tag to the end of the turn, keys in the picture
            assert item.ids[target.queries[0]] == token("<img_search>")
            assert item.ids[target.queries[-1] + 1] == token("<|im_end|>")
            assert {item.ids[place] for place in target.keys} == {token("<|image_pad|>")}
        for target in item.copy_targets:  # every key is an earlier occurrence of the token that is written next
            (query,) = target.queries
            assert {item.ids[place] for place in target.keys} == {item.labels[query + 1]}
            assert all(place <= query for place in target.keys)
    assert any(item.copy_targets for item in trajectories) == (task != "ground")


def test_the_shares_of_tasks_are_parsed():
    assert parse_mix("ground=0.5,episodes=0.25") == {"ground": 0.5, "episodes": 0.25}
    with pytest.raises(Exception, match="a task must be one of drill, copy, .* got 'grounding'"):
        parse_mix("grounding=1")
