"""Qdrant's local mode: exact search in NumPy, in memory; without a file, it is filled whenever it is opened."""

from __future__ import annotations

import numpy as np
from base import Engine, Ids, K, Queries, main


class Qdrant(Engine):
    """A batch is one call."""

    name = "qdrant local"

    def open(self) -> None:
        """Fill the collection."""
        from importlib.metadata import version

        from qdrant_client import QdrantClient, models

        self._models = models
        self._client = QdrantClient(":memory:")
        created = False
        for ids, vectors in self.shards():
            if not created:
                config = models.VectorParams(size=vectors.shape[1], distance=models.Distance.COSINE)
                self._client.create_collection("images", vectors_config=config)
                created = True
            self._client.upload_collection(
                "images", vectors=vectors.astype(np.float32), ids=ids.tolist(), batch_size=4096
            )
        self.about = f"qdrant-client {version('qdrant-client')}, local mode in memory, exact"
        self.settings = [None]

    def search(self, queries: Queries) -> Ids:
        """Return the nearest ids."""
        requests = [self._models.QueryRequest(query=query.tolist(), limit=K) for query in queries]
        answers = self._client.query_batch_points("images", requests)
        return np.array([[point.id for point in answer.points] for answer in answers], dtype=np.int64)


if __name__ == "__main__":
    main(Qdrant)
