"""Creation of a bundle from parts that exist: a policy, an encoder and packs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, fields
from pathlib import Path

from gog_edge.bundle import FILE, SCHEMA, Bundle, open_bundle, read_samples
from gog_edge.config import Limits, RemoteConfig
from gog_edge.engines.manifest import CACHE_FOLDER
from gog_edge.errors import BundleError
from gog_edge.policy.dialect.loader import DIALECT_FILE, load_dialect
from gog_edge.policy.manifest import read_manifest as read_policy_manifest
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import BUILD
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.text.encoder import TextEncoder

# Files of a part that belong to one machine or to an operation in progress.
NOT_COPIED = (CACHE_FOLDER, BUILD, "LOCK", "*.part", ".*")

_LIMITS = {  # what bundle.toml says about each limit
    "turns": "turns of the policy; the last one is always an answer",
    "tokens": "generated tokens, over all turns",
    "deadline_ms": "milliseconds from the question to the answer",
    "question_chars": "characters of a question",
    "picture_bytes": "bytes of a picture file",
    "picture_pixels": "pixels of a picture file; decoding the largest takes 5.5 bytes for each",
    "decoded_pixels": "pixels of a decoded picture; larger ones are reduced",
    "concurrent": "questions answered at the same time; more wait. Each needs memory for a conversation",
}


@dataclass(frozen=True, slots=True)
class BundleParts:
    """The parts of a new bundle, wherever they are."""

    policy: Path | RemoteConfig  # a folder, or a server whose dialect may be a file anywhere
    encoder: Path
    packs: tuple[Path, ...]
    samples: Path | None = None
    text_encoder: Path | None = None  # of packs that have vectors of paragraphs


def init_bundle(
    out: Path, parts: BundleParts, *, name: str | None = None, link: bool = False, force: bool = False
) -> Bundle:
    """Create a bundle and return it, opened.

    Parts inside `out` are used where they are; others are copied into it. `bundle.toml` is written last. An error
    leaves `out` as it was.

    Args:
        out: folder of the bundle; it may exist.
        parts: the parts.
        name: name of the bundle; None for the name of `out`.
        link: create hard links instead of copies, which is possible within one file system.
        force: replace an existing `bundle.toml`, and existing folders of copied parts.

    Raises:
        BundleError: `out` has a bundle or a part already, two packs have the same name, or a file cannot be copied.
        ArtifactError: a part cannot be opened, or an encoder is not the one that a pack was built with.
        DialectError: the dialect of a remote policy cannot be used.
    """
    if (out / FILE).exists() and not force:
        raise BundleError(f"'{out / FILE}' already exists; choose another folder, or replace it with --force")
    names = _check_parts(parts)
    planned = _plan(out, parts, names, force=force)
    _install(out, planned.copies, _to_toml(name or out.resolve().name, parts.policy, planned), link=link)
    return open_bundle(out)


def _check_parts(parts: BundleParts) -> tuple[str, ...]:
    """Open every part as a server does, including each pack's golden query; return the names of the packs."""
    if isinstance(parts.policy, Path):
        read_policy_manifest(parts.policy)
    else:
        load_dialect(_dialect_file(parts.policy) or parts.policy.dialect)
    if parts.samples is not None:
        read_samples(parts.samples)
    if not parts.packs:
        raise BundleError("a bundle needs at least one pack; name one with --pack")
    encoder = Encoder.open(parts.encoder)
    text_encoder = None if parts.text_encoder is None else TextEncoder.open(parts.text_encoder)
    with ExitStack() as opened:
        packs = [opened.enter_context(closing(Pack.open(folder, encoder, text_encoder=text_encoder)))
                 for folder in parts.packs]
        names = tuple(pack.manifest.name for pack in packs)
    twice = sorted({each for each in names if names.count(each) > 1})
    if twice:
        raise BundleError(f"two packs have the name '{twice[0]}'; a bundle's packs must have different names")
    return names


def _dialect_file(policy: RemoteConfig) -> Path | None:
    """Return the file of a dialect, or None for a dialect of the package."""
    return Path(policy.dialect) if str(policy.dialect).endswith(".toml") else None


@dataclass(frozen=True, slots=True)
class _Plan:
    """The paths of the parts in the bundle, and what has to be copied there."""

    policy: str  # a folder, or the dialect of a remote policy
    encoder: str
    packs: tuple[str, ...]
    samples: str | None
    text_encoder: str | None
    copies: tuple[tuple[Path, str], ...]  # (source, path in the bundle)


def _plan(out: Path, parts: BundleParts, names: Sequence[str], *, force: bool) -> _Plan:
    copies: list[tuple[Path, str]] = []

    def place(source: Path, path: str) -> str:
        """Return the path of a part in the bundle: where it is, if that is inside, or else `path`."""
        root, resolved = out.resolve(), source.resolve()
        if root.is_relative_to(resolved):
            raise BundleError(f"the bundle '{out}' is its part '{source}', or inside it; choose another folder")
        if resolved.is_relative_to(root):
            return resolved.relative_to(root).as_posix()
        if (out / path).exists() and not force:
            raise BundleError(f"'{out / path}' already exists; name that folder itself, or replace it with --force")
        copies.append((source, path))
        return path

    if isinstance(parts.policy, Path):
        policy = place(parts.policy, "policy")
    else:
        file = _dialect_file(parts.policy)
        policy = str(parts.policy.dialect) if file is None else place(file, DIALECT_FILE)
    encoder = place(parts.encoder, "encoder")
    packs = tuple(place(pack, f"packs/{name}") for pack, name in zip(parts.packs, names, strict=True))
    samples = None if parts.samples is None else place(parts.samples, "samples")
    text_encoder = None if parts.text_encoder is None else place(parts.text_encoder, "text_encoder")
    return _Plan(policy, encoder, packs, samples, text_encoder, tuple(copies))


class _Swap:
    """The replacement of one part: the new part is copied next to the target, and the old one is moved aside."""

    def __init__(self, target: Path) -> None:
        """Prepare the replacement of `target`, after undoing one that a crash interrupted. Raises OSError."""
        self.target, self.part = target, target.with_name(f"{target.name}.part")
        self.old = target.with_name(f".{target.name}.old")
        if os.path.lexists(self.old) and not os.path.lexists(target):
            self.old.rename(target)
        _delete(self.old)
        self.existed = os.path.lexists(target)

    def copy(self, source: Path, *, link: bool) -> None:
        """Copy a file or a folder next to the target. Raises BundleError."""
        try:
            self.part.parent.mkdir(parents=True, exist_ok=True)
            _delete(self.part)
            if source.is_dir():
                ignored = shutil.ignore_patterns(*NOT_COPIED)
                shutil.copytree(source, self.part, ignore=ignored, copy_function=os.link if link else shutil.copy2)
            else:
                shutil.copy2(source, self.part)
        except (OSError, shutil.Error) as exc:
            how = "link (across file systems, omit --link)" if link else "copy"
            raise BundleError(f"cannot {how} '{source}' to '{self.target}': {_first_reason(exc)}") from exc

    def write(self, text: str) -> None:
        """Write a file next to the target. Raises OSError."""
        self.part.parent.mkdir(parents=True, exist_ok=True)
        with self.part.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())

    def replace(self) -> None:
        """Move the old part aside, and the new one to the target. Raises OSError."""
        if self.existed:
            self.target.rename(self.old)
        self.part.rename(self.target)

    def undo(self) -> bool:
        """Delete the new part and restore the old one, wherever the replacement was interrupted; return success."""
        try:
            _delete(self.part)
            if not self.existed:
                _delete(self.target)
            elif os.path.lexists(self.old):
                _delete(self.target)
                self.old.rename(self.target)
        except OSError:
            return False
        return True

    def finish(self) -> None:
        """Delete the old part."""
        with suppress(OSError):  # the next run deletes it
            _delete(self.old)


def _install(out: Path, copies: Sequence[tuple[Path, str]], text: str, *, link: bool) -> None:
    """Copy all parts, then replace the old ones and write bundle.toml; an error of any kind restores what was there.

    Raises:
        BundleError: a file cannot be copied or written, or the bundle cannot be opened.
    """
    created = [folder for folder in (out / "packs", out, *out.parents) if not folder.exists()]
    swaps: list[_Swap] = []
    try:
        swaps += [_Swap(out / path) for path in (*(path for _, path in copies), FILE)]
        for (source, _), swap in zip(copies, swaps[:-1], strict=True):
            swap.copy(source, link=link)
        swaps[-1].write(text)
        for swap in swaps:
            swap.replace()
        open_bundle(out).verify(full=False)  # files may have changed while they were copied
    except BaseException as exc:
        failed = [swap for swap in reversed(swaps) if not swap.undo()]
        for folder in created:
            with suppress(OSError):  # it does not exist, or contains files of somebody else
                folder.rmdir()
        if failed:
            raise BundleError(f"{exc or 'interrupted'}; '{failed[0].target}' cannot be restored: its previous content, "
                              f"if there was any, is in '{failed[0].old}'") from exc
        if isinstance(exc, OSError):
            where = exc.filename or out
            raise BundleError(f"cannot write '{where}' ({exc.strerror or exc}); nothing was changed") from exc
        raise
    for swap in swaps:
        swap.finish()


def _first_reason(exc: OSError) -> str:
    """Return the first error of `shutil.copytree`, which collects those of all files."""
    errors = exc.args[0] if exc.args else ""
    return str(errors[0][2]) if isinstance(errors, list) and errors else str(exc.strerror or exc)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- bundle.toml ---------------------------------------------------------------------------------


def _to_toml(name: str, policy: Path | RemoteConfig, plan: _Plan) -> str:
    lines = [
        "# A bundle for `gog-edge serve --bundle FOLDER`. Paths are relative to this file and stay inside this folder.",
        f"schema = {SCHEMA}",
        f"name = {_string(name)}",
        "",
        *_policy_lines(policy, plan.policy),
        "",
        "# The encoder of pictures and texts that all packs were built with.",
        "[encoder]",
        f"path = {_string(plan.encoder)}",
        "",
        *_text_encoder_lines(plan.text_encoder),
        "# The packs that are searched: one table [[packs]] for each.",
    ]
    for pack in plan.packs:
        lines += ["[[packs]]", f"path = {_string(pack)}"]
    lines += [
        '# milvus = "http://10.0.0.5:19530"  # a Milvus server that searches the vectors of the pack above',
        '# key_env = "MILVUS_TOKEN"  # environment variable that contains its token',
        "",
    ]
    if plan.samples is not None:
        comment = "# Sample pictures with questions, for the kiosk page."
        lines += [comment, "[samples]", f"path = {_string(plan.samples)}", ""]
    return "\n".join([*lines, *_limit_lines()]) + "\n"


def _text_encoder_lines(path: str | None) -> list[str]:
    if path is None:
        return []
    comment = "# The text encoder of packs that have vectors of paragraphs, exported with `gog-edge export text`."
    return [comment, "[text_encoder]", f"path = {_string(path)}", ""]


def _policy_lines(policy: Path | RemoteConfig, path: str) -> list[str]:
    if isinstance(policy, Path):
        return ["# The policy, exported with `gog-edge export policy`.", "[policy]", f"path = {_string(path)}"]
    return [
        "# The policy, run by another server with an OpenAI-compatible API.",
        "[policy]",
        f"url = {_string(policy.url)}",
        f"model = {_string(policy.model)}",
        f"dialect = {_string(path)}",
        '# key_env = "API_KEY"  # environment variable that contains the API key',
        '# continues = "vllm"  # how the server continues an answer: vllm (also SGLang), llamacpp or none',
    ]


def _limit_lines() -> Iterable[str]:
    yield "# Limits of one question. Remove the # to change a default."
    yield "[limits]"
    for limit in fields(Limits):
        yield f"# {limit.name} = {limit.default}  # {_LIMITS[limit.name]}"


def _string(text: str) -> str:
    """Return a TOML basic string. JSON's escapes are valid in TOML, which also requires one for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
