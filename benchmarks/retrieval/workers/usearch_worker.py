"""usearch: HNSW with 16 links, in half precision or in bytes, as its defaults have it."""

from __future__ import annotations

from typing import Any

from loop import Engine, Ids, K, Queries, main


class Usearch(Engine):
    """Batches go in one call, over the given threads."""

    dtype = "f16"
    name = "usearch f16"

    def build(self) -> None:
        """Write the index."""
        from usearch.index import Index

        index = None
        for ids, vectors in self.shards():
            index = index or Index(ndim=vectors.shape[1], metric="cos", dtype=self.dtype)
            index.add(ids, vectors.astype("float32"), threads=self.threads)
        index.save(str(self.home / "index.usearch"))

    def open(self) -> None:
        """Make ready."""
        import usearch
        from usearch.index import Index

        self._index = Index.restore(str(self.home / "index.usearch"))
        self.about = f"usearch {usearch.__version__}, HNSW {self._index.connectivity} links, {self.dtype}"
        self.points = [16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512, 768]

    def set(self, point: Any) -> None:
        """Search so."""
        self._index.expansion_search = point

    def search(self, queries: Queries) -> Ids:
        """Nearest ids."""
        return self._index.search(queries, K, threads=self.threads).keys.reshape(len(queries), -1)


if __name__ == "__main__":
    main(Usearch)
