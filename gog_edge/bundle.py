"""A bundle: what a server serves. One folder with a policy, an encoder, packs, limits and sample pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gog_edge.config import Limits, MilvusConfig, RemoteConfig, Seconds, check_milvus_uri
from gog_edge.errors import BundleError
from gog_edge.files import (
    MODEL_MANIFEST,
    FileEntry,
    parse_toml,
    path_inside,
    read_document,
    read_json,
    read_json_list,
    verify_files,
)
from gog_edge.tables import Name, build, shown

SCHEMA = 1
FILE = "bundle.toml"
SAMPLES_FILE = "samples.json"
DEFAULT_BUNDLE = Path(__file__).parent / "data" / "atlas"
# Folders of a pack that a machine needs only if it searches the vectors itself, except for those of paragraphs.
VECTOR_FOLDERS = ("vectors/", "index/")


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture to try, with questions that suit it."""

    picture: Path
    title: str
    questions: tuple[str, ...]
    expected: tuple[tuple[str, ...], ...] = ()  # accepted answers of each question; empty if unknown


@dataclass(frozen=True, slots=True)
class Bundle:
    """The parts of a bundle. Each part verifies its own files when it is opened."""

    root: Path
    name: str
    policy: Path | RemoteConfig  # a folder on this machine, or another server
    encoder: Path
    packs: tuple[Path, ...]
    limits: Limits
    samples: tuple[Sample, ...]
    servers: Mapping[Path, MilvusConfig] = field(default_factory=dict)  # packs whose vectors a Milvus server searches
    text_encoder: Path | None = None  # of the packs that have vectors of paragraphs

    @property
    def manifests(self) -> tuple[Path, ...]:
        """Return the manifest of each local part: policy, encoders, packs."""
        parts = (self.policy, self.encoder, self.text_encoder, *self.packs)
        return tuple(_manifest(part) for part in parts if isinstance(part, Path))

    def verify(self, *, full: bool = True) -> None:
        """Compare every file of every part with its manifest.

        Args:
            full: hash every file; otherwise files above `files.HASH_AT_OPEN_BYTES` are compared by size only.

        Raises:
            BundleError: names the first file that differs.
        """
        for manifest in self.manifests:
            what = f"bundle '{self.name}', {manifest.parent.name}"
            entries = read_json(manifest, what=what, error=BundleError).get("files")
            if not isinstance(entries, list):
                raise BundleError(f"{what}: '{manifest}' must have a list 'files'; build this part again")
            files = [FileEntry.from_json(entry, what=what, error=BundleError) for entry in entries]
            if manifest.parent in self.servers:
                files = [entry for entry in files if not _on_server(entry.path)]
            verify_files(manifest.parent, files, what=what, error=BundleError, full=full)


# --- the tables of bundle.toml ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _BundleTable:
    """bundle.toml as a whole; its tables are validated one by one."""

    schema: int
    name: Name
    policy: Mapping[str, Any]
    encoder: _PartTable
    packs: tuple[_PackTable, ...]
    limits: Mapping[str, Any] = field(default_factory=dict)
    samples: _PartTable | None = None
    text_encoder: _PartTable | None = None


@dataclass(frozen=True, slots=True)
class _PartTable:
    """A table that names a folder of the bundle."""

    path: Name


@dataclass(frozen=True, slots=True)
class _PackTable:
    """One table of [[packs]]: a folder, and optionally the Milvus server that searches its vectors."""

    path: Name
    milvus: str | None = None
    key_env: str = ""
    timeout_s: Seconds | None = None  # None: the default of MilvusConfig


@dataclass(frozen=True, slots=True)
class _SampleTable:
    """One entry of samples.json."""

    picture: Name
    title: Name
    questions: tuple[str, ...]
    expected: tuple[tuple[str, ...], ...] = ()


def open_bundle(folder: Path) -> Bundle:
    """Read bundle.toml and check that every part that it names exists.

    Raises:
        BundleError: names the file and the key that is missing, unknown or invalid.
    """
    root = Path(folder)
    where = str(root / FILE)
    raw = read_document(root / FILE, parse_toml, what="bundle", error=BundleError, syntax="TOML")
    if raw.get("schema") != SCHEMA:
        raise BundleError(f"{where}: schema = {shown(raw.get('schema'))}; this version reads schema {SCHEMA}")
    table = build(_BundleTable, raw, "", error=BundleError, where=where)
    if not table.packs:
        raise BundleError(f"{where}: [[packs]] is empty; name at least one pack with its 'path'")
    packs = [_folder(root, pack.path, "[[packs]]", where) for pack in table.packs]
    bundle = Bundle(
        root=root,
        name=table.name,
        policy=_policy(root, table.policy, where),
        encoder=_folder(root, table.encoder.path, "[encoder]", where),
        packs=tuple(packs),
        servers={path: server for path, pack in zip(packs, table.packs, strict=True)
                 if (server := _milvus(root, pack, where)) is not None},
        limits=Limits.from_table(table.limits, where=where),
        samples=read_samples(_folder(root, table.samples.path, "[samples]", where)) if table.samples else (),
        text_encoder=_folder(root, table.text_encoder.path, "[text_encoder]", where) if table.text_encoder else None,
    )
    for manifest in bundle.manifests:
        if not manifest.is_file():
            raise BundleError(f"{where}: '{manifest}' does not exist; build or copy this part again")
    return bundle


def read_samples(folder: Path) -> tuple[Sample, ...]:
    """Read the sample pictures of a folder with a samples.json. Raises BundleError."""
    where = folder / SAMPLES_FILE
    entries = read_json_list(where, what="samples", error=BundleError)
    return tuple(_sample(folder, entry, str(where)) for entry in entries)


def _policy(root: Path, table: Mapping[str, Any], where: str) -> Path | RemoteConfig:
    """Return the policy's folder; or with `url` the server and the dialect that its model uses."""
    if "url" not in table:
        return _folder(root, build(_PartTable, table, "policy", error=BundleError, where=where).path, "[policy]", where)
    config = RemoteConfig.from_table(table, where=where)
    if not str(config.dialect).endswith(".toml"):
        return config
    path = _inside(root, str(config.dialect), "[policy] 'dialect'", where)
    if not path.is_file():
        raise BundleError(f"{where}: [policy] 'dialect' = '{config.dialect}' does not exist in {root}")
    return replace(config, dialect=path)


def _milvus(root: Path, pack: _PackTable, where: str) -> MilvusConfig | None:
    if pack.milvus is None:
        for key in ("key_env", "timeout_s"):
            if getattr(pack, key):
                raise BundleError(f"{where}: [[packs]] '{key}' requires 'milvus', the server that it applies to")
        return None
    uri = pack.milvus
    check_milvus_uri(uri, where=where)
    config = MilvusConfig(uri if "://" in uri else str(root / uri), pack.key_env)
    return config if pack.timeout_s is None else replace(config, timeout_s=float(pack.timeout_s))


def _folder(root: Path, name: str, section: str, where: str) -> Path:
    path = _inside(root, name, f"{section} 'path'", where)
    if not path.is_dir():
        raise BundleError(f"{where}: {section} 'path' = '{name}' is not a folder in {root}")
    return path


def _inside(root: Path, name: str, key: str, where: str) -> Path:
    try:
        return path_inside(root, name)
    except ValueError as exc:
        raise BundleError(f"{where}: {key} = {shown(name)}, {exc}; name a folder or file of the bundle") from exc


def _on_server(path: str) -> bool:
    """Return whether a file of a pack is not needed if a Milvus server searches its vectors."""
    return path.startswith(VECTOR_FOLDERS) and "-paragraphs" not in path


def _manifest(part: Path) -> Path:
    """Return the manifest of a part: MANIFEST.json of a pack, manifest.json of a model."""
    return next((path for path in (part / "MANIFEST.json", part / MODEL_MANIFEST) if path.is_file()),
                part / MODEL_MANIFEST)


def _sample(folder: Path, entry: Any, where: str) -> Sample:
    table = build(_SampleTable, entry, "sample", error=BundleError, where=where)
    picture = _inside(folder, Path(table.picture).name, "'picture'", where)
    if not picture.is_file():
        raise BundleError(f"{where}: '{picture}' does not exist")
    if table.expected and len(table.expected) != len(table.questions):
        raise BundleError(f"{where}: 'expected' of '{picture.name}' must have one list of answers for each question, "
                          f"got {len(table.expected)} for {len(table.questions)} questions")
    return Sample(picture, table.title, table.questions, table.expected)
