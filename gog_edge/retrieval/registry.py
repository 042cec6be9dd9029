"""The open packs of a bundle: new generations are opened next to the served ones and replace them between requests."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from gog_edge.errors import GogEdgeError, PackError
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import MANIFEST, read_manifest
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.retriever import Retriever
from gog_edge.types import PackState

if TYPE_CHECKING:
    from gog_edge.retrieval.text.encoder import TextEncoder

_log = logging.getLogger(__name__)
POLL_INTERVAL_S = 1.0  # between two checks of the manifests
# A refused generation is tried again after this time even if its manifest is the same: the files of a pack may be
# copied in any order, so that a missing file may have arrived.
RETRY_INTERVAL_S = 30.0
MAX_OPEN_ATTEMPTS = 5  # to open a pack that gets new generations meanwhile
OpenPack: TypeAlias = Callable[[Path, Encoder], Pack]
_FileIdentity: TypeAlias = tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Snapshot:
    """The open packs that are served together, from one switch to the next."""

    retriever: Retriever
    packs: tuple[Pack, ...]
    leases: int = 0


@dataclass(slots=True)
class _PackSlot:
    """One pack of the registry and the state of its manifest when it was last checked."""

    folder: Path
    manifest_identity: _FileIdentity = ()
    switches: int = 0
    refusals: int = 0
    refused: str = ""  # why the generation on disk is not served; empty if it is
    retry_at: float = 0.0  # time.monotonic() from which a refused generation is tried again


class PackRegistry:
    """Packs of one encoder that may get new generations while they are searched."""

    def __init__(self, folders: Sequence[Path], encoder: Encoder, open_pack: OpenPack = Pack.open,
                 on_closed: Callable[[], None] | None = None, *, text_encoder: TextEncoder | None = None) -> None:
        """Open every pack. Raises PackError as `Pack.open` and `Retriever` do.

        Args:
            folders: The packs.
            encoder: The encoder that all of them were built with.
            open_pack: Opens one pack, with the text encoder if there is one.
            on_closed: Called after the last pack is closed, also if opening fails. It may be called twice.
            text_encoder: The text encoder of the packs that have vectors of paragraphs.
        """
        self._encoder, self._open_pack, self._on_closed = encoder, open_pack, on_closed
        self._text_encoder = text_encoder
        self._slots = [_PackSlot(folder) for folder in folders]
        self._lock = threading.Lock()  # guards the snapshots and their lease counts; held briefly
        self._refreshing = threading.Lock()  # one refresh at a time
        self._wakeup = threading.Event()
        self._current: _Snapshot | None = None
        self._retired: list[_Snapshot] = []
        self._open_count = 0  # packs that are open or being opened
        packs: list[Pack] = []
        try:
            for slot in self._slots:
                packs.append(self._open(slot))
            self._current = _Snapshot(Retriever(encoder, packs, text_encoder=text_encoder), tuple(packs))
        except BaseException:
            for pack in packs:
                self._release(pack)
            raise

    @contextmanager
    def lease(self) -> Iterator[Retriever]:
        """Provide the retriever that is served now; it stays unchanged and open until the end of the block.

        Raises:
            PackError: The registry is closed.
        """
        with self._lock:
            snapshot = self._served()
            snapshot.leases += 1
        try:
            yield snapshot.retriever
        finally:
            with self._lock:
                snapshot.leases -= 1
            self._close_unused()

    def states(self) -> tuple[PackState, ...]:
        """Return the served generation of each pack and the reason for a refused one."""
        with self._lock:
            return tuple(
                PackState(pack.name, pack.manifest.generation, slot.switches, slot.refusals, slot.refused)
                for slot, pack in zip(self._slots, self._served().packs, strict=True)
            )

    def close(self) -> None:
        """Refuse new leases; each pack is closed when its last lease ends."""
        with self._lock:
            if self._current is not None:
                self._retired.append(self._current)
            self._current = None
        self._close_unused()

    # --- new generations ----------------------------------------------------------------------

    @contextmanager
    def watch(self, interval_s: float = POLL_INTERVAL_S) -> Iterator[None]:
        """Call `refresh` every `interval_s` seconds in a thread of its own, until the end of the block."""
        stopped = threading.Event()

        def poll() -> None:
            while not stopped.is_set():
                self._wakeup.wait(interval_s)
                force = self._wakeup.is_set()
                self._wakeup.clear()
                if not stopped.is_set():
                    self.refresh(force=force)

        thread = threading.Thread(target=poll, name="pack-registry", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            self.request_refresh()
            thread.join()

    def request_refresh(self) -> None:
        """Make the thread of `watch` refresh now, refused generations included. Safe in a signal handler."""
        self._wakeup.set()

    def refresh(self, *, force: bool = False) -> None:
        """Check every manifest once and serve new generations. One that cannot be opened is refused and logged.

        Nothing happens while a snapshot from before the last switch is still leased: at most two generations of a pack
        are open at a time. `force` tries refused generations again now.
        """
        with self._refreshing:
            for number, slot in enumerate(self._slots):
                served = self._current
                if served is None or self._retired:
                    return
                retry = slot.refused and (force or time.monotonic() > slot.retry_at)
                if retry or _identity_of_manifest(slot.folder) != slot.manifest_identity:
                    self._switch(number, slot, served)

    def _switch(self, number: int, slot: _PackSlot, served: _Snapshot) -> None:
        pack: Pack | None = None
        slot.manifest_identity = _identity_of_manifest(slot.folder)
        try:
            if read_manifest(slot.folder) == served.packs[number].manifest:
                slot.refused = ""
                return
            pack = self._open(slot)
            packs = (*served.packs[:number], pack, *served.packs[number + 1 :])
            snapshot = _Snapshot(Retriever(self._encoder, packs, text_encoder=self._text_encoder), packs)
        except Exception as exc:  # whatever is wrong with the new generation, the old one stays in service
            if pack is not None:
                self._release(pack)
            self._refuse(slot, exc)
            return
        with self._lock:
            closed = self._current is None  # by another thread, meanwhile
            if not closed:
                self._current = snapshot
                self._retired.append(served)
                slot.switches, slot.refused = slot.switches + 1, ""
        if closed:
            self._release(pack)
            return
        self._close_unused()
        _log.info("pack '%s': now serving generation %d", pack.name, pack.manifest.generation)

    def _refuse(self, slot: _PackSlot, exc: Exception) -> None:
        slot.retry_at = time.monotonic() + RETRY_INTERVAL_S
        reason = str(exc) if isinstance(exc, GogEdgeError) else repr(exc)
        if reason != slot.refused:
            _log.warning("pack '%s': the new generation is refused, the older one stays in service: %s", slot.folder,
                         reason)
        slot.refusals, slot.refused = slot.refusals + 1, reason

    # --- opening and closing packs ------------------------------------------------------------

    def _open(self, slot: _PackSlot) -> Pack:
        """Open the current generation of a pack and count it as open until `_release`."""
        with self._lock:
            self._open_count += 1
        try:
            return self._open_latest(slot)
        except BaseException:
            self._release(None)
            raise

    def _open_latest(self, slot: _PackSlot) -> Pack:
        """Open a pack, again if its manifest is replaced while it is being opened."""
        for _ in range(MAX_OPEN_ATTEMPTS - 1):
            slot.manifest_identity = _identity_of_manifest(slot.folder)
            try:
                return self._open_pack(slot.folder, self._encoder)
            except PackError:
                if _identity_of_manifest(slot.folder) == slot.manifest_identity:
                    raise
        return self._open_pack(slot.folder, self._encoder)

    def _served(self) -> _Snapshot:
        if self._current is None:
            raise PackError("the packs are closed: the server is stopping")
        return self._current

    def _close_unused(self) -> None:
        """Close the packs of retired snapshots without leases, except those that another snapshot still uses."""
        with self._lock:
            unused = [snapshot for snapshot in self._retired if not snapshot.leases]
            self._retired = [snapshot for snapshot in self._retired if snapshot.leases]
            used = {id(pack) for snapshot in (*self._retired, self._current) if snapshot for pack in snapshot.packs}
        unique = {id(pack): pack for snapshot in unused for pack in snapshot.packs}
        for key, pack in unique.items():
            if key not in used:
                self._release(pack)

    def _release(self, pack: Pack | None) -> None:
        """Close a pack (None: one that failed to open) and count it as closed."""
        try:
            if pack is not None:
                pack.close()
        finally:
            with self._lock:
                self._open_count -= 1
                ended = self._current is None and not self._open_count
            if ended and self._on_closed is not None:
                self._on_closed()


def _identity_of_manifest(folder: Path) -> _FileIdentity:
    """Return inode, mtime and size of a pack's manifest, which differ after it is replaced; () if it is missing."""
    try:
        stat = (folder / MANIFEST).stat()
    except OSError:
        return ()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
