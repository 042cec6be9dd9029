"""The files that are mutated: where each lies in which seed, how it is mutated, and who reads it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from random import Random

from benchmarks.mutation import readers
from benchmarks.mutation.arrays import mutate_binary, mutate_npy, mutate_safetensors
from benchmarks.mutation.databases import mutate_sqlite
from benchmarks.mutation.texts import mutate_bytes, mutate_table, mutate_template, mutate_xml
from benchmarks.mutation.trees import Mutator, mutate_json, mutate_json_lines, mutate_toml
from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.retrieval.manifest import generation_path, read_manifest


@dataclass(frozen=True, slots=True)
class Target:
    """One file of a seed folder."""

    kind: str  # of the format: "JSON", "TOML", "safetensors"
    seed: str  # one of `seeds.SEEDS`
    file: str  # relative to the seed folder
    mutate: Mutator
    read: Callable[[Path], object]
    weight: float = 1.0  # share of the mutants
    # Manifest with the size and hash of the file, which are set to those of the mutant: otherwise nothing but the
    # comparison of hashes is tested.
    manifest: str = ""

    @property
    def name(self) -> str:
        """Return the name in results."""
        return f"{self.seed}/{self.file}"

    def mutant(self, original: bytes, seed: int, number: int) -> bytes:
        """Return mutant `number` of a run; the same for the same arguments."""
        return self.mutate(Random(f"{seed}/{self.name}/{number}"), original)  # no secret

    def install(self, root: Path, data: bytes) -> None:
        """Write the file, and its size and hash into the manifest that lists it."""
        path = root / self.file
        path.unlink(missing_ok=True)  # it may be a hard link
        path.write_bytes(data)
        if self.manifest:
            _update_manifest(root / self.manifest, path, data)


def _update_manifest(manifest: Path, path: Path, data: bytes) -> None:
    value = json.loads(manifest.read_bytes())
    name = path.relative_to(manifest.parent).as_posix()
    for entry in value["files"]:
        if entry["path"] == name:
            entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest.unlink()
    manifest.write_text(json.dumps(value))


_POLICY, _ENCODER, _PACK = "policy/manifest.json", "encoder/manifest.json", "packs/atlas/MANIFEST.json"


def _pack() -> list[Target]:
    """Return the files of the atlas's pack, whose names depend on its generation."""
    folder = Path("packs/atlas")
    manifest = read_manifest(DEFAULT_BUNDLE / folder)
    images, captions = manifest.images, manifest.captions
    read = readers.read_pack
    targets = [
        Target("JSON", "bundle", str(generation_path(folder, manifest.generation)), mutate_json, read, 0.3),
        Target("npy", "bundle", str(folder / images.shards[0].vectors), mutate_npy, read, manifest=_PACK),
        Target("npy", "bundle", str(folder / images.shards[0].ids), mutate_npy, read, manifest=_PACK),
        Target("SQLite", "bundle", str(folder / manifest.segments[0].store), mutate_sqlite, read, 1.5, _PACK),
    ]
    if captions.index is not None:
        targets.append(Target("FAISS", "bundle", str(folder / captions.index.path), mutate_binary, read, 0.3, _PACK))
    return targets


def _checkpoint(seed: str, *, weight: float = 1.0) -> list[Target]:
    json_files = ("config.json", "preprocessor_config.json", "generation_config.json")
    weights = "model-00001-of-00002.safetensors" if seed == "qwen25" else "model.safetensors"
    read = readers.read_checkpoint
    return [
        *(Target("JSON", seed, f"checkpoint/{name}", mutate_json, read, weight) for name in json_files),
        Target("tokenizer", seed, "checkpoint/tokenizer.json", mutate_json, read, weight),
        Target("Jinja", seed, "checkpoint/chat_template.jinja", mutate_template, read, weight),
        Target("safetensors", seed, f"checkpoint/{weights}", mutate_safetensors, read, 2 * weight),
    ]


def _all() -> list[Target]:
    dialects = (
        file.name for file in resources.files("gog_edge.policy.dialect").iterdir() if file.name.endswith(".toml")
    )
    source = {kind: partial(readers.read_source, kind) for kind in
              ("folder", "wit", "wiki6m", "encyclopedic-vqa", "mediawiki")}  # fmt: skip
    return [
        Target("TOML", "bundle", "bundle.toml", mutate_toml, readers.read_bundle, 2),
        Target("JSON", "bundle", "samples/samples.json", mutate_json, readers.read_bundle),
        Target("JSON", "bundle", _POLICY, mutate_json, readers.read_policy, 2),
        Target("TOML", "bundle", "policy/dialect.toml", mutate_toml, readers.read_policy, manifest=_POLICY),
        Target("tokenizer", "bundle", "policy/tokenizer.json", mutate_json, readers.read_policy, manifest=_POLICY),
        Target("npy", "bundle", "policy/embed_tokens.npy", mutate_npy, readers.read_policy, manifest=_POLICY),
        Target("ONNX", "bundle", "policy/decoder.onnx", mutate_binary, readers.read_policy, 0.3, _POLICY),
        Target("JSON", "bundle", _ENCODER, mutate_json, readers.read_encoder),
        Target("tokenizer", "bundle", "encoder/tokenizer.json", mutate_json, readers.read_encoder, manifest=_ENCODER),
        Target("ONNX", "bundle", "encoder/text.onnx", mutate_binary, readers.read_encoder, 0.3, _ENCODER),
        Target("JSON", "bundle", _PACK, mutate_json, readers.read_pack, 2),
        *_pack(),
        *(
            Target(
                "TOML", f"dialect-{name.removesuffix('.toml')}", "dialect.toml", mutate_toml, readers.read_dialect, 0.4
            )
            for name in dialects
        ),
        Target("JSON", "text_encoder", "manifest.json", mutate_json, readers.read_text_encoder),
        Target(
            "tokenizer", "text_encoder", "tokenizer.json", mutate_json, readers.read_text_encoder, 1, "manifest.json"
        ),
        Target("ONNX", "text_encoder", "model.onnx", mutate_binary, readers.read_text_encoder, 0.5, "manifest.json"),
        Target("JSON", "engines", "engines/ort-cuda/engines.json", mutate_json, readers.read_engines),
        *(
            Target("FAISS", "indexes", name, mutate_binary, partial(readers.read_index, name), 0.4)
            for name in ("flat.faiss", "sq.faiss", "ivf.faiss", "ivfsq.faiss", "ivfpq.faiss", "hnsw.faiss")
        ),
        *(
            Target("npy", "indexes", name, mutate_npy, partial(readers.read_index, "flat.faiss"), 0.5)
            for name in ("vectors.npy", "ids.npy")
        ),
        Target("JSON", "trace", "episode.trace.json", mutate_json, readers.read_trace_file, 0.5),
        *_checkpoint("qwen25"),
        Target("JSON", "qwen25", "checkpoint/model.safetensors.index.json", mutate_json, readers.read_checkpoint),
        Target("JSON", "qwen25", "checkpoint/tokenizer_config.json", mutate_json, readers.read_checkpoint, 0.3),
        Target("JSON", "qwen25", "adapter/adapter_config.json", mutate_json, readers.read_checkpoint, 2),
        Target(
            "safetensors", "qwen25", "adapter/adapter_model.safetensors", mutate_safetensors, readers.read_checkpoint, 2
        ),
        *_checkpoint("qwen3", weight=0.5),
        Target("JSON", "clip", "open_clip_config.json", mutate_json, readers.read_clip, 0.5),
        Target("safetensors", "clip", "open_clip_model.safetensors", mutate_safetensors, readers.read_clip, 0.3),
        *(
            Target("JSON", "sentences", name, mutate_json, readers.read_sentences, 0.4)
            for name in (
                "modules.json",
                "config.json",
                "sentence_bert_config.json",
                "config_sentence_transformers.json",
                "tokenizer_config.json",
                "1_Pooling/config.json",
            )
        ),
        Target("tokenizer", "sentences", "tokenizer.json", mutate_json, readers.read_sentences, 0.4),
        Target("CSV", "pictures", "objects.csv", mutate_table, source["folder"], 3),
        Target("CSV", "pictures", "more.tsv", mutate_table, source["folder"], 1.5),
        Target("JSON", "pictures", "rest.json", mutate_json, source["folder"], 1.5),
        Target("text", "pictures", "vase_5.txt", mutate_bytes, source["folder"], 0.3),
        Target("CSV", "wit", "wit.tsv", mutate_table, source["wit"], 2),
        Target("JSON lines", "wiki6m", "Wiki6M_ver_1_0.jsonl", mutate_json_lines, source["wiki6m"], 2),
        Target("JSON", "encyclopedic_vqa", "encyclopedic_kb_wiki.json", mutate_json, source["encyclopedic-vqa"], 2),
        Target("XML", "mediawiki", "enwiki-20240101-pages-articles.xml", mutate_xml, source["mediawiki"], 2),
    ]


TARGETS = tuple({target.name: target for target in _all()}.values())
