"""Shapes that a TensorRT engine was built for, and which of those that come are the same again."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeAlias, TypeVar

from gog_edge.errors import BackendError

Shape: TypeAlias = tuple[int, ...]
Bounds: TypeAlias = tuple[Shape, Shape, Shape]  # the least, the usual and the most
Profile: TypeAlias = Mapping[str, Bounds]  # of each input whose shape is not fixed
PAGE = 4096
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> int:
    """The number of the profile that all shapes lie in and whose usual ones are nearest, in ratio.

    Raises BackendError where there is none.
    """
    fitting = [number for number, profile in enumerate(profiles) if _fits(profile, shapes)]
    if not fitting:
        said = ", ".join(f"{name} {shape}" for name, shape in shapes.items() if any(name in one for one in profiles))
        most = "; ".join(", ".join(f"{name} {bounds[2]}" for name, bounds in one.items()) for one in profiles)
        raise BackendError(f"no profile of the engine takes {said}; at the most they take {most}")
    return min(fitting, key=lambda number: _distance(profiles[number], shapes))


def _fits(profile: Profile, shapes: Mapping[str, Shape]) -> bool:
    return all(
        len(shapes[name]) == len(least) and all(map(_within, least, shapes[name], most))
        for name, (least, _, most) in profile.items()
    )


def _within(least: int, size: int, most: int) -> bool:
    return least <= size <= most


def _distance(profile: Profile, shapes: Mapping[str, Shape]) -> float:
    return sum(
        abs(math.log(max(1, size) / max(1, usual)))
        for name, (_, sizes, _) in profile.items()
        for size, usual in zip(shapes[name], sizes, strict=True)
    )


def grown(held: int, needed: int) -> int:
    """Bytes that a buffer of `held` is to have for `needed`: a fourth more than is missing, in whole pages."""
    return held if needed <= held else -(-(needed + needed // 4) // PAGE) * PAGE


class Recent(Generic[Key, Value]):
    """The latest things used, so many at the most."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: OrderedDict[Key, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Key) -> Value | None:
        """What is held for a key; it is the latest now."""
        if key not in self._held:
            return None
        self._held.move_to_end(key)
        return self._held[key]

    def put(self, key: Key, value: Value) -> None:
        """Hold a value; the one that was not used for longest goes when there are too many."""
        self._held[key] = value
        self._held.move_to_end(key)
        if len(self._held) > self._most:
            self._held.popitem(last=False)

    def clear(self) -> None:
        """Hold nothing."""
        self._held.clear()
