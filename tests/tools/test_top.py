"""`nibble top`: figures worked out by hand, and a real server looked at once."""

import subprocess
import sys

import pytest

from nibble.cli import main
from nibble.tools.top import Sample, quantile, rows

from ..server.conftest import KEY, ServerProcess, server, start_server  # noqa: F401

TEXT = """\
# TYPE nibble_num_requests_running gauge
nibble_num_requests_running{{model_name="m"}} 2.0
# TYPE nibble_kv_cache_usage_perc gauge
nibble_kv_cache_usage_perc{{model_name="m"}} 0.25
# TYPE nibble_generation_tokens counter
nibble_generation_tokens_total{{model_name="m"}} {tokens}
# TYPE nibble_request_success counter
nibble_request_success_total{{finished_reason="stop",model_name="m"}} 3.0
nibble_request_success_total{{finished_reason="length",model_name="m"}} 4.0
# TYPE nibble_time_to_first_token_seconds histogram
nibble_time_to_first_token_seconds_bucket{{le="0.1",model_name="m"}} {early}
nibble_time_to_first_token_seconds_bucket{{le="0.2",model_name="m"}} {late}
nibble_time_to_first_token_seconds_bucket{{le="+Inf",model_name="m"}} {late}
nibble_time_to_first_token_seconds_count{{model_name="m"}} {late}
nibble_time_to_first_token_seconds_sum{{model_name="m"}} 1.0
"""


def test_rates_and_times_are_of_what_came_between_two_looks() -> None:
    before = Sample(TEXT.format(tokens=100, early=10, late=10), 5.0)
    now = Sample(TEXT.format(tokens=160, early=11, late=14), 7.0)
    shown = dict(rows(now, before))
    assert shown["generated tokens/s"] == "30.0"
    assert shown["requests running"] == "2" and shown["requests finished"] == "7"
    assert shown["KV cache in use"] == "25.0 %"
    # one of four within 0.1 s, three within 0.2: the second lies a third of the way
    assert shown["time to first token, half and 95 %"] == "133.3 ms, 193.3 ms"
    assert shown["between tokens, half and 95 %"] == "-"
    assert dict(rows(now, None))["generated tokens/s"] == "-"


@pytest.mark.parametrize(
    ("buckets", "share", "expected"),
    [
        ({}, 0.5, None),
        ({0.1: 0, float("inf"): 0}, 0.5, None),
        ({0.1: 4, float("inf"): 4}, 0.5, 0.05),
        ({0.1: 1, float("inf"): 4}, 0.95, 0.1),  # nobody knows how far beyond
    ],
)
def test_quantiles_of_histograms(buckets: dict, share: float, expected: float | None) -> None:
    assert quantile(buckets, share) == expected


def test_a_real_server_looked_at_once(server: ServerProcess) -> None:  # noqa: F811
    command = [sys.executable, "-m", "nibble", "top", "--url", server.url, "--once"]
    done = subprocess.run([*command, "--api-key", KEY], capture_output=True, text=True, check=True)
    assert "requests running: 0" in done.stdout and "KV cache in use: 0.0 %" in done.stdout
    refused = subprocess.run([*command, "--api-key", "x"], capture_output=True, text=True)
    assert refused.returncode == 2 and "401" in refused.stderr


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--url", "127.0.0.1:9", "--once"]) == 2
    assert "nibble serve" in capsys.readouterr().err
