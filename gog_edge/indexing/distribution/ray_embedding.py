"""Embeds the shards of an unfinished build on many machines with Ray Data.

Every worker sees the folders of the pack and of the encoder under the same path (NFS, Lustre, or one machine). It reads
images from the finished store, which does not change any more, and writes shards atomically. Whatever is killed,
existing shards are complete, and `build_pack` continues as if it had embedded them itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gog_edge.errors import BackendError, PackError
from gog_edge.indexing import OnProgress
from gog_edge.indexing.commit import current_manifest, unfinished_build, write_lock
from gog_edge.indexing.generation import GenerationBuilder, PackOptions
from gog_edge.indexing.vectors.embedding import Encoders, ShardPlan, embed_shard
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import Snapshot
from gog_edge.retrieval.text.encoder import TextEncoder
from gog_edge.retrieval.text.segment import SegmentReader

LOCAL = "local"  # no cluster: worker processes on this machine


@dataclass(frozen=True, slots=True)
class RayWorkers:
    """The workers to start."""

    count: int = 2
    cores: int = 1  # per worker
    address: str = LOCAL  # of a Ray cluster, or "auto" for the one that this machine belongs to


class ShardEmbedder:
    """A worker: opens the encoders and the store once, and embeds one shard per call."""

    def __init__(self, folder: str, store: str, encoder: str, text_encoder: str | None, fingerprints: dict[str, Any],
                 cores: int) -> None:
        """Open the files.

        Raises:
            PackError: this machine has another encoder under the same path.
        """
        self._folder = Path(folder)
        self._encoders = _open_encoders(Path(encoder), None if text_encoder is None else Path(text_encoder), cores)
        if self._encoders.to_json() != fingerprints:
            raise PackError(f"the encoder '{encoder}' or '{text_encoder}' on this machine differs from the one of the "
                            "build; copy it again")
        self._reader = SegmentReader.open(self._folder / store)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Embed a shard. Errors are returned with the shard, so that the other shards are embedded."""
        plan = ShardPlan(**row)
        try:
            embed_shard(self._folder, plan, self._reader, self._encoders)
        except Exception as exc:  # of any kind: it is reported with the name of the shard
            return {**row, "error": f"{type(exc).__name__}: {exc}"}
        return {**row, "error": ""}


def embed_with_ray(folder: Path, encoder: Path, workers: RayWorkers, on_progress: OnProgress | None = None, *,
                   text_encoder: Path | None = None) -> int:
    """Embed the missing shards of an unfinished build, and return their number.

    Args:
        folder: the pack, after `read_snapshot`; visible to every worker.
        encoder: folder of the encoder that the build was started with; visible to every worker.
        workers: the workers to start.
        on_progress: called with (kind of shard, rows done, rows in total).
        text_encoder: folder of the text encoder, if the build has one; visible to every worker.

    Raises:
        PackError: there is no unfinished build, its snapshot is not read completely, it was started with another
            encoder, another process writes the pack, or shards failed. Failed shards are listed; the others are done.
        BackendError: Ray is not installed, or the cluster is not reachable.
    """
    with write_lock(folder):
        encoders = _open_encoders(encoder, text_encoder, threads=1)
        generation = resume_build(folder, encoders.image, encoders.text)
        try:
            plans, store = generation.shard_plans(), generation.store
            fingerprints = generation.encoders.to_json()
        finally:
            generation.close()
        missing = [plan for plan in plans if not (folder / plan.vectors).is_file()]
        progress = _ShardProgress(plans, on_progress)
        progress.add(set(plans) - set(missing))
        if not missing:
            return 0
        text = None if text_encoder is None else str(text_encoder.resolve())
        arguments = (str(folder.resolve()), store, str(encoder.resolve()), text, fingerprints, workers.cores)
        failed = []
        for plan, error in _run(missing, arguments, workers):
            if error:
                failed.append(f"'{plan.vectors}' ({error})")
            else:
                progress.add([plan])
    if failed:
        raise PackError(f"{len(failed)} of {len(missing)} shards were not embedded: {', '.join(failed[:5])}; the "
                        "others are done: run the same command again")
    return len(missing)


def _open_encoders(encoder: Path, text_encoder: Path | None, threads: int) -> Encoders:
    return Encoders(Encoder.open(encoder, threads=threads),
                    None if text_encoder is None else TextEncoder.open(text_encoder, threads=threads))


def resume_build(folder: Path, encoder: Encoder | None, text_encoder: TextEncoder | None = None) -> GenerationBuilder:
    """Return the generation of a build that was stopped after reading. Raises PackError like `embed_with_ray`."""
    current = current_manifest(folder)
    settings = unfinished_build(folder, current)
    if settings is None:
        raise PackError(f"'{folder}' does not contain an unfinished build; run `gog-edge pack build SOURCE {folder} "
                        "--stop-after reading` first")
    generation = GenerationBuilder(folder, name=settings["name"], snapshot=Snapshot(**settings["snapshot"]),
                                   encoder=encoder, options=PackOptions(**settings["options"]), parent=current,
                                   text_encoder=text_encoder)
    if not generation.store_done:
        generation.close()
        raise PackError(f"'{folder}': the snapshot is not read completely; run the same `gog-edge pack build` command "
                        "first")
    return generation


class _ShardProgress:
    """The progress of each kind of shard, in rows."""

    def __init__(self, plans: Sequence[ShardPlan], on_progress: OnProgress | None) -> None:
        self._report = on_progress
        self._done = {plan.kind: 0 for plan in plans}
        self._total = {kind: sum(_rows(plan) for plan in plans if plan.kind == kind) for kind in self._done}

    def add(self, plans: Iterable[ShardPlan]) -> None:
        """Count shards as done."""
        for plan in plans:
            self._done[plan.kind] += _rows(plan)
            if self._report is not None:
                self._report(plan.kind, self._done[plan.kind], self._total[plan.kind])


def _rows(plan: ShardPlan) -> int:
    return plan.last - plan.first + 1


def _run(plans: Sequence[ShardPlan], arguments: tuple[Any, ...],
         workers: RayWorkers) -> Iterator[tuple[ShardPlan, str]]:
    """Yield the shards in the order of their completion, each with its error or an empty string."""
    with _connect(workers) as ray:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # ours counts images
        rows = ray.data.from_items([asdict(plan) for plan in plans], override_num_blocks=len(plans))
        done = rows.map(ShardEmbedder, fn_constructor_args=arguments, num_cpus=workers.cores,
                        compute=ray.data.ActorPoolStrategy(size=min(workers.count, len(plans))))
        try:
            for row in done.iter_rows():
                error = row.pop("error")
                yield ShardPlan(**row), error
        except ray.exceptions.RayError as exc:
            raise BackendError(f"Ray failed ({exc}); completed shards remain: run the same command again") from exc


@contextmanager
def _connect(workers: RayWorkers) -> Iterator[Any]:
    """Connect to Ray without logs and usage reports, and shut it down afterwards."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read on import and on start
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as exc:
        raise BackendError("embedding on many machines needs Ray; pip install 'gog_edge[ray]'") from exc
    settings: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if workers.address == LOCAL:
        settings |= {"num_cpus": workers.count * workers.cores, "include_dashboard": False}
    try:
        ray.init(address=workers.address, **settings)
    except (ConnectionError, RuntimeError, ValueError) as exc:
        raise BackendError(f"the Ray cluster at '{workers.address}' is not reachable ({exc}); start it, or leave out "
                           "--address") from exc
    try:
        yield ray
    finally:
        ray.shutdown()
