"""The encoders of a pack, and their shares of its memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gog_edge.errors import PackError
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import Fingerprint, Manifest
from gog_edge.retrieval.text.encoder import TextEncoder


@dataclass(frozen=True, slots=True)
class Encoders:
    """The encoders that a pack is built with."""

    image: Encoder | None = None  # None: a pack without vectors of images and captions
    text: TextEncoder | None = None  # None: a pack without vectors of paragraphs

    def of(self, space: str) -> Encoder | TextEncoder | None:
        """Return the encoder of "images", "captions" or "paragraphs"."""
        return self.text if space == "paragraphs" else self.image

    def dim_of(self, space: str) -> int:
        """Return the length of the vectors of a space; 0 without its encoder."""
        encoder = self.of(space)
        return 0 if encoder is None else encoder.dim

    def to_json(self) -> dict[str, Any]:
        """Return the fingerprints as the settings of a build contain them."""
        return {key: None if encoder is None else asdict(encoder.fingerprint)
                for key, encoder in (("encoder", self.image), ("text_encoder", self.text))}


def fingerprint_of(encoder: Encoder | TextEncoder | None) -> Fingerprint | None:
    """Return the fingerprint of an encoder; None without one."""
    return None if encoder is None else encoder.fingerprint


def check_encoders(manifest: Manifest, encoders: Encoders) -> None:
    """Raise PackError if the encoders are not those that a pack was built with."""
    for kind, wanted, given in (("encoder", manifest.encoder, fingerprint_of(encoders.image)),
                                ("text encoder", manifest.text_encoder, fingerprint_of(encoders.text))):
        if wanted != given:
            names = ["none" if one is None else f"'{one.name}'" for one in (wanted, given)]
            raise PackError(f"pack '{manifest.name}' was built with another {kind} ({names[0]}, now {names[1]}); use "
                            "that one, or build a new pack")


def memory_shares(rows: Mapping[str, int], encoders: Encoders) -> dict[str, float]:
    """Return the share of a memory limit for each space that has rows, by the size of its vectors."""
    sizes = {space: count * encoders.dim_of(space) for space, count in rows.items()}
    total = sum(sizes.values())
    return {space: size / total for space, size in sizes.items() if size}
