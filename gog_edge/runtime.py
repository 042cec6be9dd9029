"""A bundle that is open and ready to be asked, or the part of it that could be opened."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

import numpy as np

from gog_edge.agent.events import Event, Workflow
from gog_edge.agent.loop import Searcher, run_episode
from gog_edge.agent.trace import TraceWriter
from gog_edge.bundle import Bundle, Sample, open_bundle
from gog_edge.config import Budget, Limits
from gog_edge.engines.registry import CPU_SEARCH, EngineChoice, EngineSet
from gog_edge.errors import BackendError, DeviceLost, NotEnoughMemory, NotFound
from gog_edge.picture import Picture, decode_picture
from gog_edge.planner import MemoryPlan, fit_memory
from gog_edge.policy.base import Policy
from gog_edge.retrieval.text.segment import StoredPicture
from gog_edge.types import ImageQuery, PackState, Query, SearchResult, TextQuery

if TYPE_CHECKING:
    from gog_edge.retrieval.encoder import Encoder
    from gog_edge.retrieval.pack import MakeIndex, Pack

T = TypeVar("T")
OnPlan: TypeAlias = Callable[[MemoryPlan], None]
CPU = EngineChoice()
UNAVAILABLE = (BackendError, NotEnoughMemory)  # what may pass though the bundle stays as it is


class Album(Protocol):
    """What is needed of a pack beside searching it."""

    def picture(self, image: int) -> StoredPicture | None:
        """The file of an image, or None where there is no such image."""


class Library(Searcher, Protocol):
    """Packs at one moment: searched together, and looked at by name."""

    @property
    def packs(self) -> Mapping[str, Album]:
        """By name."""

    def search_many(self, crops: Sequence[ImageQuery], texts: Sequence[TextQuery], k: int) -> SearchResult:
        """One result of all queries, fused."""


class Packs(Protocol):
    """Where packs are borrowed from; `retrieval.shelf.Shelf` is one."""

    def lease(self) -> AbstractContextManager[Library]:
        """What is served now, unchanged until the end of the block."""

    def states(self) -> Sequence[PackState]:
        """Which generations are served."""

    def watching(self) -> AbstractContextManager[None]:
        """Looks for new generations, until the end of the block."""

    def wake(self) -> None:
        """Look at once."""

    def close(self) -> None:
        """Lend nothing any more; what is lent stays open until it is given back."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """Everything that answers a question: who decides, where it looks things up, and what it may cost.

    What needs a part that is not open raises BackendError with the reason.
    """

    name: str
    policy: Policy | None
    packs: Packs | None
    limits: Limits = field(default_factory=Limits)
    samples: tuple[Sample, ...] = ()
    failure: str = ""  # why policy or packs are not open
    lost: bool = False  # the GPU was, while they were opened: only another process may have them

    def ask(
        self,
        picture: bytes,
        question: str,
        *,
        workflow: Workflow = Workflow.GOG,
        budget: Budget | None = None,
        trace: TraceWriter | None = None,
    ) -> Generator[Event, None, None]:
        """Answer one question from the packs as they are now; the last event is Answered.

        Raises InputError before the first event.
        """
        text = self.limits.check_question(question)
        policy = self._there(self.policy)
        with self._lease() as library:
            yield from run_episode(
                self.decode(picture),
                text,
                policy=policy,
                retriever=library,
                budget=budget or self.limits.budget,
                workflow=workflow,
                trace=trace,
            )

    def decode(self, picture: bytes) -> Picture:
        """The picture in a file's bytes, within this box's limits. Raises PictureError."""
        return decode_picture(picture, self.limits.picture)

    def search(self, queries: Sequence[Query]) -> tuple[SearchResult, ...]:
        """Search the packs without a policy; one result for each query."""
        with self._lease() as library:
            return library.search(queries)

    def search_many(self, crops: Sequence[ImageQuery], texts: Sequence[TextQuery], k: int) -> SearchResult:
        """Search the packs without a policy; one fused result of at most k things for all queries."""
        with self._lease() as library:
            return library.search_many(crops, texts, k)

    def picture(self, pack: str, image: int) -> StoredPicture:
        """An image of a pack, as a citation names it. Raises NotFound."""
        with self._lease() as library:
            album = library.packs.get(pack)
            stored = album.picture(image) if album else None
            if stored is None:
                here = ", ".join(library.packs)
                raise NotFound(f"there is no image {image} in a pack '{pack}'; packs here: {here}")
            return stored

    def warm_up(self) -> None:
        """Let every part work once, so that the first visitor does not wait for it."""
        picture = Picture(np.full((224, 224, 3), 255, np.uint8))
        budget = Budget(turns=1, tokens=4)
        with self._lease() as library:
            for _ in run_episode(picture, "?", policy=self._there(self.policy), retriever=library, budget=budget,
                                 workflow=Workflow.FULL_IMAGE):
                pass

    def close(self) -> None:
        """Close the packs, and what searches them; what is lent stays open until it is given back."""
        if self.packs is not None:
            self.packs.close()

    def _lease(self) -> AbstractContextManager[Library]:
        return self._there(self.packs).lease()

    def _there(self, part: T | None) -> T:
        if part is None:
            raise BackendError(self.failure)
        return part


def open_runtime(
    folder: Path, *, threads: int, choice: EngineChoice = CPU, on_plan: OnPlan | None = None
) -> Runtime:
    """Open every part of a bundle. Raises ArtifactError or BackendError naming the part and what to do.

    `choice`: what runs the graphs and searches the packs. `on_plan` is told what it will take of the memory before
    anything is loaded; NotEnoughMemory when that is not free.
    """
    bundle = open_bundle(folder)
    engines = choice.read(bundle.root)
    fit_memory(bundle, engines, on_plan, search=choice.search)
    packs = open_packs(bundle, threads=threads, engines=engines, search=choice.search)
    with ExitStack() as opened:
        opened.callback(packs.close)
        policy = open_policy(bundle, threads=threads, engines=engines)
        opened.pop_all()
    return Runtime(bundle.name, policy, packs, bundle.limits, bundle.samples)


def open_missing(
    runtime: Runtime, bundle: Bundle, *, threads: int, choice: EngineChoice, on_plan: OnPlan | None = None
) -> Runtime:
    """Open and warm up what a runtime lacks. Where that cannot be had, its `failure` says why, and what is open stays.

    Where the GPU is lost, nothing stays, and it is `lost`.
    Raises ArtifactError where a part of the bundle itself cannot be opened.
    """
    given = runtime
    with ExitStack() as opened:
        try:
            engines = choice.read(bundle.root)
            if runtime.packs is None:
                fit_memory(bundle, engines, on_plan, search=choice.search)
                packs = open_packs(bundle, threads=threads, engines=engines, search=choice.search)
                opened.callback(packs.close)
                runtime = replace(runtime, packs=packs)
            whole = replace(runtime, policy=open_policy(bundle, threads=threads, engines=engines), failure="")
            whole.warm_up()
        except DeviceLost as exc:
            return replace(given, policy=None, packs=None, failure=str(exc), lost=True)
        except UNAVAILABLE as exc:
            whole = replace(runtime, failure=str(exc))
        opened.pop_all()
        return whole


def open_packs(
    bundle: Bundle, *, threads: int, engines: EngineSet | None = None, search: str = CPU_SEARCH
) -> Packs:
    """The bundle's packs with its encoder, and what searches them. Raises as `open_runtime` does."""
    from gog_edge.retrieval.encoder import Encoder  # engines load here: a runtime around other parts needs none
    from gog_edge.retrieval.registry import Shelf

    encoder = Encoder.open(bundle.encoder, threads=threads, engines=engines)
    with ExitStack() as opened:
        opener = pack_opener(bundle, _gpu_search(search, opened))
        return Shelf(bundle.packs, encoder, opener, opened.pop_all().close)


def _gpu_search(search: str, opened: ExitStack) -> MakeIndex | None:
    """What puts a pack's vectors on the GPU, and in `opened` what ends it; None where packs' own indexes search."""
    if search == CPU_SEARCH:
        return None
    from gog_edge.retrieval.vectors.gpu_index import Gpu

    return opened.enter_context(closing(Gpu())).index


def pack_opener(bundle: Bundle, make_index: MakeIndex | None = None) -> Callable[[Path, Encoder], Pack]:
    """How the bundle's packs are opened: with their own vectors, or those that a Milvus server searches.

    `make_index` searches their own vectors in place of their own indexes.

    Raises BackendError where a server is named that cannot be reached.
    """
    from gog_edge.retrieval.pack import Pack

    if not bundle.servers:
        return partial(Pack.open, make_index=make_index)
    from gog_edge.retrieval.vectors.milvus import MilvusServer

    servers = {pack: MilvusServer.open(config) for pack, config in bundle.servers.items()}
    return lambda pack, encoder: Pack.open(pack, encoder, servers[pack].index if pack in servers else None,
                                           make_index=make_index)  # fmt: skip


def open_policy(bundle: Bundle, *, threads: int, engines: EngineSet | None = None) -> Policy:
    """The bundle's policy: its own folder, or the server that it names. Raises as `open_runtime` does."""
    if isinstance(bundle.policy, Path):
        from gog_edge.policy.local import LocalPolicy

        return LocalPolicy.open(bundle.policy, threads=threads, engines=engines)
    try:
        import httpx  # noqa: F401  # only boxes that reach another server carry an HTTP client
    except ModuleNotFoundError as exc:
        raise BackendError(f"bundle '{bundle.name}' names a policy at {bundle.policy.url}, which needs httpx; "
                           "pip install 'gog_edge[remote]'") from exc
    from gog_edge.policy.remote import RemotePolicy

    return RemotePolicy.open(bundle.policy)
