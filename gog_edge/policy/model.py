"""A policy folder, opened: vision encoder and decoder ready to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from tokenizers import Tokenizer

from gog_edge.engines.ort import OrtDecoder, OrtGraph, physical_cores
from gog_edge.errors import ArtifactError, BackendError
from gog_edge.policy.manifest import (
    DECODER_GRAPH,
    EMBEDDINGS,
    TOKENIZER,
    VISION_GRAPH,
    PolicyManifest,
    read_manifest,
)
from gog_edge.policy.session import Decoder, Session
from gog_edge.policy.vision import VisionEncoder

BYTES_A_THREAD = 32 * 2**20  # of decoder weights


@dataclass(frozen=True, slots=True)
class PolicyModel:
    """The parts that every conversation shares."""

    manifest: PolicyManifest
    vision: VisionEncoder
    decoder: Decoder

    @classmethod
    def open(cls, folder: Path, *, threads: int | None = None, context: int | None = None) -> Self:
        """Verify and load a policy folder.

        `threads`: at most so many, one for each physical core when None; a small decoder takes fewer. `context`:
        tokens of one conversation, at most and by default what the manifest says. Raises ArtifactError or
        BackendError.
        """
        manifest = read_manifest(folder)
        if manifest.engine != "ort":
            raise BackendError(f"'{folder}' was exported for engine '{manifest.engine}'; this version runs 'ort'")
        capacity = min(context or manifest.max_context, manifest.max_context)
        table = np.load(folder / EMBEDDINGS, mmap_mode="r", allow_pickle=False)
        if table.shape != (manifest.text.vocab, manifest.text.hidden):
            raise ArtifactError(f"'{folder / EMBEDDINGS}' has shape {table.shape}, not the manifest's; export again")
        decoder = Decoder(
            OrtDecoder(folder / DECODER_GRAPH, capacity=capacity, threads=_decoder_threads(folder, threads)),
            manifest,
            table,
            Tokenizer.from_file(str(folder / TOKENIZER)),
        )
        return cls(manifest, VisionEncoder(OrtGraph(folder / VISION_GRAPH, threads=threads), manifest.vision), decoder)

    def new_session(self) -> Session:
        """An empty conversation with a cache of its own."""
        return Session(self.decoder, self.decoder.engine.new_cache())


def _decoder_threads(folder: Path, most: int | None) -> int:
    # Where a step takes a millisecond, threads wait for each other longer than they work, more so on a busy machine.
    size = sum(path.stat().st_size for path in folder.glob(f"{DECODER_GRAPH}*"))
    return min(most or physical_cores(), 1 + size // BYTES_A_THREAD)
