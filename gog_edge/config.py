"""Every run-time limit with its default, in one place: each class adds what its layer owns.

`Budget` is what a question may cost, `Limits` what a box accepts (the [limits] table of bundle.toml),
`RemoteConfig` where a policy is that another server runs ([policy] with `url`), `MilvusConfig` where a pack's vectors
are searched ([[packs]] with `milvus`), `ServeConfig` how it listens.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gog_edge.errors import BundleError, QuestionError
from gog_edge.picture import PictureLimits

_PICTURE = PictureLimits()


@dataclass(frozen=True, slots=True)
class Budget:
    """What one question may cost; the answer is included in each figure."""

    turns: int = 6  # times the policy speaks; the last one is always an answer
    tokens: int = 512  # tokens generated, over all turns
    deadline_ms: int = 20_000  # from the first event to the answer


@dataclass(frozen=True, slots=True)
class GazeConfig:
    """How crops are cut."""

    pad: float = 0.04  # share of each side that is added around a box
    min_side: int = 8  # pixels of the given picture; smaller boxes are grown about their centre
    same_iou: float = 0.9  # boxes that overlap this much are the same gaze
    early: bool = True  # searches begin before the policy has ended its turn; results are the same
    # Other framings searched in the same call, as (scale, shift in x, shift in y) of the box: a box that is a little
    # too small, too large or beside the thing still finds it.
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
    """What a box accepts from anyone who asks."""

    question_chars: int = 2_000
    picture_bytes: int = _PICTURE.max_bytes
    picture_pixels: int = _PICTURE.max_pixels
    concurrent: int = 1  # questions answered at the same time; the others wait or are turned away

    @property
    def budget(self) -> Budget:
        """The part that goes to the loop."""
        return Budget(self.turns, self.tokens, self.deadline_ms)

    @property
    def picture(self) -> PictureLimits:
        """The part that goes to `decode_picture`."""
        return PictureLimits(self.picture_bytes, self.picture_pixels)

    @classmethod
    def from_table(cls, table: Mapping[str, Any], *, where: str) -> Limits:
        """Read [limits]; BundleError names the first key that is unknown or no positive whole number."""
        known = [field.name for field in fields(Limits)]
        for key, value in table.items():
            if key not in known:
                raise BundleError(f"{where}: unknown key '{key}' in [limits]; known are {', '.join(known)}")
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BundleError(f"{where}: [limits] {key} = {value!r} is no positive whole number")
        return cls(**table)

    def check_question(self, question: str) -> str:
        """The question without outer white space; QuestionError when it is empty, too long or not text."""
        text = question.strip()
        if not text:
            raise QuestionError("the question is empty; ask something about the picture")
        if len(text) > self.question_chars:
            raise QuestionError(f"the question has {len(text)} characters, the limit is {self.question_chars}")
        bad = next((c for c in text if (c < " " and c not in "\t\n\r") or "\ud800" <= c <= "\udfff"), None)
        if bad is not None:
            raise QuestionError(f"the question holds {bad!r}, which is no text; remove it")
        return text


CONTINUES = ("vllm", "llamacpp", "none")
PICTURE_FORMATS = ("png", "jpeg")
REQUEST_FIELDS = ("model", "messages", "stream", "stream_options", "max_tokens", "temperature", "top_p", "seed",
                  "continue_final_message", "add_generation_prompt")  # of a chat completion: ours to set


@dataclass(frozen=True, slots=True)
class RemoteConfig:
    """A policy that an OpenAI-compatible server runs: [policy] of bundle.toml with `url` in place of `path`."""

    url: str  # what stands before /chat/completions, as http://127.0.0.1:8000/v1
    model: str  # as the server names it
    dialect: str | Path  # the name of one that ships with the package, or a .toml file of the bundle
    key_env: str = ""  # environment variable that holds the server's API key; "" sends none
    # How an answer is forced: "vllm" (SGLang too) and "llamacpp" go on from its opening mark, the first told by two
    # fields of the request, the second by a last message of the assistant's; "none" can only be asked to answer.
    continues: str = "none"
    picture: str = "png"  # how pictures travel; "jpeg" is smaller and loses a little
    factor: int = 28  # pixels; sides are multiples of it, as the server's own resizing keeps them (Qwen3-VL: 32)
    min_pixels: int = 3_136
    max_pixels: int = 1_003_520
    crop_max_pixels: int = 1_003_520  # of what a gaze shows again
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    connect_s: float = 5.0
    read_s: float = 60.0  # silence after which the server counts as gone; the first token needs the longest
    retries: int = 2  # only before the first token
    options: Mapping[str, Any] = field(default_factory=dict)  # further fields of the request, as the server takes them

    @classmethod
    def from_table(cls, table: Mapping[str, Any], *, where: str) -> RemoteConfig:
        """Read [policy]; BundleError names the first key that is missing, unknown or wrong."""
        kinds = {each.name: str(each.type) for each in fields(cls)}
        for key, value in table.items():
            if key not in kinds:
                raise BundleError(f"{where}: unknown key [policy] '{key}'; with 'url' known are {', '.join(kinds)}")
            if not _is_kind(value, kinds[key]):
                raise BundleError(f"{where}: [policy] '{key}' = {value!r} is of a wrong kind")
        for key in ("url", "model", "dialect"):
            if not table.get(key):
                raise BundleError(f"{where}: [policy] '{key}' is missing; a policy with a url needs it")
        config = cls(**table)
        for key, right, needed in config._rules():
            if not right:
                raise BundleError(f"{where}: [policy] '{key}' = {table.get(key)!r}; {needed}")
        return config

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        """Key, whether it is right, what it must be."""
        address = "give http:// or https:// and a host, no user and no query; a key goes by 'key_env'"
        yield "url", _is_address(self.url), address
        yield "continues", self.continues in CONTINUES, f"it is one of {', '.join(CONTINUES)}"
        yield "picture", self.picture in PICTURE_FORMATS, f"it is one of {', '.join(PICTURE_FORMATS)}"
        yield "factor", self.factor >= 1, "it is at least 1"
        yield "min_pixels", self.min_pixels >= 1, "it is at least 1"
        for key in ("max_pixels", "crop_max_pixels"):
            least = max(self.min_pixels, self.factor**2)
            yield key, getattr(self, key) >= least, f"it is at least min_pixels and one square of factor: {least}"
        yield "temperature", 0 <= self.temperature < math.inf, "it is 0 or more"
        yield "top_p", 0 < self.top_p <= 1, "it is above 0 and at most 1"
        for key in ("connect_s", "read_s"):
            yield key, 0 < getattr(self, key) < math.inf, "it is a number of seconds above 0"
        yield "retries", self.retries >= 0, "it is 0 or more"
        ours = sorted(set(self.options) & set(REQUEST_FIELDS))
        yield "options", not ours, f"{', '.join(ours)} cannot be set here"
        yield "options", _is_json(self.options), "only what JSON can hold"


@dataclass(frozen=True, slots=True)
class MilvusConfig:
    """A Milvus server that searches a pack's vectors: [[packs]] of bundle.toml with `milvus` beside `path`."""

    uri: str  # as http://10.0.0.5:19530; or a file of milvus-lite, whose name ends in .db
    key_env: str = ""  # environment variable that holds the server's token; "" sends none
    timeout_s: float = 5.0  # of one call, in which it is tried again

    @classmethod
    def from_table(cls, table: Mapping[str, Any], *, root: Path, where: str) -> MilvusConfig:
        """Read the keys `milvus`, `key_env` and `timeout_s`; BundleError names the first that is wrong.

        A file is looked for below `root`.
        """
        uri, key_env, timeout_s = table["milvus"], table.get("key_env", ""), table.get("timeout_s", 5.0)
        if not isinstance(uri, str) or not (_is_address(uri) or ("://" not in uri and uri.endswith(".db"))):
            raise BundleError(f"{where}: [[packs]] 'milvus' = {uri!r}; give http:// or https:// and a host, no user "
                              "and no query, or a file of milvus-lite (.db); a key goes by 'key_env'")
        if not isinstance(key_env, str):
            raise BundleError(f"{where}: [[packs]] 'key_env' = {key_env!r} is no name of an environment variable")
        if not _is_kind(timeout_s, "float") or not 0 < timeout_s < math.inf:
            raise BundleError(f"{where}: [[packs]] 'timeout_s' = {timeout_s!r}; it is a number of seconds above 0")
        return cls(uri if "://" in uri else str(root / uri), key_env, float(timeout_s))


def _is_address(text: str) -> bool:
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


def _is_kind(value: Any, kind: str) -> bool:
    match kind:
        case "int":
            return type(value) is int
        case "float":
            return type(value) in (int, float)
        case "Mapping[str, Any]":
            return isinstance(value, Mapping)
    return isinstance(value, str | Path)


@dataclass(frozen=True, slots=True)
class ServeConfig(Limits):
    """How a box listens and on how many cores it works."""

    host: str = "127.0.0.1"
    port: int = 8080
    threads: int = 0  # 0: one for each core
    traces: Path | None = None  # folder that gets a trace of each episode; None keeps none

    @property
    def cores(self) -> int:
        """The number of threads that an engine gets."""
        return self.threads or os.cpu_count() or 1
