import io
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from gog_edge.errors import PackError
from gog_edge.retrieval.vectors.shards import VectorShards, read_ids

DIM = 16
OPEN_FILES = Path("/proc/self/fd")


def unit(rows, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def shard(folder, name, ids, vectors):
    np.save(folder / f"{name}.npy", vectors)
    np.save(folder / f"{name}.ids.npy", ids)
    return folder / f"{name}.npy", folder / f"{name}.ids.npy"


def two_shards(folder, ids, vectors, cut):
    return VectorShards.open(
        [shard(folder, "one", ids[:cut], vectors[:cut]), shard(folder, "two", ids[cut:], vectors[cut:])], DIM
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_are_read_across_shards_in_any_order_and_more_than_once(tmp_path, dtype):
    vectors, ids = unit(30).astype(dtype), np.arange(30, dtype=np.int64) * 2 + 100
    shards = two_shards(tmp_path, ids, vectors, 11)
    assert len(shards) == 30 and shards.dim == DIM and shards.is_float16 == (dtype == np.float16)
    for rows in ([29, 0, 11, 10, 10], list(range(30)), [5], []):
        taken = shards.take(rows)
        assert taken.dtype == np.float32
        np.testing.assert_array_equal(taken, vectors[np.array(rows, dtype=np.int64)].astype(np.float32))
    np.testing.assert_array_equal(shards.ids_of(np.array([[0, -1], [29, 3]])), [[100, -1], [158, 106]])


def test_every_finite_float16_is_converted_exactly(tmp_path):
    bits = np.arange(65_536, dtype=np.uint16)
    values = bits.view(np.float16)
    values = np.where(np.isfinite(values), values, np.float16(0)).reshape(-1, DIM)
    shards = VectorShards.open([shard(tmp_path, "all", np.arange(len(values)), values)], DIM)
    np.testing.assert_array_equal(shards.take(np.arange(len(values))), values.astype(np.float32))


def test_blocks_cover_all_rows_from_the_given_start(tmp_path):
    vectors = unit(30)
    shards = two_shards(tmp_path, np.arange(30), vectors, 11)
    blocks = list(shards.blocks(start=4, rows=8))
    assert [len(block) for block in blocks] == [8, 8, 8, 2]
    np.testing.assert_array_equal(np.concatenate(blocks), vectors[4:])


@pytest.mark.parametrize("shuffled", [False, True])
def test_ids_may_repeat_in_any_order(tmp_path, shuffled):
    ids = np.array([1, 1, 4, 7, 7, 7, 9], dtype=np.int64)
    if shuffled:
        ids = ids[[6, 3, 0, 2, 4, 1, 5]]
    shards = two_shards(tmp_path, ids, unit(7), 3)
    assert shards.has_repeated_ids and shards.id_count == 4
    wanted = [7, 8, 1, -5, 9]
    first = [np.flatnonzero(ids == one)[0] if one in ids else -1 for one in wanted]
    assert shards.first_rows(wanted).tolist() == first
    assert sorted(shards.rows_of([7, 9, 3, 7]).tolist()) == np.flatnonzero(np.isin(ids, [7, 9])).tolist()
    assert shards.first_rows([]).tolist() == [] and shards.rows_of([]).tolist() == []


def test_no_shards_and_empty_shards_can_be_opened(tmp_path):
    shards = VectorShards.open([], DIM)
    assert len(shards) == 0 and shards.take([]).shape == (0, DIM) and list(shards.blocks()) == []
    assert shards.first_rows([3]).tolist() == [-1] and shards.id_count == 0 and not shards.has_repeated_ids
    assert shards.ids_of(np.array([-1])).tolist() == [-1]
    empty = VectorShards.open([shard(tmp_path, "none", np.empty(0, np.int64), unit(0))], DIM)
    assert len(empty) == 0 and list(empty.blocks()) == []


@pytest.mark.parametrize(
    ("ids", "vectors"),
    [
        (np.array([1.0, 2.0]), unit(2)),
        (np.array([1]), unit(2)),
        (np.array([1, 2]), unit(2).astype(np.float64)),
        (np.array([1, 2]), unit(2)[:, :8]),
        (np.array([1, 2]), np.asfortranarray(unit(2))),
        (np.array([1, 2]), np.array([{}, {}], dtype=object)),
        (np.array([{}, {}], dtype=object), unit(2)),
    ],
)
def test_other_dtypes_and_shapes_are_refused(tmp_path, ids, vectors):
    with pytest.raises(PackError):
        VectorShards.open([shard(tmp_path, "one", ids, vectors)], DIM)


def test_shards_with_both_dtypes_are_refused(tmp_path):
    one = shard(tmp_path, "one", np.array([1]), unit(1))
    files = [one, shard(tmp_path, "two", np.array([2]), unit(1).astype(np.float16))]
    with pytest.raises(PackError, match="two.npy' must have dtype float32 .* got float16"):
        VectorShards.open(files, DIM)


def test_damaged_files_are_named_and_all_files_are_closed(tmp_path):
    vectors, ids = shard(tmp_path, "one", np.arange(9), unit(9))
    good = shard(tmp_path, "good", np.arange(9), unit(9))
    whole = vectors.read_bytes()
    before = len(list(OPEN_FILES.iterdir()))
    for damaged in (whole[:-7], whole[:20], b"", whole + b"more"):
        vectors.write_bytes(damaged)
        with pytest.raises(PackError, match="one.npy"):
            VectorShards.open([good, (vectors, ids)], DIM)
    with pytest.raises(PackError, match=r"two\.npy"):
        VectorShards.open([(tmp_path / "two.npy", ids)], DIM)
    assert len(list(OPEN_FILES.iterdir())) == before


def test_a_file_that_is_truncated_while_it_is_open_is_detected(tmp_path):
    vectors, ids = shard(tmp_path, "one", np.arange(9), unit(9))
    shards = VectorShards.open([(vectors, ids)], DIM)
    os.truncate(vectors, 200)
    with pytest.raises(PackError, match="was truncated while it was open"):
        shards.take([8])


def npz(ids):
    stream = io.BytesIO()
    np.savez(stream, ids=ids)
    return stream.getvalue()


def npy_file(array, shape=None):
    stream = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(stream, header if shape is None else header | {"shape": shape})
    return stream.getvalue() + array.tobytes()


IDS = np.arange(9, dtype=np.int64)


@pytest.mark.parametrize(
    "data",
    [
        npz(IDS),
        b"",
        b"no array",
        npy_file(IDS)[:-3],
        npy_file(IDS)[:40],
        npy_file(IDS, (2**59,)),
        npy_file(IDS, (10**30,)),
        npy_file(IDS.astype(np.int32)),
        npy_file(IDS.astype(">i8")),
        npy_file(IDS.reshape(3, 3)),
        npy_file(np.int64(3)),
    ],
    ids=["npz", "empty", "text", "short", "header", "huge", "overflow", "int32", "big-endian", "2-D", "scalar"],
)
def test_files_without_valid_ids_are_refused(tmp_path, data):
    path = tmp_path / "ids.npy"
    path.write_bytes(data)
    with pytest.raises(PackError, match="ids.npy"):
        read_ids(path)
    vectors, _ = shard(tmp_path, "one", IDS, unit(9))
    with pytest.raises(PackError, match="ids.npy"):
        VectorShards.open([(vectors, path)], DIM)


def test_ids_are_read_as_they_were_written(tmp_path):
    _, ids = shard(tmp_path, "one", IDS, unit(9))
    np.testing.assert_array_equal(read_ids(ids), IDS)
    with pytest.raises(PackError, match="two.npy"):
        read_ids(tmp_path / "two.npy")


@pytest.mark.parametrize("shuffled", [False, True])
def test_rows_of_few_and_of_many_ids_are_complete(tmp_path, shuffled):
    random = np.random.default_rng(5)
    ids = np.sort(random.integers(0, 4000, 9000))
    shards = two_shards(tmp_path, random.permutation(ids) if shuffled else ids, unit(9000), 3000)
    for count in (1, 60, 80, 3000):
        wanted = random.choice(5000, count, replace=False)
        np.testing.assert_array_equal(np.sort(shards.rows_of(wanted)), np.flatnonzero(np.isin(shards.ids, wanted)))


def test_opening_repeatedly_does_not_raise_the_file_limit_again(tmp_path):
    files = [shard(tmp_path, str(number), np.arange(1), unit(1)) for number in range(20)]
    VectorShards.open(files, DIM)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    for _ in range(100):
        VectorShards.open(files, DIM)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
