"""LanceDB: IVF_HNSW_SQ, refined with the stored vectors; a batch is one call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from base import Engine, Ids, K, Queries, main


class Lance(Engine):
    """A graph over int8 vectors in each partition."""

    name = "lancedb hnsw"
    kind = "IVF_HNSW_SQ"

    def build(self) -> None:
        """Write the index."""
        import lancedb
        import pyarrow as pa

        dim = next(self.shards())[1].shape[1]
        schema = pa.schema([("id", pa.int64()), ("vector", pa.list_(pa.float16(), dim))])

        def batches() -> Iterator[Any]:
            for ids, vectors in self.shards():
                flat = pa.array(np.ascontiguousarray(vectors).ravel())
                columns = [pa.array(ids), pa.FixedSizeListArray.from_arrays(flat, dim)]
                yield pa.RecordBatch.from_arrays(columns, schema=schema)

        table = lancedb.connect(str(self.home)).create_table("images", batches(), schema=schema)
        table.create_index(metric="cosine", vector_column_name="vector", index_type=self.kind)

    def open(self) -> None:
        """Open the index."""
        import lancedb

        self._table = lancedb.connect(str(self.home)).open_table("images")
        self.about = f"lancedb {lancedb.__version__}, {self.kind}, refined"
        self.settings = [
            {"nprobes": probes, "refine_factor": refine}
            for probes in (1, 2, 4, 8, 16, 32, 64, 128) for refine in (1, 2, 5, 10)
        ]  # fmt: skip

    def configure(self, setting: Any) -> None:
        """Set the number of probes and the refine factor."""
        self._setting = setting

    def search(self, queries: Queries) -> Ids:
        """Return the nearest ids."""
        query = self._table.search(queries if len(queries) > 1 else queries[0], vector_column_name="vector")
        query = query.distance_type("cosine").nprobes(self._setting["nprobes"])
        found = query.refine_factor(self._setting["refine_factor"]).select(["id", "_distance"]).limit(K).to_arrow()
        ids = np.full((len(queries), K), -1, dtype=np.int64)
        row_of = found["query_index"].to_numpy() if len(queries) > 1 else np.zeros(len(found), dtype=np.int64)
        hits = found["id"].to_numpy()
        for row in range(len(queries)):
            own = hits[row_of == row][:K]
            ids[row, : len(own)] = own
        return ids


if __name__ == "__main__":
    main(Lance)
