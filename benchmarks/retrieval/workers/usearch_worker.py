"""usearch: HNSW with its default of 16 links, in float16 (variant f16) or int8 (variant i8)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from base import Engine, Ids, K, Queries, main


class Usearch(Engine):
    """A batch is one call that uses the given number of threads."""

    def __init__(self, folder: Path, threads: int, variant: str) -> None:
        super().__init__(folder, threads, variant)
        self.name = f"usearch {variant}"

    def build(self) -> None:
        """Write the index."""
        from usearch.index import Index

        index = None
        for ids, vectors in self.shards():
            index = index or Index(ndim=vectors.shape[1], metric="cos", dtype=self.variant)
            index.add(ids, vectors.astype("float32"), threads=self.threads)
        index.save(str(self.home / "index.usearch"))

    def open(self) -> None:
        """Open the index."""
        import usearch
        from usearch.index import Index

        self._index = Index.restore(str(self.home / "index.usearch"))
        self.about = f"usearch {usearch.__version__}, HNSW {self._index.connectivity} links, {self.variant}"
        self.settings = [16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512, 768]

    def configure(self, setting: Any) -> None:
        """Set the expansion of the search."""
        self._index.expansion_search = setting

    def search(self, queries: Queries) -> Ids:
        """Return the nearest ids."""
        return self._index.search(queries, K, threads=self.threads).keys.reshape(len(queries), -1)


if __name__ == "__main__":
    main(Usearch)
