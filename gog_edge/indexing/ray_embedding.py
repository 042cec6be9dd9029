"""Embeds what was read of a snapshot on many machines: Ray Data maps over the shards that are not done yet.

Every worker sees the pack's folder and the encoder's under the same path (NFS, Lustre, or one machine): it reads
pictures from the finished store, which nobody writes any more, and its shards appear whole or not at all. So whatever
is killed, what lies there is done, and `build_pack` goes on from there just as if it had embedded alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gog_edge.errors import BackendError, PackError
from gog_edge.indexing.commit import current, unfinished, writing
from gog_edge.indexing.embedding import OnShard, ShardPlan, embed_shard
from gog_edge.indexing.generation import NextGeneration, PackOptions
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import Snapshot
from gog_edge.retrieval.text.segment import SegmentReader

LOCAL = "local"  # no cluster: worker processes of this machine


@dataclass(frozen=True, slots=True)
class Workers:
    """How the work is spread."""

    count: int = 2
    cores: int = 1  # of each
    address: str = LOCAL  # of a Ray cluster, or "auto" for the one that this machine belongs to


class ShardEmbedder:
    """One worker: holds the encoder and the store, embeds one shard at a time."""

    def __init__(self, folder: str, store: str, encoder: str, fingerprint: dict[str, Any], cores: int) -> None:
        """PackError where this machine sees another encoder than the one that the work was given out with."""
        self._folder = Path(folder)
        self._encoder = Encoder.open(Path(encoder), threads=cores)
        if asdict(self._encoder.fingerprint) != fingerprint:
            raise PackError(f"'{encoder}' is another encoder here than where the work was given out; copy it again")
        self._reader = SegmentReader.open(self._folder / store)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Embed a shard; what goes wrong with it is told, so that the others go on."""
        plan = ShardPlan(**row)
        try:
            embed_shard(self._folder, plan, self._reader, self._encoder)
        except Exception as exc:  # whatever it is, it is told with the shard's name
            return {**row, "error": f"{type(exc).__name__}: {exc}"}
        return {**row, "error": ""}


def embed_with_ray(folder: Path, encoder: Path, workers: Workers, on_shard: OnShard | None = None) -> int:
    """Embed every shard of an unfinished build that is not done yet. Returns how many shards were embedded.

    Args:
        folder: of the pack that `build_pack` has read a snapshot into, seen by every worker.
        encoder: folder of the encoder that the build was begun with, seen by every worker.
        workers: how the work is spread.
        on_shard: is told (kind, rows done, rows in all), as `build_pack` tells it.

    Raises:
        PackError: nothing unfinished is here, its texts are not read yet, it was begun with another encoder, it is
            being written, or shards failed: they are named, the others are done.
        BackendError: Ray is not installed or its cluster cannot be reached.
    """
    with writing(folder):
        generation = resume(folder, Encoder.open(encoder, threads=1))
        try:
            plans, store = generation.plans(), generation.store
            fingerprint = asdict(generation.encoder.fingerprint) if generation.encoder else {}
        finally:
            generation.close()
        open_plans = [plan for plan in plans if not (folder / plan.vectors).is_file()]
        progress = _Progress(plans, on_shard)
        progress.done(set(plans) - set(open_plans))
        if not open_plans:
            return 0
        held = (str(folder.resolve()), store, str(encoder.resolve()), fingerprint, workers.cores)
        failed = []
        for plan, error in _embedded(open_plans, held, workers):
            if error:
                failed.append(f"'{plan.vectors}' ({error})")
            else:
                progress.done([plan])
    if failed:
        raise PackError(f"{len(failed)} of {len(open_plans)} shards were not embedded: {', '.join(failed[:5])}; the "
                        "others are done: run the same command again")
    return len(open_plans)


def resume(folder: Path, encoder: Encoder) -> NextGeneration:
    """The generation that a build stopped in after reading. Raises PackError as `embed_with_ray` does."""
    begun = unfinished(folder)
    if begun is None:
        raise PackError(f"'{folder}' holds no unfinished build; run `python -m index.build_pack SOURCE {folder} "
                        "--stop-after reading` first")
    generation = NextGeneration(folder, name=begun["name"], snapshot=Snapshot(**begun["snapshot"]), encoder=encoder,
                                options=PackOptions(**begun["options"]), parent=current(folder))
    if not generation.store_done:
        generation.close()
        raise PackError(f"'{folder}': its snapshot is not read to the end yet; run the same `build_pack` command first")
    return generation


class _Progress:
    def __init__(self, plans: Sequence[ShardPlan], on_shard: OnShard | None) -> None:
        self._tell = on_shard
        self._done = {plan.kind: 0 for plan in plans}
        self._total = {kind: sum(_rows(plan) for plan in plans if plan.kind == kind) for kind in self._done}

    def done(self, plans: Sequence[ShardPlan] | set[ShardPlan]) -> None:
        """Tell of shards that are done."""
        for plan in plans:
            self._done[plan.kind] += _rows(plan)
            if self._tell is not None:
                self._tell(plan.kind, self._done[plan.kind], self._total[plan.kind])


def _rows(plan: ShardPlan) -> int:
    return plan.last - plan.first + 1


def _embedded(plans: Sequence[ShardPlan], held: tuple[Any, ...], workers: Workers) -> Iterator[tuple[ShardPlan, str]]:
    """Shards as they become done, each with what went wrong or nothing."""
    with _ray(workers) as ray:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # ours counts pictures
        rows = ray.data.from_items([asdict(plan) for plan in plans], override_num_blocks=len(plans))
        done = rows.map(ShardEmbedder, fn_constructor_args=held, num_cpus=workers.cores,
                        compute=ray.data.ActorPoolStrategy(size=min(workers.count, len(plans))))
        try:
            for row in done.iter_rows():
                error = row.pop("error")
                yield ShardPlan(**row), error
        except ray.exceptions.RayError as exc:
            raise BackendError(f"Ray gave up ({exc}); shards that are done stay: run the same command again") from exc


@contextmanager
def _ray(workers: Workers) -> Iterator[Any]:
    """Ray, connected and quiet; nothing of it is left behind."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read where Ray is imported and where it is started
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
        raise BackendError(f"there is no Ray cluster at '{workers.address}' ({exc}); start one, or leave out "
                           "--address") from exc
    try:
        yield ray
    finally:
        ray.shutdown()
