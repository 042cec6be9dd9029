"""clip-retrieval's back end: the index that autofaiss selects within its default of 4 GB, searched by KnnService.

Its service takes one query per call and lets FAISS reconstruct the hits. HTTP, JSON, deduplication and the safety model
are left out, in its favour.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from base import Engine, Ids, K, Queries, main


def import_without_init(name: str) -> None:
    """Import a package without its `__init__`, which here would import the inference with torch and wandb."""
    spec = importlib.util.find_spec(name)
    package = ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations or ()) if spec else []
    sys.modules[name] = package


class ClipRetrieval(Engine):
    """One query per call."""

    name = "clip-retrieval"
    single_query = True

    def build(self) -> None:
        """Write the index."""
        from autofaiss import build_index

        vectors = self.home / "embeddings"
        vectors.mkdir()
        for number, (_, part) in enumerate(self.shards()):
            np.save(vectors / f"{number:06d}.npy", part.astype(np.float32))
        build_index(
            embeddings=str(vectors), index_path=str(self.home / "image.index"),
            index_infos_path=str(self.home / "infos.json"), max_index_memory_usage="4G", current_memory_available="8G",
            metric_type="ip", nb_cores=self.threads,
        )  # fmt: skip
        for path in vectors.iterdir():
            path.unlink()

    def open(self) -> None:
        """Open the index."""
        from importlib.metadata import version

        import faiss

        import_without_init("clip_retrieval")
        from clip_retrieval.clip_back import KnnService, load_index

        self._faiss = faiss
        # autofaiss numbers the rows from 0 in the order of the shards, which equals the ids of this corpus.
        self._index = load_index(str(self.home / "image.index"), enable_faiss_memory_mapping=False)
        self._resource = SimpleNamespace(
            image_index=self._index, text_index=None, metadata_is_ordered_by_ivf=False, safety_model=None,
            violence_detector=None,
        )  # fmt: skip
        self._service = KnnService(clip_resources={"images": self._resource})
        infos = json.loads((self.home / "infos.json").read_text())
        versions = f"clip-retrieval {version('clip-retrieval')}, autofaiss {version('autofaiss')}"
        self.about = f"{versions}: {infos['index_key']}"
        graph = hasattr(self._index, "hnsw")
        name = "efSearch" if graph else "nprobe" if faiss.try_extract_index_ivf(self._index) else ""
        values = (8, 16, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512, 768)
        self.settings = [f"{name}={value}" for value in values] if name else [""]

    def configure(self, setting: Any) -> None:
        """Set a parameter of the FAISS index."""
        if setting:
            self._faiss.ParameterSpace().set_index_parameters(self._index, setting)

    def search(self, queries: Queries) -> Ids:
        """Return the nearest ids."""
        _, ids = self._service.knn_search(queries, "image", K, self._resource, False, False, False)
        return np.array([list(ids) + [-1] * (K - len(ids))], dtype=np.int64)


if __name__ == "__main__":
    main(ClipRetrieval)
