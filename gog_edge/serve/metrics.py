"""A few figures in Prometheus' text format."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate

from gog_edge.types import PackState

OUTCOMES = ("answered", "refused", "busy", "stopped", "failed")
BUCKETS = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, float("inf"))  # seconds, upper edges


class Metrics:
    """Counts questions by outcome and how long the answered ones took; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outcomes: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self._buckets = [0] * len(BUCKETS)
        self._seconds = 0.0

    def count(self, outcome: str, seconds: float) -> None:
        """Note one question that ended as `outcome`, one of `OUTCOMES`, after `seconds`."""
        with self._lock:
            self._outcomes[outcome] += 1
            if outcome == "answered":
                self._seconds += seconds
                self._buckets[next(i for i, edge in enumerate(BUCKETS) if seconds <= edge)] += 1

    def render(self, *, running: int, packs: Sequence[PackState] = ()) -> str:
        """The exposition text; `running` is the number of questions that work or wait now, `packs` what is served."""
        with self._lock:
            outcomes, buckets, seconds = dict(self._outcomes), list(accumulate(self._buckets)), self._seconds
        name = "gog_edge_question_seconds"
        edges = ("+Inf" if edge == float("inf") else str(edge) for edge in BUCKETS)
        return "\n".join([
            "# HELP gog_edge_questions_total Questions by how they ended.",
            "# TYPE gog_edge_questions_total counter",
            *(f'gog_edge_questions_total{{outcome="{key}"}} {value}' for key, value in outcomes.items()),
            f"# HELP {name} Seconds from a question to its answer.",
            f"# TYPE {name} histogram",
            *(f'{name}_bucket{{le="{edge}"}} {value}' for edge, value in zip(edges, buckets, strict=True)),
            f"{name}_sum {seconds:.6f}",
            f"{name}_count {buckets[-1]}",
            "# HELP gog_edge_questions_running Questions that are worked on or waiting.",
            "# TYPE gog_edge_questions_running gauge",
            f"gog_edge_questions_running {running}",
            *_of_packs(packs),
            "",
        ])


def _of_packs(packs: Sequence[PackState]) -> Iterator[str]:
    for name, kind, about in (
        ("generation", "gauge", "Generation of a pack that is served."),
        ("switches_total", "counter", "New generations of a pack that came to be served."),
        ("refusals_total", "counter", "Times that a new generation of a pack could not be served."),
    ):
        yield f"# HELP gog_edge_pack_{name} {about}"
        yield f"# TYPE gog_edge_pack_{name} {kind}"
        for pack in packs:
            yield f'gog_edge_pack_{name}{{pack="{pack.name}"}} {getattr(pack, name.removesuffix("_total"))}'
