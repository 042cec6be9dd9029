"""A few figures in Prometheus' text format."""

from __future__ import annotations

import threading
from collections import Counter
from itertools import accumulate

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

    def render(self, *, running: int) -> str:
        """The exposition text; `running` is the number of questions that work or wait now."""
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
            "",
        ])
