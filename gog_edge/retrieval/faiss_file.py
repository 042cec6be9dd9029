"""FAISS files of packs, which may come from anywhere: read within limits, searched with parameters of their kind."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss

from gog_edge.errors import PackError

_faiss: Any = faiss  # its type stubs lack the search parameters
KINDS = (faiss.IndexIVF, faiss.IndexHNSW, faiss.IndexFlatCodes)  # that are searched
KINDS_SAID = "inverted lists, HNSW graphs and flat codes, nothing around them"
LISTS = b"Iw"  # how files of inverted lists begin, whatever their codes
_READING = threading.Lock()  # FAISS's limits are the process's


def read_index(path: Path) -> Any:
    """Open a FAISS index, mapped where its kind can be searched so.

    Raises:
        PackError: it is no index, claims to hold more than the file has bytes, is of a kind that is not searched here,
            does not compare by inner product, or its parts are not of each other.
    """
    try:
        with _READING, _limits(path.stat().st_size):
            index = faiss.read_index(str(path), 0 if _has_lists(path) else faiss.IO_FLAG_MMAP_IFC)
    except (OSError, RuntimeError, MemoryError) as exc:
        raise PackError(f"pack: '{path}' is no index that can be opened ({exc}); build the pack again") from exc
    if not isinstance(index, KINDS):
        raise PackError(f"pack: '{path}' is a {type(index).__name__}; searched are {KINDS_SAID}; build the pack again")
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise PackError(f"pack: '{path}' does not compare by inner product; build the pack again")
    _check_parts(path, index)
    if isinstance(index, faiss.IndexIVFFastScan):
        index.implem = 10  # query by query: a sixth quicker here than list by list, FAISS's choice for batches
    return index


def _has_lists(path: Path) -> bool:
    """Whether it is one of inverted lists: those are copied from a mapping, which then stays in memory beside them."""
    with path.open("rb") as file:
        return file.read(len(LISTS)) == LISTS


def _check_parts(path: Path, index: Any) -> None:
    """What FAISS itself looks at differs from release to release; where parts disagree it reads memory not its own."""
    if isinstance(index, faiss.IndexIVF):
        _agree(path, "lists with centroids", index.nlist, index.quantizer.ntotal)
        _agree(path, "dimensions of centroids", index.d, index.quantizer.d)
    elif isinstance(index, faiss.IndexHNSW):
        _agree(path, "vectors in its graph", index.ntotal, index.storage.ntotal)
        _agree(path, "dimensions in its graph", index.d, index.storage.d)
        _check_parts(path, faiss.downcast_index(index.storage))
    elif isinstance(index, faiss.IndexFlatCodes):
        _agree(path, "bytes of codes", index.ntotal * index.code_size, index.codes.size())


def _agree(path: Path, what: str, said: int, held: int) -> None:
    if said != held:
        raise PackError(f"pack: '{path}' says that it has {said} {what}, and has {held}; copy or build the pack again")


def search_params(
    index: Any, params: Mapping[str, int], *, selector: Any = None, wider: int = 1, count: int = 1
) -> Any:
    """Search parameters of the index's own kind, for one call; `wider` multiplies what is looked at.

    Raises:
        PackError: the index does not know a parameter, or it is not positive.
    """
    known = "nprobe" if isinstance(index, faiss.IndexIVF) else "efSearch" if isinstance(index, faiss.IndexHNSW) else ""
    if any(name != known or value < 1 for name, value in params.items()):
        raise PackError(f"pack: search parameters {dict(params)} for a {type(index).__name__}; it takes '{known}' >= 1")
    if known == "nprobe":
        lists = wider * params.get(known, index.nprobe)
        return _faiss.SearchParametersIVF(sel=selector, nprobe=min(index.nlist, lists))
    if known == "efSearch":
        effort = wider * params.get(known, index.hnsw.efSearch)
        return _faiss.SearchParametersHNSW(sel=selector, efSearch=max(effort, count))
    return _faiss.SearchParameters(sel=selector)


@contextmanager
def omp_threads(count: int) -> Iterator[None]:
    """OpenMP teams of this many for what this thread calls inside."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@contextmanager
def _limits(size: int) -> Iterator[None]:
    """Nothing read inside may be longer than the file that it stands in.

    Bytes have eight times that: FAISS makes room beside product codes for tables that no file holds.
    """
    before = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
    faiss.set_deserialization_vector_byte_limit(8 * size)
    faiss.set_deserialization_loop_limit(size)
    try:
        yield
    finally:
        faiss.set_deserialization_vector_byte_limit(before[0])
        faiss.set_deserialization_loop_limit(before[1])
