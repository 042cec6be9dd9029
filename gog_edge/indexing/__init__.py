"""Builds and changes packs: reads snapshots, writes stores, embeds images, builds indexes, commits generations."""

from collections.abc import Callable
from typing import TypeAlias

OnProgress: TypeAlias = Callable[[str, int, int], None]  # called with (stage, done, total)
