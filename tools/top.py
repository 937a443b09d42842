"""`nibble top`: what a running server is doing, from its metrics each second."""

import time
from collections import defaultdict
from typing import Annotated

import httpx
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.live import Live
from rich.table import Table

from ..errors import UserError
from .chat import DEFAULT_URL

_TTFT, _ITL = "nibble_time_to_first_token_seconds", "nibble_inter_token_latency_seconds"
Buckets = dict[float, float]  # upper bound in seconds -> how many were at most so long


class Sample:
    """One look at /metrics: sums of samples by name, and buckets of histograms."""

    def __init__(self, text: str, when: float):
        self.when = when
        self.values: dict[str, float] = defaultdict(float)
        self.buckets: dict[str, Buckets] = defaultdict(lambda: defaultdict(float))
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if "le" in sample.labels:
                    name = sample.name.removesuffix("_bucket")
                    self.buckets[name][float(sample.labels["le"])] += sample.value
                else:
                    self.values[sample.name] += sample.value


def rows(now: Sample, before: Sample | None) -> list[tuple[str, str]]:
    """What is shown. Rates and times are of what came since `before`, or of all where there was no look before."""
    values = now.values
    return [
        ("requests running", f"{values['nibble_num_requests_running']:.0f}"),
        ("requests waiting", f"{values['nibble_num_requests_waiting']:.0f}"),
        ("KV cache in use", f"{100 * values['nibble_kv_cache_usage_perc']:.1f} %"),
        ("prompt tokens/s", _rate("nibble_prompt_tokens_total", now, before)),
        ("generated tokens/s", _rate("nibble_generation_tokens_total", now, before)),
        ("time to first token, half and 95 %", _times(_TTFT, now, before)),
        ("between tokens, half and 95 %", _times(_ITL, now, before)),
        ("requests finished", f"{values['nibble_request_success_total']:.0f}"),
        ("preemptions", f"{values['nibble_num_preemptions_total']:.0f}"),
    ]


def _rate(name: str, now: Sample, before: Sample | None) -> str:
    if before is None:
        return "-"
    return f"{(now.values[name] - before.values[name]) / (now.when - before.when):.1f}"


def _times(name: str, now: Sample, before: Sample | None) -> str:
    old: Buckets = before.buckets[name] if before is not None else {}
    came = {bound: count - old.get(bound, 0) for bound, count in now.buckets[name].items()}
    half, most = (quantile(came, share) for share in (0.5, 0.95))
    return "-" if half is None or most is None else f"{1000 * half:.1f} ms, {1000 * most:.1f} ms"


def quantile(buckets: Buckets, share: float) -> float | None:
    """Of a histogram, interpolated within its bucket as Prometheus does; None where nothing came."""
    bounds = sorted(buckets)
    wanted = share * buckets[bounds[-1]] if bounds else 0
    low = below = 0.0
    for bound in bounds:
        count = buckets[bound]
        if wanted and count >= wanted:
            if bound == float("inf"):
                return low
            return low + (bound - low) * (wanted - below) / (count - below)
        low, below = bound, count
    return None


def top_command(
    url: Annotated[str, typer.Option(metavar="URL", help="A running server")] = DEFAULT_URL,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="NIBBLE_API_KEY", help="The server's key")
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", metavar="", help="Look once, print and end")
    ] = False,
) -> int:
    """Show what a running server is doing, each second, until Ctrl-C.

    Example: nibble top --url http://127.0.0.1:8000
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    url = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
    with httpx.Client(base_url=url, headers=headers, timeout=5) as client:
        now, before = _look(client), None
        if once:
            for name, value in rows(now, None):
                print(f"{name}: {value}")
            return 0
        with Live(_table(url, now, None), refresh_per_second=4) as live:
            while True:
                time.sleep(1)
                now, before = _look(client), now
                live.update(_table(url, now, before))


def _look(client: httpx.Client) -> Sample:
    try:
        response = client.get("/metrics")
    except httpx.TransportError:
        raise UserError(
            f"no server answers at {client.base_url} (start one: nibble serve MODEL)"
        ) from None
    if response.status_code != 200:
        raise UserError(f"the server answered {response.status_code}: {response.text[:200]}")
    return Sample(response.text, time.monotonic())


def _table(url: str, now: Sample, before: Sample | None) -> Table:
    table = Table(title=url, show_header=False)
    table.add_column()
    table.add_column(justify="right", min_width=20)
    for row in rows(now, before):
        table.add_row(*row)
    return table
