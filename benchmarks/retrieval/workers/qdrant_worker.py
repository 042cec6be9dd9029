"""Qdrant's local mode: no server, exact search in NumPy; what it holds lies in memory, so opening is filling."""

from __future__ import annotations

import numpy as np
from loop import Engine, Ids, K, Queries, main


class Qdrant(Engine):
    """Batches go in one call."""

    name = "qdrant local"

    def open(self) -> None:
        """Make ready."""
        from importlib.metadata import version

        from qdrant_client import QdrantClient, models

        self._models = models
        self._client = QdrantClient(":memory:")
        made = False
        for ids, vectors in self.shards():
            if not made:
                config = models.VectorParams(size=vectors.shape[1], distance=models.Distance.COSINE)
                self._client.create_collection("images", vectors_config=config)
                made = True
            self._client.upload_collection(
                "images", vectors=vectors.astype(np.float32), ids=ids.tolist(), batch_size=4096
            )
        self.about = f"qdrant-client {version('qdrant-client')}, local mode in memory, exact"
        self.points = [None]

    def search(self, queries: Queries) -> Ids:
        """Nearest ids."""
        requests = [self._models.QueryRequest(query=query.tolist(), limit=K) for query in queries]
        answers = self._client.query_batch_points("images", requests)
        return np.array([[point.id for point in answer.points] for answer in answers], dtype=np.int64)


if __name__ == "__main__":
    main(Qdrant)
