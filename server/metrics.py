"""Prometheus metrics: `nibble_*`, and the same figures again under vLLM's names, for its dashboards and autoscalers.

Engine gauges are read from the last EngineStats when somebody scrapes; only per-request figures are recorded as they
happen. No label ever holds a client's text.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.samples import Sample

from ..version import __version__

if TYPE_CHECKING:
    from ..engine.client import AsyncEngine

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

# Bucket bounds in seconds, as vLLM has them (the names and the bounds together make its Grafana boards work).
_TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
)
_ITL = (
    0.002,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
_E2E = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_N = (1, 2, 5, 10, 20, 50, 100)

# nibble_NAME -> the names vLLM gives (or gave: the second of two) the same figure.
VLLM_NAMES = {
    "num_requests_running": ("num_requests_running",),
    "num_requests_waiting": ("num_requests_waiting",),
    "kv_cache_usage_perc": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
    "num_preemptions": ("num_preemptions",),
    "prefix_cache_queries": ("prefix_cache_queries",),
    "prefix_cache_hits": ("prefix_cache_hits",),
    "prompt_tokens": ("prompt_tokens",),
    "prompt_tokens_cached": ("prompt_tokens_cached",),
    "generation_tokens": ("generation_tokens",),
    "request_success": ("request_success",),
    "admission_rejections": ("admission_rejections",),
    "time_to_first_token_seconds": ("time_to_first_token_seconds",),
    "inter_token_latency_seconds": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    "e2e_request_latency_seconds": ("e2e_request_latency_seconds",),
    "request_prompt_tokens": ("request_prompt_tokens",),
    "request_generation_tokens": ("request_generation_tokens",),
    "request_params_n": ("request_params_n",),
    "request_params_max_tokens": ("request_params_max_tokens",),
    "cache_config": ("cache_config",),
}

prometheus_client.disable_created_metrics()


class Metrics:
    """The process's figures, and from `watch` on the engine's; every sample is labelled with the model's name."""

    def __init__(self, model_name: str):
        self.registry = CollectorRegistry(auto_describe=False)
        self.model_name = model_name
        self._engine = _EngineCollector(model_name)
        self.registry.register(self._engine)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished requests")
        self.prompt_tokens_cached = self._counter(
            "prompt_tokens_cached", "Prompt tokens found in the prefix cache"
        )
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated")
        self.disconnects = self._counter(
            "http_requests_client_disconnected", "Clients that left before their answer"
        )
        self.success = Counter(
            "nibble_request_success",
            "Finished sequences",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.rejections = Counter(
            "nibble_admission_rejections",
            "Requests refused with a 503",
            ["model_name", "reason"],
            registry=self.registry,
        )
        self.key_requests = Counter(
            "nibble_api_key_requests",
            "Generation requests admitted, by the name of the API key",
            ["model_name", "api_key"],
            registry=self.registry,
        )
        self.ttft = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token", _TTFT
        )
        self.itl = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of one sequence", _ITL
        )
        self.e2e = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token", _E2E
        )
        self.request_prompt = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a sequence", _TOKENS
        )
        self.request_generation = self._histogram(
            "request_generation_tokens", "Tokens of a sequence", _TOKENS
        )
        self.params_n = self._histogram("request_params_n", "n, as asked", _N)
        self.params_max_tokens = self._histogram(
            "request_params_max_tokens", "max_tokens, as asked", _TOKENS
        )

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"nibble_{name}", text, ["model_name"], registry=self.registry).labels(
            self.model_name
        )

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(
            f"nibble_{name}", text, ["model_name"], registry=self.registry, buckets=tuple(buckets)
        ).labels(self.model_name)

    def finished(self, reason: str, prompt: int, generated: int, seconds: float) -> None:
        """Record the end of one sequence."""
        self.success.labels(self.model_name, reason).inc()
        self.request_prompt.observe(prompt)
        self.request_generation.observe(generated)
        self.e2e.observe(seconds)

    def rejected(self, reason: str) -> None:
        self.rejections.labels(self.model_name, reason).inc()

    def borne(self, key_name: str) -> None:
        """Record one generation request of whoever bears that key."""
        self.key_requests.labels(self.model_name, key_name).inc()

    def watch(self, engine: "AsyncEngine") -> None:
        """From now on, show this engine's state too."""
        self._engine.engine = engine

    def exposition(self) -> bytes:
        """The Prometheus text format, aliases included."""
        return generate_latest(_WithAliases(self.registry))


class _EngineCollector:
    """Reads the engine's state at scrape time."""

    def __init__(self, model_name: str):
        self.model_name = model_name
        self.engine: AsyncEngine | None = None

    def collect(self) -> Iterator[Metric]:
        yield self._info("nibble_build", "Version and configuration", self._build_info())
        if self.engine is None:
            return
        stats, ready = self.engine.stats, self.engine.ready
        used = 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0
        yield self._gauge("num_requests_running", "Sequences in the batch", stats.num_running)
        yield self._gauge(
            "num_requests_waiting", "Sequences waiting for a place", stats.num_waiting
        )
        yield self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", used)
        yield self._gauge("kv_blocks", "KV blocks", stats.num_blocks)
        yield self._gauge("kv_blocks_free", "KV blocks no sequence holds", stats.num_free_blocks)
        yield self._gauge("step_tokens", "Tokens in the last step", stats.step_tokens)
        yield self._gauge("model_load_seconds", "Start of the engine to ready", ready.load_seconds)
        yield self._counter(
            "num_preemptions", "Sequences set back for want of blocks", stats.num_preemptions
        )
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up", stats.prefix_queries)
        yield self._counter("prefix_cache_hits", "Prompt tokens found", stats.prefix_hits)
        memory = GaugeMetricFamily(
            "nibble_memory_bytes", "Planned memory", labels=["model_name", "part"]
        )
        for part, size in ready.ledger.items():
            memory.add_metric([self.model_name, part], size)
        yield memory
        yield self._info(
            "nibble_cache_config",
            "The KV cache",
            {
                "block_size": str(ready.block_size),
                "num_gpu_blocks": str(ready.num_blocks),
                "model_name": self.model_name,
            },
        )

    def _build_info(self) -> dict[str, str]:
        info = {"version": __version__, "model_name": self.model_name}
        if self.engine is not None:
            ready = self.engine.ready
            info |= {
                "quantization": ready.quantization,
                "dtype": ready.dtype,
                "device": ready.device,
                "kernels": ",".join(sorted(ready.kernels)),
            }
        return info

    def _info(self, name: str, text: str, values: dict[str, str]) -> Metric:
        family = InfoMetricFamily(name, text)
        family.add_metric([], values)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"nibble_{name}", text, labels=["model_name"])
        family.add_metric([self.model_name], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"nibble_{name}", text, labels=["model_name"])
        family.add_metric([self.model_name], value)
        return family


class _WithAliases:
    """A registry's families, each followed by copies under vLLM's names."""

    def __init__(self, registry: CollectorRegistry):
        self.registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self.registry.collect():
            yield family
            for alias in VLLM_NAMES.get(family.name.removeprefix("nibble_"), ()):
                yield _renamed(family, f"vllm:{alias}")


def _renamed(family: Metric, name: str) -> Metric:
    copy = Metric(name, family.documentation, family.type)
    copy.samples = [Sample(name + s.name.removeprefix(family.name), *s[1:]) for s in family.samples]
    return copy
