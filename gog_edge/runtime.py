"""An open bundle: the policy and the packs that answer questions, or those of them that could be opened."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np

from gog_edge.agent.events import AnswerRecord, Event, Workflow
from gog_edge.agent.loop import EpisodeClosed, OnEvent, run_episode
from gog_edge.agent.trace import TraceWriter
from gog_edge.bundle import Bundle, Sample, open_bundle
from gog_edge.config import Budget, Limits
from gog_edge.engines.registry import CPU_SEARCH, EngineChoice, EngineSet
from gog_edge.errors import BackendError, DeviceLost, NotEnoughMemory, NotFound, QuestionError
from gog_edge.picture import Picture, decode_picture
from gog_edge.planner import MemoryPlan, check_memory
from gog_edge.policy.base import Policy
from gog_edge.retrieval.text.segment import ImageFile
from gog_edge.types import ImageQuery, Query, SearchResult, TextQuery

if TYPE_CHECKING:
    from gog_edge.retrieval.encoder import Encoder
    from gog_edge.retrieval.pack import IndexFactory, Pack
    from gog_edge.retrieval.registry import PackRegistry
    from gog_edge.retrieval.retriever import Retriever
    from gog_edge.retrieval.text.encoder import TextEncoder

T = TypeVar("T")
OnPlan: TypeAlias = Callable[[MemoryPlan], None]
CPU = EngineChoice()
TRANSIENT_ERRORS = (BackendError, NotEnoughMemory)  # may disappear without a change of the bundle


@dataclass(frozen=True, slots=True)
class Runtime:
    """The policy, the packs and the limits that questions are answered with.

    Methods that need a part that is not open raise BackendError with the reason.
    """

    name: str
    policy: Policy | None
    packs: PackRegistry | None
    limits: Limits = field(default_factory=Limits)
    samples: tuple[Sample, ...] = ()
    failure: str = ""  # why the policy or the packs are not open
    lost: bool = False  # the GPU was lost while they were opened: only a new process can open them

    def answer(
        self,
        picture: bytes,
        question: str,
        on_event: OnEvent,
        *,
        workflow: Workflow = Workflow.GOG,
        budget: Budget | None = None,
        trace: TraceWriter | None = None,
    ) -> AnswerRecord:
        """Answer one question in this thread, calling `on_event` with each event; see `run_episode`.

        Raises InputError before the first event if the picture or the question is refused.
        """
        text = check_question(question, self.limits.question_chars)
        policy = self._require(self.policy)
        with self._lease() as retriever:
            return run_episode(
                self.decode(picture),
                text,
                policy=policy,
                retriever=retriever,
                budget=budget or self.limits,
                on_event=on_event,
                workflow=workflow,
                trace=trace,
            )

    def ask(
        self,
        picture: bytes,
        question: str,
        *,
        workflow: Workflow = Workflow.GOG,
        budget: Budget | None = None,
        trace: TraceWriter | None = None,
    ) -> Generator[Event, None, None]:
        """Answer one question in a thread of its own, and yield its events as they happen; the last is `Answered`.

        Closing the generator stops the policy at its next piece of text, and waits for it. Raises as `answer` does.
        """
        events: SimpleQueue[Event | None] = SimpleQueue()
        closed = threading.Event()

        def put(event: Event) -> None:
            if closed.is_set():
                raise EpisodeClosed("the generator of events was closed")
            events.put(event)

        with ThreadPoolExecutor(1, thread_name_prefix="episode") as thread:
            episode = thread.submit(self.answer, picture, question, put, workflow=workflow, budget=budget, trace=trace)
            episode.add_done_callback(lambda _: events.put(None))
            try:
                while (event := events.get()) is not None:
                    yield event
            finally:
                closed.set()
            episode.result()

    def decode(self, picture: bytes) -> Picture:
        """Decode a picture file within the limits of the bundle. Raises PictureError."""
        limits = self.limits
        return decode_picture(picture, max_bytes=limits.picture_bytes, max_pixels=limits.picture_pixels,
                              decoded_pixels=limits.decoded_pixels)

    def search(self, queries: Sequence[Query]) -> tuple[SearchResult, ...]:
        """Search the packs without the policy, and return one result for each query."""
        with self._lease() as retriever:
            return retriever.search(queries)

    def search_many(self, crops: Sequence[ImageQuery], texts: Sequence[TextQuery], k: int) -> SearchResult:
        """Search the packs without the policy, and return one fused result of at most k items for all queries."""
        with self._lease() as retriever:
            return retriever.search_many(crops, texts, k)

    def picture(self, pack: str, image: int) -> ImageFile:
        """Return an image of a pack by the names that a citation gives. Raises NotFound."""
        with self._lease() as retriever:
            if pack not in retriever.packs:
                raise NotFound(f"the pack '{pack}' does not exist; the packs are {', '.join(retriever.packs)}")
            stored = retriever.packs[pack].image_file(image)
            if stored is None:
                raise NotFound(f"the pack '{pack}' has no image {image}; use the id in a citation or search result")
            return stored

    def warm_up(self) -> None:
        """Run every part once, so that the first question is not slower than the others."""
        picture = Picture(np.full((224, 224, 3), 255, np.uint8))
        with self._lease() as retriever:
            run_episode(picture, "?", policy=self._require(self.policy), retriever=retriever,
                        budget=Budget(turns=1, tokens=4), on_event=lambda _: None, workflow=Workflow.FULL_IMAGE)

    def close(self) -> None:
        """Close the packs and their search resources; packs in use stay open until they are released."""
        if self.packs is not None:
            self.packs.close()

    def _lease(self) -> AbstractContextManager[Retriever]:
        return self._require(self.packs).lease()

    def _require(self, part: T | None) -> T:
        if part is None:
            raise BackendError(self.failure)
        return part


def check_question(question: str, max_chars: int) -> str:
    """Return the question stripped of white space. Raises QuestionError if it is empty, too long or binary."""
    text = question.strip()
    if not text:
        raise QuestionError("the question is empty; ask something about the picture")
    if len(text) > max_chars:
        raise QuestionError(f"the question has {len(text)} characters, the limit is {max_chars}")
    bad = next((c for c in text if (c < " " and c not in "\t\n\r") or "\ud800" <= c <= "\udfff"), None)
    if bad is not None:
        raise QuestionError(f"the question contains the character {bad!r}, which is not text; remove it")
    return text


def open_runtime(
    folder: Path, *, threads: int, choice: EngineChoice = CPU, on_plan: OnPlan | None = None
) -> Runtime:
    """Open every part of a bundle.

    Args:
        folder: the bundle.
        threads: CPU threads of the engines.
        choice: the engines that run the graphs, and what searches the packs.
        on_plan: called with the memory plan before anything is loaded.

    Raises:
        ArtifactError: a part of the bundle is missing or damaged.
        BackendError: an engine or a server is not available.
        NotEnoughMemory: the plan exceeds the free memory.
    """
    bundle = open_bundle(folder)
    engines = choice.read_engines(bundle.root)
    check_memory(bundle, engines, on_plan, search=choice.search)
    packs = open_packs(bundle, threads=threads, engines=engines, search=choice.search)
    with ExitStack() as opened:
        opened.callback(packs.close)
        policy = open_policy(bundle, threads=threads, engines=engines)
        opened.pop_all()
    return Runtime(bundle.name, policy, packs, bundle.limits, bundle.samples)


def open_missing(
    runtime: Runtime, bundle: Bundle, *, threads: int, choice: EngineChoice, on_plan: OnPlan | None = None
) -> Runtime:
    """Return the runtime with its missing parts opened and warmed up.

    If they are not available, the returned runtime keeps its open parts and its `failure` is the reason. If the GPU is
    lost, it keeps nothing and is `lost`. Raises ArtifactError if a part of the bundle is missing or damaged.
    """
    given = runtime
    with ExitStack() as opened:
        try:
            engines = choice.read_engines(bundle.root)
            if runtime.packs is None:
                check_memory(bundle, engines, on_plan, search=choice.search)
                packs = open_packs(bundle, threads=threads, engines=engines, search=choice.search)
                opened.callback(packs.close)
                runtime = replace(runtime, packs=packs)
            complete = replace(runtime, policy=open_policy(bundle, threads=threads, engines=engines), failure="")
            complete.warm_up()
        except DeviceLost as exc:
            return replace(given, policy=None, packs=None, failure=str(exc), lost=True)
        except TRANSIENT_ERRORS as exc:
            complete = replace(runtime, failure=str(exc))
        opened.pop_all()
        return complete


def open_packs(
    bundle: Bundle, *, threads: int, engines: EngineSet | None = None, search: str = CPU_SEARCH
) -> PackRegistry:
    """Open the packs of a bundle with its encoders. Raises as `open_runtime` does."""
    from gog_edge.retrieval.encoder import Encoder  # loads the engines, which a runtime of other parts does not need
    from gog_edge.retrieval.registry import PackRegistry

    encoder = Encoder.open(bundle.encoder, threads=threads, engines=engines)
    text_encoder = _open_text_encoder(bundle, threads)
    with ExitStack() as opened:
        opener = pack_opener(bundle, _gpu_search(search, opened), text_encoder)
        return PackRegistry(bundle.packs, encoder, opener, opened.pop_all().close, text_encoder=text_encoder)


def _open_text_encoder(bundle: Bundle, threads: int) -> TextEncoder | None:
    """Open the text encoder of a bundle that has one; it runs on the CPU."""
    if bundle.text_encoder is None:
        return None
    from gog_edge.retrieval.text.encoder import TextEncoder

    return TextEncoder.open(bundle.text_encoder, threads=threads)


def _gpu_search(search: str, opened: ExitStack) -> IndexFactory | None:
    """Return a factory of GPU indexes, closed by `opened`; None if the indexes of the packs are used."""
    if search == CPU_SEARCH:
        return None
    from gog_edge.retrieval.vectors.gpu_index import FaissGpu

    return opened.enter_context(closing(FaissGpu())).make_index


def pack_opener(bundle: Bundle, make_index: IndexFactory | None = None,
                text_encoder: TextEncoder | None = None) -> Callable[[Path, Encoder], Pack]:
    """Return the function that opens a pack of the bundle: with its own vectors, or with a Milvus client.

    `make_index` replaces the indexes of packs that have their own vectors; vectors of paragraphs are never on a server.
    Raises BackendError if a Milvus server cannot be reached.
    """
    from gog_edge.retrieval.pack import Pack

    if not bundle.servers:
        return partial(Pack.open, make_index=make_index, text_encoder=text_encoder)
    from gog_edge.retrieval.vectors.milvus import MilvusConnection

    servers = {pack: MilvusConnection.open(config) for pack, config in bundle.servers.items()}
    return lambda pack, encoder: Pack.open(pack, encoder, servers[pack].open_index if pack in servers else None,
                                           make_index=make_index, text_encoder=text_encoder)  # fmt: skip


def open_policy(bundle: Bundle, *, threads: int, engines: EngineSet | None = None) -> Policy:
    """Open the policy of a bundle: a local folder or a remote server. Raises as `open_runtime` does."""
    if isinstance(bundle.policy, Path):
        from gog_edge.policy.local import LocalPolicy

        return LocalPolicy.open(bundle.policy, threads=threads, engines=engines)
    try:
        import httpx  # noqa: F401  # an optional dependency: most machines have no remote policy
    except ModuleNotFoundError as exc:
        raise BackendError(f"bundle '{bundle.name}' names a policy at {bundle.policy.url}, which needs httpx; "
                           "run pip install 'gog_edge[remote]'") from exc
    from gog_edge.policy.remote import RemotePolicy

    return RemotePolicy.open(bundle.policy)
