"""Inputs of an engine build: the runtime and GPUs to build for, and the bundle's graphs with their profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gog_edge.bundle import Bundle
from gog_edge.engines.cuda import device_properties
from gog_edge.engines.manifest import (
    BUILT_ENGINES,
    DECODER,
    IMAGE,
    IN_PLACE,
    NEW_ROWS,
    ORT_CUDA,
    TENSORRT,
    TENSORRT_RTX,
    TEXT,
    VISION,
)
from gog_edge.engines.tensorrt.plan import NO_INT4_SM, Profile, import_tensorrt, supported_sms
from gog_edge.errors import ArtifactError, BackendError, CheckpointError
from gog_edge.exporting.conversion.convert import Kind
from gog_edge.exporting.engines.plan import ATTENTION, KV_CACHE_UPDATE
from gog_edge.exporting.engines.profiles import decoder_profiles, image_profiles, text_profiles, vision_profiles
from gog_edge.files import FileEntry
from gog_edge.policy.manifest import DECODER_GRAPH, VISION_GRAPH, PolicyManifest, read_manifest
from gog_edge.retrieval.encoder import read_encoder_manifest

FUSED_SINCE = (10, 15)  # TensorRT release with in-place cache updates and an attention layer


@dataclass(frozen=True, slots=True)
class BuildTarget:
    """A runtime, and the GPUs to build for."""

    engine: str  # one of BUILT_ENGINES
    kind: Kind  # how graphs are converted
    cache: str  # how the decoder updates its KV cache: IN_PLACE or NEW_ROWS
    version: str = ""  # of TensorRT
    sms: tuple[int, ...] = ()  # compute capabilities that the engines run on, 86 for 8.6
    build_sms: tuple[int, ...] = ()  # those given to TensorRT; () builds for the GPU of this machine


def choose_target(engine: str, sms: Sequence[int], *, int4: bool) -> BuildTarget:
    """Return the build target for an engine.

    Args:
        engine: one of BUILT_ENGINES.
        sms: compute capabilities for TensorRT for RTX; empty for all that it supports.
        int4: whether the graphs have 4-bit weights.

    Raises:
        BackendError: the engine or a compute capability is not available; the message lists those that are.
    """
    if engine not in BUILT_ENGINES:
        raise BackendError(f"cannot build engines for '{engine}'; available: {', '.join(BUILT_ENGINES)}")
    if sms and engine != TENSORRT_RTX:
        raise BackendError(f"--sm is for {TENSORRT_RTX}; engines for '{engine}' run on the GPU of the machine that "
                           "builds or loads them")  # fmt: skip
    if engine == ORT_CUDA:
        return BuildTarget(engine, "fp16", IN_PLACE)
    trt = import_tensorrt(engine)
    if engine == TENSORRT:
        return _local_target(trt)
    chosen = _choose_sms(trt, sms, int4=int4)
    return BuildTarget(engine, "standard", IN_PLACE, trt.__version__, chosen, chosen)


def _local_target(trt: Any) -> BuildTarget:
    release = tuple(int(part) for part in trt.__version__.split(".")[:2])
    sms = (device_properties().sm,)
    if release < FUSED_SINCE:
        return BuildTarget(TENSORRT, "decomposed", NEW_ROWS, trt.__version__, sms)
    return BuildTarget(TENSORRT, "standard", IN_PLACE, trt.__version__, sms)


def _choose_sms(trt: Any, sms: Sequence[int], *, int4: bool) -> tuple[int, ...]:
    supported = sorted(sm for sm in supported_sms(trt) if not (int4 and sm == NO_INT4_SM))
    refused = [sm for sm in sms if sm not in supported]
    if refused:
        what = "int4 engines" if int4 else "engines"
        raise BackendError(
            f"TensorRT for RTX {trt.__version__} cannot build {what} for SM {', '.join(map(str, refused))}; "
            f"it supports {', '.join(map(str, supported))}"
        )
    return tuple(sorted(set(sms))) or tuple(supported)


@dataclass(frozen=True, slots=True)
class GraphSource:
    """One graph of a bundle, and what its engine must support."""

    name: str  # one of GRAPHS
    path: Path
    files: tuple[FileEntry, ...]  # the graph and its weights; paths relative to the bundle
    profiles: tuple[Profile, ...]
    fused_layers: Mapping[str, int] = field(default_factory=dict)  # that its network must have, by kind


@dataclass(frozen=True, slots=True)
class BundleGraphs:
    """All graphs of a bundle that engines are built from."""

    graphs: tuple[GraphSource, ...]
    context: int  # tokens that the decoder's KV cache has room for; 0 without a decoder
    int4: bool  # whether any weights are 4-bit

    @property
    def size(self) -> int:
        """Return the size of all graphs in bytes."""
        return sum(entry.size for graph in self.graphs for entry in graph.files)


def bundle_graphs(bundle: Bundle, context: int | None = None) -> BundleGraphs:
    """Return the graphs of a bundle: the encoder's, and the policy's unless another server runs it.

    Args:
        bundle: the bundle.
        context: tokens that the decoder's KV cache has room for; None for the policy's own limit.

    Raises:
        ArtifactError: a file is missing or altered.
        CheckpointError: `context` is larger than the policy's limit.
    """
    encoder = _encoder_graphs(bundle.root, bundle.encoder)
    if not isinstance(bundle.policy, Path):
        return BundleGraphs(encoder, 0, False)
    manifest = read_manifest(bundle.policy)
    tokens = manifest.max_context if context is None else context
    if tokens > manifest.max_context:
        raise CheckpointError(
            f"a context of {tokens} tokens exceeds the policy's limit; give --context at most {manifest.max_context}, "
            "or export the policy again with a larger --context"
        )
    policy = _policy_graphs(bundle.root, bundle.policy, manifest, tokens)
    int4 = manifest.weights.decoder is not None and manifest.weights.decoder.bits == 4
    return BundleGraphs((*policy, *encoder), tokens, int4)


def _policy_graphs(root: Path, folder: Path, manifest: PolicyManifest, context: int) -> tuple[GraphSource, ...]:
    decoder, vision = folder / DECODER_GRAPH, folder / VISION_GRAPH
    text, tower, files = manifest.text, manifest.vision, manifest.files
    decoder_layers = {KV_CACHE_UPDATE: 2 * text.layers, ATTENTION: text.layers}
    vision_layers = {ATTENTION: tower.depth}
    return (
        GraphSource(DECODER, decoder, _files(root, decoder, files), decoder_profiles(text, context), decoder_layers),
        GraphSource(VISION, vision, _files(root, vision, files), vision_profiles(tower), vision_layers),
    )


def _encoder_graphs(root: Path, folder: Path) -> tuple[GraphSource, ...]:
    """Return an encoder's graphs, without required layers: TensorRT does not fuse the attention of torch.onnx's."""
    manifest = read_encoder_manifest(folder)
    size, files = manifest.image.size, manifest.files
    image, text = folder / "image.onnx", folder / "text.onnx"
    return (
        GraphSource(IMAGE, image, _files(root, image, files), image_profiles(size.width, size.height)),
        GraphSource(TEXT, text, _files(root, text, files), text_profiles(manifest.text.context_length)),
    )


def _files(root: Path, graph: Path, entries: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
    """Return the manifest entries of a graph and its external data, with paths relative to the bundle."""
    folder = graph.parent.resolve().relative_to(root.resolve())
    own = [entry for entry in entries if entry.path in (graph.name, f"{graph.name}.data")]
    if not any(entry.path == graph.name for entry in own):
        raise ArtifactError(f"the manifest of '{graph.parent}' does not list '{graph.name}'; export it again")
    return tuple(FileEntry((folder / entry.path).as_posix(), entry.size, entry.sha256) for entry in own)
