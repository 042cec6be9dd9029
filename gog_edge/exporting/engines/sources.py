"""What engines are built for: how graphs are lifted for a runtime, its release, the GPUs."""

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
from gog_edge.engines.tensorrt.plan import NO_INT4, known_sms, trt_module
from gog_edge.engines.tensorrt.shapes import Profile
from gog_edge.errors import ArtifactError, BackendError, CheckpointError
from gog_edge.exporting.conversion.convert import Kind
from gog_edge.exporting.engines.plan import ATTENTION, KV_CACHE_UPDATE
from gog_edge.exporting.engines.profiles import decoder_profiles, image_profiles, text_profiles, vision_profiles
from gog_edge.files import MODEL_MANIFEST, FileEntry, read_json, verify_files
from gog_edge.policy.manifest import DECODER_GRAPH, VISION_GRAPH, PolicyManifest, read_manifest
from gog_edge.retrieval.encoder import SCHEMA, image_spec

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


@dataclass(frozen=True, slots=True)
class GraphSource:
    """One graph of the bundle."""

    name: str  # of GRAPHS
    path: Path
    files: tuple[FileEntry, ...]  # the graph and its weights; paths within the bundle
    profiles: tuple[Profile, ...]
    fused: Mapping[str, int] = field(default_factory=dict)  # layers that its network must have, where it is to be fused


@dataclass(frozen=True, slots=True)
class BundleGraphs:
    """All of them."""

    graphs: tuple[GraphSource, ...]
    context: int  # tokens that the decoder's caches hold; 0 without a decoder
    int4: bool  # some weights have four bits

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(entry.size for graph in self.graphs for entry in graph.files)


def bundle_graphs(bundle: Bundle, context: int | None = None) -> BundleGraphs:
    """What engines of a bundle are built from: the encoder's towers, and the policy's graphs where it runs on the box.

    `context`: tokens that the decoder's caches hold, by default as many as the policy's conversations have.
    Raises ArtifactError for files that are missing or altered, CheckpointError for a `context` that cannot be had.
    """
    towers = _encoder(bundle.root, bundle.encoder)
    if not isinstance(bundle.policy, Path):
        return BundleGraphs(towers, 0, False)
    manifest = read_manifest(bundle.policy)
    tokens = manifest.max_context if context is None else context
    if tokens > manifest.max_context:
        raise CheckpointError(
            f"a cache of {tokens} tokens is more than the policy's conversations have; give --context at most "
            f"{manifest.max_context}, or export the policy with more"
        )
    policy = _policy(bundle.root, bundle.policy, manifest, tokens)
    int4 = manifest.weights.decoder is not None and manifest.weights.decoder.bits == 4
    return BundleGraphs((*policy, *towers), tokens, int4)


def _policy(root: Path, folder: Path, manifest: PolicyManifest, context: int) -> tuple[GraphSource, ...]:
    decoder, vision = folder / DECODER_GRAPH, folder / VISION_GRAPH
    text, tower, files = manifest.text, manifest.vision, manifest.files
    cached = {KV_CACHE_UPDATE: 2 * text.layers, ATTENTION: text.layers}
    return (
        GraphSource(DECODER, decoder, _files(root, decoder, files), decoder_profiles(text, context), cached),
        GraphSource(VISION, vision, _files(root, vision, files), vision_profiles(tower), {ATTENTION: tower.depth}),
    )


def _encoder(root: Path, folder: Path) -> tuple[GraphSource, ...]:
    """Its towers.

    Those that torch.onnx wrote hold no attention that could be recognised: nothing is asked of them.
    """
    manifest = read_json(folder / MODEL_MANIFEST, what="encoder")
    try:
        if manifest["kind"] != "encoder" or manifest["schema"] != SCHEMA:
            raise ValueError(f"kind {manifest['kind']!r}, schema {manifest['schema']!r}")
        size, length = image_spec(manifest["image"]).size, int(manifest["text"]["context_length"])
        files = tuple(FileEntry(**entry) for entry in manifest["files"])
    except (KeyError, TypeError, ValueError) as exc:
        raise ArtifactError(f"encoder: the manifest of '{folder}' is unusable ({exc}); export it again") from exc
    verify_files(folder, files, what="encoder")
    image, text = folder / "image.onnx", folder / "text.onnx"
    return (
        GraphSource(IMAGE, image, _files(root, image, files), image_profiles(size.width, size.height)),
        GraphSource(TEXT, text, _files(root, text, files), text_profiles(length)),
    )


def _files(root: Path, graph: Path, entries: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
    """A graph and the weights beside it, named as the bundle names them. ArtifactError where they are not listed."""
    folder = graph.parent.resolve().relative_to(root.resolve())
    own = [entry for entry in entries if entry.path in (graph.name, f"{graph.name}.data")]
    if not any(entry.path == graph.name for entry in own):
        raise ArtifactError(f"the manifest of '{graph.parent}' lists no '{graph.name}'; export it again")
    return tuple(FileEntry((folder / entry.path).as_posix(), entry.size, entry.sha256) for entry in own)
