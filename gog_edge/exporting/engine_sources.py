"""The graphs of a bundle that engines are built from: which there are, of what shapes, named by hash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gog_edge.bundle import Bundle
from gog_edge.engines.built import DECODER, IMAGE, TEXT, VISION
from gog_edge.engines.trt_shapes import Profile
from gog_edge.errors import ArtifactError, CheckpointError
from gog_edge.exporting.engine_plan import ATTENTION, KV_CACHE_UPDATE
from gog_edge.exporting.engine_profiles import decoder_profiles, image_profiles, text_profiles, vision_profiles
from gog_edge.files import MODEL_MANIFEST, FileEntry, read_json, verify_files
from gog_edge.policy.manifest import DECODER_GRAPH, VISION_GRAPH, PolicyManifest, read_manifest
from gog_edge.retrieval.encoder import SCHEMA, image_spec


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
