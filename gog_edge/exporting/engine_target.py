"""What engines are built for: how graphs are lifted for a runtime, its release, the GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gog_edge.engines.built import BUILT_ENGINES, IN_PLACE, NEW_ROWS, ORT_CUDA, TENSORRT, TENSORRT_RTX
from gog_edge.engines.cuda import device_properties
from gog_edge.engines.trt_plan import NO_INT4, known_sms, trt_module
from gog_edge.errors import BackendError
from gog_edge.exporting.lift import Kind

FUSED_FROM = (10, 15)  # this TensorRT updates caches in place and has a layer for attention; before, neither


@dataclass(frozen=True, slots=True)
class Target:
    """A runtime and the GPUs it is to run on."""

    engine: str  # of BUILT_ENGINES
    kind: Kind
    cache: str  # of a decoder: IN_PLACE or NEW_ROWS
    version: str = ""  # of TensorRT
    sms: tuple[int, ...] = ()  # compute capabilities that the engines run on, 86 for 8.6
    ahead: tuple[int, ...] = ()  # those that are built for without the GPU


def choose_target(engine: str, sms: Sequence[int], *, int4: bool) -> Target:
    """What to build for; without `sms`, TensorRT for RTX builds for all that it knows.

    `int4`: the graphs have weights of four bits. BackendError for what is not to be had, naming what is.
    """
    if engine not in BUILT_ENGINES:
        raise BackendError(f"engines of '{engine}' cannot be built; there are {', '.join(BUILT_ENGINES)}")
    if sms and engine != TENSORRT_RTX:
        raise BackendError(f"--sm is for {TENSORRT_RTX}; engines of '{engine}' run on the GPU that they are used on")
    if engine == ORT_CUDA:
        return Target(engine, "half", IN_PLACE)
    trt = trt_module(engine)
    if engine == TENSORRT:
        return _on_device(trt)
    chosen = _known(trt, sms, int4=int4)
    return Target(engine, "standard", IN_PLACE, trt.__version__, chosen, chosen)


def _on_device(trt: Any) -> Target:
    release = tuple(int(part) for part in trt.__version__.split(".")[:2])
    sms = (device_properties().sm,)
    if release < FUSED_FROM:
        return Target(TENSORRT, "decomposed", NEW_ROWS, trt.__version__, sms)
    return Target(TENSORRT, "standard", IN_PLACE, trt.__version__, sms)


def _known(trt: Any, sms: Sequence[int], *, int4: bool) -> tuple[int, ...]:
    """BackendError names the compute capabilities that there are where one is asked for that is not among them."""
    known = sorted(sm for sm in known_sms(trt) if not (int4 and sm == NO_INT4))
    refused = [sm for sm in sms if sm not in known]
    if refused:
        kind = "int4 engines" if int4 else "engines"
        raise BackendError(
            f"TensorRT for RTX {trt.__version__} builds no {kind} for SM {', '.join(map(str, refused))}; "
            f"it builds for {', '.join(map(str, known))}"
        )
    return tuple(sorted(set(sms))) or tuple(known)
