"""A bundle is what a box serves: one policy, one encoder, packs, limits and sample pictures, in one folder."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gog_edge.config import Limits, MilvusConfig, RemoteConfig
from gog_edge.errors import BundleError
from gog_edge.files import MODEL_MANIFEST, read_json, verify_files

SCHEMA = 1
FILE = "bundle.toml"
LISTING = "samples.json"
DEFAULT_BUNDLE = Path(__file__).parent / "data" / "atlas"
_KEYS = {"schema", "name", "policy", "encoder", "packs", "limits", "samples"}
_PART_KEYS = {"path"}
_SERVER_KEYS = {"path", "milvus", "key_env", "timeout_s"}
# Files of a pack that a box needs only where it searches the vectors itself.
VECTOR_FOLDERS = ("vectors/", "index/")


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture to try, with questions that suit it."""

    picture: Path
    title: str
    questions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bundle:
    """Where the parts are. Each part checks its own files when it is opened."""

    root: Path
    name: str
    policy: Path | RemoteConfig  # on this box, or run by another server
    encoder: Path
    packs: tuple[Path, ...]
    limits: Limits
    samples: tuple[Sample, ...]
    servers: Mapping[Path, MilvusConfig] = field(default_factory=dict)  # by pack: who searches its vectors, if not we

    @property
    def manifests(self) -> tuple[Path, ...]:
        """The manifest of each part that lies here: policy, encoder, packs."""
        parts = (self.policy, self.encoder, *self.packs)
        return tuple(_manifest(part) for part in parts if isinstance(part, Path))

    def verify(self, *, full: bool = True) -> None:
        """Check every file of every part against its manifest; BundleError names the first that differs.

        Without `full`, large files are compared by size only.
        """
        for manifest in self.manifests:
            what = f"bundle '{self.name}', {manifest.parent.name}"
            entries = read_json(manifest, what=what, error=BundleError).get("files")
            if not isinstance(entries, list):
                raise BundleError(f"{what}: '{manifest}' has no list 'files'; build it again")
            if manifest.parent in self.servers:
                entries = [entry for entry in entries if not str(entry.get("path")).startswith(VECTOR_FOLDERS)]
            verify_files(manifest.parent, entries, what=what, error=BundleError, full=full)


def open_bundle(folder: Path) -> Bundle:
    """Read bundle.toml and check that everything it names is there.

    Raises BundleError with the file and the key that is missing, unknown or wrong.
    """
    root = Path(folder)
    where = root / FILE
    table = _read_toml(where)
    _check_keys(table, _KEYS, where, "")
    if table.get("schema") != SCHEMA:
        raise BundleError(f"{where}: schema = {table.get('schema')!r}; this version of gog_edge reads schema {SCHEMA}")
    packs = table.get("packs")
    if not isinstance(packs, list) or not packs:
        raise BundleError(f"{where}: [[packs]] is missing; name at least one pack with its path")
    parts = [_pack(root, pack, where) for pack in packs]
    bundle = Bundle(
        root=root,
        name=_text(table, "name", where, ""),
        policy=_policy(root, table.get("policy"), where),
        encoder=_part(root, table.get("encoder"), where, "[encoder]"),
        packs=tuple(path for path, _ in parts),
        servers={path: server for path, server in parts if server is not None},
        limits=Limits.from_table(_table(table.get("limits", {}), where, "[limits]"), where=str(where)),
        samples=_samples(root, table.get("samples"), where),
    )
    for manifest in bundle.manifests:
        if not manifest.is_file():
            raise BundleError(f"{where}: there is no '{manifest}'; build or copy this part again")
    return bundle


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"there is no '{path}'; is this the folder of a bundle?") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise BundleError(f"{path}: this is not TOML ({exc})") from exc


def _check_keys(table: Mapping[str, Any], known: set[str], where: Path, section: str) -> None:
    for key in table:
        if key not in known:
            raise BundleError(f"{where}: unknown key {section}'{key}'; known are {', '.join(sorted(known))}")


def _table(value: Any, where: Path, section: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BundleError(f"{where}: {section} is missing or no table")
    return value


def _text(table: Mapping[str, Any], key: str, where: Path, section: str) -> str:
    value = table.get(key)
    if not isinstance(value, str) or not value:
        raise BundleError(f"{where}: {section}'{key}' is missing or no text; it is {value!r}")
    return value


def _policy(root: Path, value: Any, where: Path) -> Path | RemoteConfig:
    """A folder of the bundle, or with `url` a server and the dialect that its model speaks."""
    table = _table(value, where, "[policy]")
    if "url" not in table:
        return _part(root, table, where, "[policy]")
    config = RemoteConfig.from_table(table, where=str(where))
    if not str(config.dialect).endswith(".toml"):
        return config
    path = _inside(root, table, "dialect", where, "[policy]")
    if not path.is_file():
        raise BundleError(f"{where}: [policy] 'dialect' = '{config.dialect}' is no file in {root}")
    return replace(config, dialect=path)


def _pack(root: Path, value: Any, where: Path) -> tuple[Path, MilvusConfig | None]:
    """A folder of the bundle, and with `milvus` the server that searches its vectors."""
    table = _table(value, where, "[[packs]]")
    if "milvus" not in table:
        return _part(root, table, where, "[[packs]]"), None
    _check_keys(table, _SERVER_KEYS, where, "[[packs]] ")
    path = _part(root, {key: table[key] for key in table if key in _PART_KEYS}, where, "[[packs]]")
    return path, MilvusConfig.from_table(table, root=root, where=str(where))


def _part(root: Path, value: Any, where: Path, section: str) -> Path:
    """The folder that a table names, which must lie inside the bundle."""
    table = _table(value, where, section)
    _check_keys(table, _PART_KEYS, where, section + " ")
    path = _inside(root, table, "path", where, section)
    if not path.is_dir():
        raise BundleError(f"{where}: {section} 'path' = '{table['path']}' is no folder in {root}")
    return path


def _inside(root: Path, table: Mapping[str, Any], key: str, where: Path, section: str) -> Path:
    name = _text(table, key, where, section + " ")
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise BundleError(f"{where}: {section} '{key}' = '{name}' lies outside the bundle")
    return path


def _manifest(part: Path) -> Path:
    """Packs write MANIFEST.json, models manifest.json."""
    return next((path for path in (part / "MANIFEST.json", part / MODEL_MANIFEST) if path.is_file()),
                part / MODEL_MANIFEST)


def _samples(root: Path, value: Any, where: Path) -> tuple[Sample, ...]:
    if value is None:
        return ()
    return read_samples(_part(root, value, where, "[samples]"))


def read_samples(folder: Path) -> tuple[Sample, ...]:
    """The sample pictures of a folder with a samples.json. Raises BundleError."""
    where = folder / LISTING
    try:
        listing = json.loads(where.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError) as exc:
        raise BundleError(f"{where}: cannot be read ({exc})") from exc
    if not isinstance(listing, list):
        raise BundleError(f"{where}: holds no list of samples")
    return tuple(_sample(folder, entry) for entry in listing)


def _sample(folder: Path, entry: Any) -> Sample:
    where = folder / LISTING
    table = _table(entry, where, "an entry")
    _check_keys(table, {"picture", "title", "questions"}, where, "")
    picture = folder / Path(_text(table, "picture", where, "")).name
    questions = table.get("questions")
    if not isinstance(questions, list) or not all(isinstance(question, str) for question in questions):
        raise BundleError(f"{where}: 'questions' of '{picture.name}' is no list of texts")
    if not picture.is_file():
        raise BundleError(f"{where}: there is no '{picture}'")
    return Sample(picture, _text(table, "title", where, ""), tuple(questions))
