"""The decoder's embedding table: mapped from disk, rows widened when asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gog_edge.engines.base import Array, Floats
from gog_edge.errors import ArtifactError
from gog_edge.policy.manifest import EMBEDDING_SCALES, EMBEDDINGS, PolicyManifest


@dataclass(frozen=True, slots=True)
class EmbeddingTable:
    """Rows [vocab, hidden]: float32 or float16, or 8-bit numbers about 128 with a scale for each block."""

    rows: Array
    scales: Floats | None = None  # [vocab, blocks]

    @classmethod
    def open(cls, folder: Path, manifest: PolicyManifest) -> EmbeddingTable:
        """Map a policy folder's table. ArtifactError when it has not the manifest's shape."""
        rows = np.load(folder / EMBEDDINGS, mmap_mode="r", allow_pickle=False)
        blocks = manifest.weights.embeddings
        scales = np.load(folder / EMBEDDING_SCALES, mmap_mode="r", allow_pickle=False) if blocks else None
        vocab, hidden = manifest.text.vocab, manifest.text.hidden
        size = (blocks.size or hidden) if blocks else 1
        expected = (vocab, -(-hidden // size) * size)
        if rows.shape != expected or (scales is not None and scales.shape[1] * size != expected[1]):
            raise ArtifactError(
                f"'{folder / EMBEDDINGS}' has shape {rows.shape}, the manifest wants {expected}; export again"
            )
        return cls(rows, scales)

    def take(self, ids: Array, hidden: int) -> Floats:
        """Embeddings [T, hidden] float32 of ids [T]."""
        rows = self.rows[ids]
        if self.scales is None:
            return np.asarray(rows, np.float32)
        scales = self.scales[ids]
        centred = rows.astype(np.float32).reshape(len(ids), scales.shape[1], -1) - 128
        return np.ascontiguousarray((centred * scales[:, :, None]).reshape(len(ids), -1)[:, :hidden])
