"""The open packs of a box: a new generation is opened beside the old one and takes its place between two requests."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from gog_edge.errors import GogEdgeError, PackError
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import MANIFEST, read_manifest
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.retriever import Retriever
from gog_edge.types import PackState

_log = logging.getLogger(__name__)
LOOK_S = 1.0  # between two looks at the manifests

# Until a generation that was refused is tried again though its manifest is the same: files may be copied in any order.
AGAIN_S = 30.0
TRIES = 5  # to open a pack that changes meanwhile
OpenPack: TypeAlias = Callable[[Path, Encoder], Pack]
_Mark: TypeAlias = tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Edition:
    """What is served from one switch to the next."""

    retriever: Retriever
    packs: tuple[Pack, ...]
    users: int = 0


@dataclass(slots=True)
class _Place:
    """One pack of the shelf, and what was seen of it last."""

    folder: Path
    mark: _Mark = ()
    switches: int = 0
    refusals: int = 0
    refused: str = ""
    again: float = 0.0  # when a refused generation is tried again


class Shelf:
    """Packs of one encoder that may get new generations while they are read."""

    def __init__(self, folders: Sequence[Path], encoder: Encoder, open_pack: OpenPack = Pack.open,
                 on_closed: Callable[[], None] | None = None) -> None:
        """Open every pack. Raises PackError as `Pack.open` and `Retriever` do.

        `on_closed` ends what packs are opened with: it is called when the last one is closed, also where opening fails,
        and may be called twice.
        """
        self._encoder, self._open_pack, self._on_closed = encoder, open_pack, on_closed
        self._places = [_Place(folder) for folder in folders]
        self._lock = threading.Lock()  # of who uses what: held for a moment only
        self._looking = threading.Lock()
        self._woken = threading.Event()
        self._edition: _Edition | None = None
        self._retired: list[_Edition] = []
        self._held = 0  # packs that are open, or are being opened
        packs: list[Pack] = []
        try:
            for place in self._places:
                packs.append(self._open(place))
            self._edition = _Edition(Retriever(encoder, packs), tuple(packs))
        except BaseException:
            for pack in packs:
                self._give_back(pack)
            raise

    @contextmanager
    def lease(self) -> Iterator[Retriever]:
        """What is served now, to be used until the end of the block: it stays as it is and stays open."""
        with self._lock:
            edition = self._served()
            edition.users += 1
        try:
            yield edition.retriever
        finally:
            with self._lock:
                edition.users -= 1
            self._close_unused()

    def states(self) -> tuple[PackState, ...]:
        """Which generation of each pack is served, and what was refused."""
        with self._lock:
            return tuple(
                PackState(pack.name, pack.manifest.generation, place.switches, place.refusals, place.refused)
                for place, pack in zip(self._places, self._served().packs, strict=True)
            )

    # --- new generations ----------------------------------------------------------------------

    @contextmanager
    def watching(self, every: float = LOOK_S) -> Iterator[None]:
        """Look for new generations in a thread of its own, until the end of the block."""
        stopped = threading.Event()

        def watch() -> None:
            while not stopped.is_set():
                self._woken.wait(every)
                hurry = self._woken.is_set()
                self._woken.clear()
                if not stopped.is_set():
                    self.refresh(hurry=hurry)

        thread = threading.Thread(target=watch, name="shelf", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            self.wake()
            thread.join()

    def wake(self) -> None:
        """Let the watch look at once, at refused generations too; may be called from a signal's handler."""
        self._woken.set()

    def refresh(self, *, hurry: bool = False) -> None:
        """Look at every manifest once, and serve what is new there. What cannot be served is refused and logged.

        While anyone still uses what was served before the last switch, nothing happens: no more than two generations
        are open at a time. With `hurry`, refused generations are tried again now.
        """
        with self._looking:
            for number, place in enumerate(self._places):
                served = self._edition
                if served is None or self._retired:
                    return
                again = place.refused and (hurry or time.monotonic() > place.again)
                if again or _mark_of(place.folder) != place.mark:
                    self._switch(number, place, served)

    def _switch(self, number: int, place: _Place, served: _Edition) -> None:
        pack: Pack | None = None
        place.mark = _mark_of(place.folder)
        try:
            if read_manifest(place.folder) == served.packs[number].manifest:
                place.refused = ""
                return
            pack = self._open(place)
            packs = (*served.packs[:number], pack, *served.packs[number + 1 :])
            edition = _Edition(Retriever(self._encoder, packs), packs)
        except Exception as exc:  # whatever is wrong with the new generation, the old one goes on
            if pack is not None:
                self._give_back(pack)
            self._refuse(place, exc)
            return
        with self._lock:
            closed = self._edition is None  # meanwhile
            if not closed:
                self._edition = edition
                self._retired.append(served)
                place.switches, place.refused = place.switches + 1, ""
        if closed:
            self._give_back(pack)
            return
        self._close_unused()
        _log.info("pack '%s': generation %d is served", pack.name, pack.manifest.generation)

    def _refuse(self, place: _Place, exc: Exception) -> None:
        place.again = time.monotonic() + AGAIN_S
        reason = str(exc) if isinstance(exc, GogEdgeError) else repr(exc)
        if reason != place.refused:
            _log.warning("pack '%s': what lies there now is not served, the older generation is: %s", place.folder,
                         reason)
        place.refusals, place.refused = place.refusals + 1, reason

    def _open(self, place: _Place) -> Pack:
        """The generation in force; held until it is given back."""
        with self._lock:
            self._held += 1
        try:
            return self._open_latest(place)
        except BaseException:
            self._give_back(None)
            raise

    def _open_latest(self, place: _Place) -> Pack:
        """Anew where another generation comes into force while this one is opened."""
        for _ in range(TRIES - 1):
            place.mark = _mark_of(place.folder)
            try:
                return self._open_pack(place.folder, self._encoder)
            except PackError:
                if _mark_of(place.folder) == place.mark:
                    raise
        return self._open_pack(place.folder, self._encoder)

    # --- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Lend nothing any more; each pack is closed when nobody uses it."""
        with self._lock:
            if self._edition is not None:
                self._retired.append(self._edition)
            self._edition = None
        self._close_unused()

    def _served(self) -> _Edition:
        if self._edition is None:
            raise PackError("the packs are closed: the server is stopping")
        return self._edition

    def _close_unused(self) -> None:
        with self._lock:
            unused = [edition for edition in self._retired if not edition.users]
            self._retired = [edition for edition in self._retired if edition.users]
            kept = {id(pack) for edition in (*self._retired, self._edition) if edition for pack in edition.packs}
        for pack in (pack for edition in unused for pack in edition.packs):
            if id(pack) not in kept:
                self._give_back(pack)

    def _give_back(self, pack: Pack | None) -> None:
        """Close a pack, or forget one that did not open."""
        try:
            if pack is not None:
                pack.close()
        finally:
            with self._lock:
                self._held -= 1
                ended = self._edition is None and not self._held
            if ended and self._on_closed is not None:
                self._on_closed()


def _mark_of(folder: Path) -> _Mark:
    """What tells a manifest from the one that took its place; empty where there is none."""
    try:
        stat = (folder / MANIFEST).stat()
    except OSError:
        return ()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
