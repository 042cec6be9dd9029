"""Metrics of the server for Prometheus, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gog_edge.types import PackState

OUTCOMES = ("answered", "refused", "busy", "stopped", "failed")
BUCKETS = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # seconds, upper edges
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Questions by outcome and the duration of the answered ones; thread-safe."""

    def __init__(self, running: Callable[[], int], packs: Callable[[], Sequence[PackState]]) -> None:
        """Register the metrics; `running` and `packs` are called when they are scraped."""
        self.registry = CollectorRegistry()
        self.questions = Counter("gog_edge_questions", "Questions by outcome.", ["outcome"], registry=self.registry)
        for outcome in OUTCOMES:
            self.questions.labels(outcome)
        self.seconds = Histogram("gog_edge_question_seconds", "Seconds from a question to its answer.",
                                 buckets=BUCKETS, registry=self.registry)
        self.registry.register(_State(running, packs))

    def render(self) -> bytes:
        """Return all metrics in the Prometheus text format 0.0.4."""
        return generate_latest(_WithoutCreated(self.registry))


class _WithoutCreated(Collector):
    """The metrics of a registry without their `_created` series, which belong to OpenMetrics and not to this format.

    `prometheus_client.disable_created_metrics` would change the metrics of the whole process.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """Yield each metric without the samples named `_created`."""
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class _State(Collector):
    def __init__(self, running: Callable[[], int], packs: Callable[[], Sequence[PackState]]) -> None:
        self._running, self._packs = running, packs

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics that are read when scraped."""
        yield GaugeMetricFamily("gog_edge_questions_running", "Questions that are being answered or waiting.",
                                value=self._running())
        generation = GaugeMetricFamily("gog_edge_pack_generation", "Generation of a pack that is served.",
                                       labels=["pack"])
        switches = CounterMetricFamily("gog_edge_pack_switches", "Switches of a pack to a new generation.",
                                       labels=["pack"])
        refusals = CounterMetricFamily("gog_edge_pack_refusals", "New generations of a pack that were refused.",
                                       labels=["pack"])
        for pack in self._packs():
            generation.add_metric([pack.name], pack.generation)
            switches.add_metric([pack.name], pack.switches)
            refusals.add_metric([pack.name], pack.refusals)
        yield from (generation, switches, refusals)
