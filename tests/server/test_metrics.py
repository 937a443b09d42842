"""The exposition, number by number: what a scrape says of an engine whose state is known."""

from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nibble.engine.messages import EngineStats, Ready
from nibble.server.metrics import VLLM_NAMES, Metrics

STATS = EngineStats(
    num_running=3,
    num_waiting=5,
    num_blocks=40,
    num_free_blocks=10,
    num_preemptions=7,
    prefix_queries=1000,
    prefix_hits=250,
    step_tokens=11,
)
READY = Ready(
    max_model_len=128,
    vocab_size=264,
    eos_token_ids=[1],
    num_blocks=40,
    block_size=16,
    dtype="bfloat16",
    device="cpu",
    quantization="awq int4 g64",
    kernels={"b": 2, "a": 1},
    ledger={"weights": 1234, "kv_cache": 5678},
    load_seconds=1.5,
)


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics("tiny")
    metrics.watch(SimpleNamespace(stats=STATS, ready=READY))
    return metrics


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, labels but the model's) -> value."""
    found = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "model_name"))
            assert (sample.name, labels) not in found
            found[sample.name, labels] = sample.value
    return found


def test_gauges_and_totals_are_the_engines(metrics: Metrics) -> None:
    seen = samples(metrics)
    assert {
        name: seen[f"nibble_{name}", ()]
        for name in (
            "num_requests_running",
            "num_requests_waiting",
            "kv_cache_usage_perc",
            "kv_blocks",
            "kv_blocks_free",
            "step_tokens",
            "model_load_seconds",
            "num_preemptions_total",
            "prefix_cache_queries_total",
            "prefix_cache_hits_total",
        )
    } == {
        "num_requests_running": 3,
        "num_requests_waiting": 5,
        "kv_cache_usage_perc": 0.75,
        "kv_blocks": 40,
        "kv_blocks_free": 10,
        "step_tokens": 11,
        "model_load_seconds": 1.5,
        "num_preemptions_total": 7,
        "prefix_cache_queries_total": 1000,
        "prefix_cache_hits_total": 250,
    }
    assert seen["nibble_memory_bytes", (("part", "weights"),)] == 1234
    assert seen["nibble_memory_bytes", (("part", "kv_cache"),)] == 5678


def test_a_finished_sequence_is_counted_where_it_belongs(metrics: Metrics) -> None:
    metrics.finished("stop", prompt=30, generated=6, seconds=2.2)
    metrics.finished("length", prompt=10, generated=4, seconds=0.2)
    metrics.rejected("queue_full")
    seen = samples(metrics)
    assert seen["nibble_request_success_total", (("finished_reason", "stop"),)] == 1
    assert seen["nibble_request_prompt_tokens_sum", ()] == 40
    assert seen["nibble_request_prompt_tokens_count", ()] == 2
    assert seen["nibble_request_prompt_tokens_bucket", (("le", "10.0"),)] == 1
    assert seen["nibble_request_prompt_tokens_bucket", (("le", "20.0"),)] == 1
    assert seen["nibble_request_prompt_tokens_bucket", (("le", "50.0"),)] == 2
    assert seen["nibble_request_generation_tokens_sum", ()] == 10
    assert seen["nibble_e2e_request_latency_seconds_sum", ()] == pytest.approx(2.4)
    assert seen["nibble_admission_rejections_total", (("reason", "queue_full"),)] == 1


def test_vllms_names_say_the_same(metrics: Metrics) -> None:
    metrics.finished("stop", prompt=30, generated=6, seconds=2.2)
    metrics.ttft.observe(0.3)
    metrics.itl.observe(0.03)
    seen = samples(metrics)
    checked = 0
    for name, aliases in VLLM_NAMES.items():
        ours = {k: v for k, v in seen.items() if k[0].startswith(f"nibble_{name}")}
        for alias in aliases:
            for (full, labels), value in ours.items():
                if (theirs := full.replace(f"nibble_{name}", f"vllm:{alias}", 1), labels) in seen:
                    assert seen[theirs, labels] == value
                    checked += 1
    assert checked > 100  # buckets included
    assert seen["vllm:gpu_cache_usage_perc", ()] == 0.75
    assert seen["vllm:time_per_output_token_seconds_sum", ()] == pytest.approx(0.03)


def test_before_the_engine_is_up_there_is_only_what_is_known() -> None:
    metrics = Metrics("tiny")
    seen = {name for name, _ in samples(metrics)}
    assert "nibble_build_info" in seen and "nibble_num_requests_running" not in seen
