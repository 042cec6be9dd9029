"""Random vectors in shard files, and exact search over them by NumPy."""

import numpy as np

DIM = 32
NO_IDS = np.empty(0, dtype=np.int64)


def unit_vectors(rows, seed=0):
    """Return random vectors [rows, DIM] float32 of unit length."""
    vectors = np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float16).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_shards(folder, ids, vectors, cut=None):
    """Write two shards of float16 vectors, the first with `cut` rows (default: half); return their paths."""
    cut, files = len(ids) // 2 if cut is None else cut, []
    for name, part in (("one", slice(0, cut)), ("two", slice(cut, None))):
        np.save(folder / f"{name}.npy", vectors[part].astype(np.float16))
        np.save(folder / f"{name}.ids.npy", ids[part])
        files.append((folder / f"{name}.npy", folder / f"{name}.ids.npy"))
    return files


def exact_ids(queries, ids, vectors, k, hidden=NO_IDS):
    """Return the k nearest distinct ids of each query that are not hidden, from all cosines."""
    scores = np.where(np.isin(ids, hidden), -np.inf, queries @ vectors.astype(np.float16).astype(np.float32).T)
    found = []
    for row in np.argsort(-scores, axis=1, kind="stable"):
        live = [ids[one] for one in row if ids[one] not in hidden]
        found.append(list(dict.fromkeys(live))[:k])
    return np.array(found)
