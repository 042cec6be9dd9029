"""Every run-time limit with its default.

`Budget` limits one question, `Limits` is the [limits] table of bundle.toml, `RemoteConfig` a policy that another server
runs ([policy] with `url`), `MilvusConfig` a Milvus server that searches the vectors of a pack ([[packs]] with
`milvus`), `GazeConfig` how crops are cut, and `ServeConfig` how the server listens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from annotated_types import Ge, Gt, Le, MinLen

from gog_edge.errors import BundleError
from gog_edge.picture import DECODED_PIXELS, MAX_BYTES, MAX_PIXELS
from gog_edge.tables import Name, Positive, build

Seconds = Annotated[float, Gt(0)]


@dataclass(frozen=True, slots=True)
class Budget:
    """The limits of one question; each includes the answer."""

    turns: Positive = 6  # turns of the policy; the last one is always an answer
    tokens: Positive = 512  # generated tokens over all turns
    deadline_ms: Positive = 20_000  # from the first event to the answer


@dataclass(frozen=True, slots=True)
class GazeConfig:
    """How crops are cut."""

    pad: float = 0.04  # margin around a box, as a fraction of each side
    min_side: int = 8  # pixels of the given picture; smaller boxes are enlarged about their centre
    same_iou: float = 0.9  # boxes with at least this IoU are the same gaze
    early: bool = True  # start searches before the policy has ended its turn; results are the same
    # Other framings searched in the same call, as (scale, shift in x, shift in y) of the box, so that a box that is
    # slightly too small, too large or misplaced still matches.
    framings: tuple[tuple[float, float, float], ...] = (
        (1.3, 0.0, 0.0),
        (0.85, 0.0, 0.0),
        (1.0, -0.15, 0.0),
        (1.0, 0.15, 0.0),
        (1.0, 0.0, -0.15),
        (1.0, 0.0, 0.15),
    )


@dataclass(frozen=True, slots=True)
class Limits(Budget):
    """What a server accepts from any client."""

    question_chars: Positive = 2_000
    picture_bytes: Positive = MAX_BYTES
    picture_pixels: Positive = MAX_PIXELS
    decoded_pixels: Positive = DECODED_PIXELS  # larger pictures are reduced while they are decoded
    concurrent: Positive = 1  # questions answered at the same time; others wait or are refused

    @classmethod
    def from_table(cls, table: Any, *, where: str) -> Limits:
        """Read the table [limits]. Raises BundleError naming the first key that is unknown or invalid."""
        return build(cls, table, "limits", error=BundleError, where=where)


# Fields of a chat completion request that gog_edge sets itself.
REQUEST_FIELDS = ("model", "messages", "stream", "stream_options", "max_tokens", "temperature", "top_p", "seed",
                  "continue_final_message", "add_generation_prompt")


@dataclass(frozen=True, slots=True)
class RemoteConfig:
    """A policy behind an OpenAI-compatible server: [policy] of bundle.toml with `url` instead of `path`."""

    url: Name  # the base URL before /chat/completions, for example http://127.0.0.1:8000/v1
    model: Name  # the model's name on the server
    dialect: Annotated[str | Path, MinLen(1)]  # the name of a shipped dialect, or a .toml file inside the bundle
    key_env: str = ""  # environment variable that holds the API key; "" sends none
    # How an answer is forced. "vllm" (also SGLang) and "llamacpp" continue from the opening tag of the answer: the
    # first by two fields of the request, the second by a final assistant message. "none" can only ask for an answer.
    continues: Literal["vllm", "llamacpp", "none"] = "none"
    picture: Literal["png", "jpeg"] = "png"  # encoding of pictures in requests; "jpeg" is smaller and lossy
    factor: Positive = 28  # pixels; sides are multiples of it, so that the server does not resize again (Qwen3-VL: 32)
    min_pixels: Positive = 3_136
    max_pixels: int = 1_003_520
    crop_max_pixels: int = 1_003_520  # of the crop that is shown after a gaze
    temperature: Annotated[float, Ge(0)] = 0.0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    seed: int = 0
    connect_s: Seconds = 5.0
    read_s: Seconds = 60.0  # longest silence before the server counts as unreachable; the first token takes longest
    retries: Annotated[int, Ge(0)] = 2  # only before the first token
    options: Mapping[str, Any] = field(default_factory=dict)  # further fields of the request

    @classmethod
    def from_table(cls, table: Any, *, where: str) -> RemoteConfig:
        """Read the table [policy]. Raises BundleError naming the first key that is missing, unknown or invalid."""
        config = build(cls, table, "policy", error=BundleError, where=where)
        for key, problem in config._problems():
            raise BundleError(f"{where}: [policy] '{key}' {problem}, got {getattr(config, key)!r}")
        return config

    def _problems(self) -> Iterator[tuple[str, str]]:
        """Yield (key, what it must be) for what bounds of single fields cannot express."""
        if not _is_url(self.url):
            yield "url", "must be http:// or https:// and a host, without user and query (use 'key_env' for a key)"
        least = max(self.min_pixels, self.factor**2)
        for key in ("max_pixels", "crop_max_pixels"):
            if getattr(self, key) < least:
                yield key, f"must be at least min_pixels and factor squared, {least}"
        if reserved := sorted(set(self.options) & set(REQUEST_FIELDS)):
            yield "options", f"must not set {', '.join(reserved)}, which gog_edge sets itself"
        if not _is_json(self.options):
            yield "options", "must contain JSON values only"


@dataclass(frozen=True, slots=True)
class MilvusConfig:
    """A Milvus server that searches the vectors of a pack: [[packs]] of bundle.toml with `milvus` next to `path`."""

    uri: str  # for example http://10.0.0.5:19530; or a milvus-lite file, whose name ends in .db
    key_env: str = ""  # environment variable that holds the server's token; "" sends none
    timeout_s: float = 5.0  # of one call, including retries


def check_milvus_uri(uri: str, *, where: str) -> None:
    """Raise BundleError unless `uri` is the URL of a Milvus server or a milvus-lite file."""
    if not (_is_url(uri) or ("://" not in uri and uri.endswith(".db"))):
        raise BundleError(f"{where}: [[packs]] 'milvus' must be http:// or https:// and a host, without user and query "
                          f"(use 'key_env' for a token), or a milvus-lite file (.db), got {uri!r}")


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0 and not (
            url.username or url.password or url.query or url.fragment)
    except ValueError:
        return False


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class ServeConfig(Limits):
    """How the server listens, and how many cores it uses."""

    host: str = "127.0.0.1"
    port: int = 8080
    threads: int = 0  # 0: one for each core
    traces: Path | None = None  # folder that receives a trace of each question; None writes none

    @property
    def cores(self) -> int:
        """Return the number of threads of an engine."""
        return self.threads or os.cpu_count() or 1
