"""Prometheus metrics, under the names that vLLM gave them where it has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from gemma3_export.api.engine import Engine
from gemma3_export.runtimes.generation.request import Completion

__all__ = ["CONTENT_TYPE", "ServerMetrics", "metrics_text"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class ServerMetrics:
    """The metrics of one process that serves.

    Args:
        engine: its totals are read when the metrics are.
        labels: names and values of the labels of every metric.
    """

    def __init__(self, engine: Engine, labels: Mapping[str, str]) -> None:
        self._labels = dict(labels)
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine, self._labels))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            found = Histogram(name, text, [*labels], buckets=buckets, registry=self._registry)
            return found.labels(**labels)

        self._first_token_s = histogram(
            "vllm:time_to_first_token_seconds", "From submission to the first token.", SECONDS
        )
        self._per_token_s = histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time per token after the first.",
            SECONDS,
        )
        self._latency_s = histogram(
            "vllm:e2e_request_latency_seconds", "From request to end of answer.", SECONDS
        )
        self._prompt_tokens = histogram(
            "vllm:request_prompt_tokens", "Prompt tokens per choice.", TOKENS
        )
        self._new_tokens = histogram(
            "vllm:request_generation_tokens", "Generated tokens per choice.", TOKENS
        )
        self._responses = Counter(
            "http_requests",
            "Answered requests by path and status.",
            [*labels, "path", "status"],
            registry=self._registry,
        )

    def count_response(self, path: str, status: int) -> None:
        """Count a response; ``path`` is a route, of which there are few."""
        self._responses.labels(**self._labels, path=path, status=str(status)).inc()

    def observe(self, completions: Sequence[Completion], latency_s: float) -> None:
        """Add the finished choices of a request."""
        self._latency_s.observe(latency_s)
        for each in completions:
            self._prompt_tokens.observe(each.prompt_tokens)
            self._new_tokens.observe(len(each.tokens))
            if each.time_to_first_token_s is not None:
                self._first_token_s.observe(each.time_to_first_token_s)
            if len(each.tokens) > 1:
                self._per_token_s.observe(each.decode_s / (len(each.tokens) - 1))

    def families(self) -> list[Metric]:
        """Return the metrics of this process."""
        return list(self._registry.collect())

    async def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return metrics_text(self.families())


def metrics_text(families: Iterable[Metric]) -> bytes:
    """Return metrics in Prometheus' text format; those of one name become one family."""
    merged: dict[str, Metric] = {}
    for each in families:
        if each.name in merged:
            merged[each.name].samples.extend(each.samples)
        else:
            merged[each.name] = each
    registry = CollectorRegistry()
    registry.register(_Families(merged.values()))
    return generate_latest(registry)


class _Families(Collector):
    """Metrics that have been collected already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """Return the metrics."""
        return self._families


class _EngineCollector(Collector):
    """Reads the engine's own counts when metrics are collected."""

    def __init__(self, engine: Engine, labels: Mapping[str, str]) -> None:
        self._engine, self._labels = engine, labels

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics of the engine."""
        stats = self._engine.stats()
        names, values = [*self._labels], [*self._labels.values()]
        gauges = {
            "vllm:num_requests_running": ("Requests that have a slot.", stats.running),
            "vllm:num_requests_waiting": ("Requests that wait for a slot.", stats.waiting),
            "vllm:kv_cache_usage_perc": (
                "Share of the cache that running requests fill, from 0 to 1.",
                stats.cached_tokens / stats.max_tokens,
            ),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=names)
            gauge.add_metric(values, value)
            yield gauge
        totals = {
            "vllm:prompt_tokens": ("Prompt tokens of finished requests.", stats.prompt_tokens),
            "vllm:generation_tokens": ("Generated tokens.", stats.new_tokens),
            "vllm:prefix_cache_hits": (
                "Prompt tokens that were copied from earlier prompts.",
                stats.reused_tokens,
            ),
        }
        for name, (text, value) in totals.items():
            counter = CounterMetricFamily(name, text, labels=names)
            counter.add_metric(values, value)
            yield counter
        finished = CounterMetricFamily(
            "vllm:request_success", "Finished requests.", labels=[*names, "finished_reason"]
        )
        for reason, count in stats.finished.items():
            finished.add_metric([*values, reason], count)
        yield finished
