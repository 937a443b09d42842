"""`nibble serve`: its options, and what becomes of them: an EngineConfig and ServeOptions.

Importing this, as help does, imports no part of the server.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..cli import parse_bytes

if TYPE_CHECKING:
    from ..server.keys import ApiKey

# Panels of `nibble serve --help`
_HTTP, _BATCH, _CPU = "HTTP", "Context and batches", "On a CPU"


def serve_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Local folder, .gguf file or Hub id")
    ],
    revision: Annotated[
        str | None, typer.Option(help="The Hub revision of MODEL", show_default="newest")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    quantize: Annotated[
        str | None,
        typer.Option(
            help="Quantize a 16-bit model while it loads: int4, int8 or fp8", show_default="no"
        ),
    ] = None,
    save_quantized: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Keep what --quantize made, to serve it at once the next time",
            show_default="not kept",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on", rich_help_panel=_HTTP)
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Port to listen on; 0: any free one",
            min=0,
            max=65535,
            rich_help_panel=_HTTP,
        ),
    ] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="The name clients use; repeatable",
            show_default="the last part of MODEL",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="A key that clients must bear; repeatable. Others on this machine can read it "
            "here: rather use a file",
            show_default="NIBBLE_API_KEY, else none",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    api_key_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Keys that clients must bear, a line for each: name:key",
            show_default="none",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    max_queued_requests: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Sequences admitted beyond --max-num-seqs; more get a 503",
            min=0,
            rich_help_panel=_HTTP,
        ),
    ] = 1024,
    scheduling_policy: Annotated[
        Literal["fcfs", "priority"],
        typer.Option(
            metavar="NAME",
            help="fcfs: first come, first served; priority: by each request's `priority`, the least first",
            rich_help_panel=_HTTP,
        ),
    ] = "fcfs",
    no_ui: Annotated[
        bool,
        typer.Option("--no-ui", metavar="", help="No page at / and /ui", rich_help_panel=_HTTP),
    ] = False,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Where web pages may ask from, as https://example.org, or *; repeatable",
            show_default="this server's own page alone",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    parse_special_tokens: Annotated[
        bool,
        typer.Option(
            "--parse-special-tokens",
            metavar="",
            help="In messages, <|im_end|> and the like count as special tokens, not as text",
            rich_help_panel=_HTTP,
        ),
    ] = False,
    tool_call_parser: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How the model writes tool calls: hermes, qwen3_coder, llama3_json, mistral, ...",
            show_default="as its chat template says",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    reasoning_parser: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How it marks what it thinks: qwen3, deepseek_r1, mistral, granite, ...",
            show_default="as its chat template says",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    allowed_media_domains: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="A host that images are fetched from when clients send their URL; repeatable",
            show_default="none: data URLs alone",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    max_connections: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Connections at once; beyond it the one that has waited longest is cut",
            show_default="4096, or what ulimit -n allows",
            min=1,
            rich_help_panel=_HTTP,
        ),
    ] = None,
    max_connections_per_ip: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Of them, from one address and waiting; 0: any number (behind a proxy)",
            show_default="a quarter",
            min=0,
            rich_help_panel=_HTTP,
        ),
    ] = None,
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="What open requests get after SIGTERM",
            min=0,
            rich_help_panel=_HTTP,
        ),
    ] = 30.0,
    engine_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="Without a sign of life from the engine, it is stuck: exit; 0: never",
            min=0,
            rich_help_panel=_HTTP,
        ),
    ] = 60.0,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Context in tokens, prompt and answer",
            show_default="the model's, bounded by the KV cache",
            min=1,
            rich_help_panel=_BATCH,
        ),
    ] = None,
    max_num_seqs: Annotated[
        int,
        typer.Option(metavar="N", help="Sequences in one step", min=1, rich_help_panel=_BATCH),
    ] = 64,
    max_num_batched_tokens: Annotated[
        int,
        typer.Option(metavar="N", help="Tokens in one step", min=1, rich_help_panel=_BATCH),
    ] = 2048,
    kv_cache_memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="2GiB, 512M, ...",
            show_default="planned from free memory",
            rich_help_panel=_BATCH,
        ),
    ] = None,
    kv_cache_dtype: Annotated[
        str,
        typer.Option(
            help="auto: as activations; int8, fp8 (CUDA): half of it", rich_help_panel=_BATCH
        ),
    ] = "auto",
    no_prefix_caching: Annotated[
        bool,
        typer.Option(
            "--no-prefix-caching",
            metavar="",
            help="Share no prompt prefixes",
            rich_help_panel=_BATCH,
        ),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(metavar="N", help="For requests that bring none", rich_help_panel=_BATCH),
    ] = 0,
    num_threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Threads of the engine",
            show_default="torch's choice",
            min=1,
            rich_help_panel=_CPU,
        ),
    ] = None,
    cpu_isa: Annotated[
        str,
        typer.Option(
            help="C++ kernels: auto, avx512bf16, avx512vnni, avxvnni, avx2, neon, or none",
            rich_help_panel=_CPU,
        ),
    ] = "auto",
    cpu_activations: Annotated[
        str,
        typer.Option(
            help="What integer weights are multiplied with: int8 (by group) or bf16",
            rich_help_panel=_CPU,
        ),
    ] = "int8",
    lm_head_bits: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Of a 16-bit output head: 8, or 16 to keep it",
            show_default="8 beside 4-bit weights",
            rich_help_panel=_CPU,
        ),
    ] = None,
    prepared_cache: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="Keeps weights in the CPU kernels' layout for the next start; none: nothing is kept",
            rich_help_panel=_CPU,
        ),
    ] = "~/.cache/nibble",
) -> int:
    """Serve MODEL behind an OpenAI-compatible API.

    Example: nibble serve ./SmolLM2-AWQ --port 8000 --kv-cache-memory 2GiB
    """
    from ..engine.config import EngineConfig
    from ..server import logs
    from ..server.lifecycle import ServeOptions
    from ..server.lifecycle import serve as run

    logs.configure()
    config = EngineConfig(
        model=model,
        revision=revision,
        quantize=quantize,
        save_quantized=save_quantized,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory=kv_cache_memory,
        kv_cache_dtype=kv_cache_dtype,
        enable_prefix_caching=not no_prefix_caching,
        num_threads=num_threads,
        cpu_isa=cpu_isa,
        cpu_activations=cpu_activations,
        lm_head_bits=lm_head_bits,
        prepared_cache=None if prepared_cache == "none" else prepared_cache,
        seed=seed,
    )
    options = ServeOptions(
        host=host,
        port=port,
        model_names=tuple(served_model_name or [_model_name(model)]),
        api_keys=_api_keys(api_key or [], api_key_file),
        shutdown_timeout=shutdown_timeout,
        engine_timeout=engine_timeout,
        max_queued_requests=max_queued_requests,
        scheduling_policy=scheduling_policy,
        ui=not no_ui,
        allowed_origins=tuple(allowed_origins or ()),
        parse_special_tokens=parse_special_tokens,
        tool_call_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
        allowed_media_domains=tuple(allowed_media_domains or ()),
        max_connections=max_connections,
        max_connections_per_ip=max_connections_per_ip,
    )
    return run(config, options)


def _api_keys(given: list[str], file: str | None) -> "tuple[ApiKey, ...]":
    """Those of the flags; where there are none, that of the environment."""
    from ..server import keys

    if file is not None:
        return keys.from_file(file, keys.given(given, "--api-key"))
    if not given and "NIBBLE_API_KEY" in os.environ:
        return keys.given([os.environ["NIBBLE_API_KEY"]], "NIBBLE_API_KEY")
    return keys.given(given, "--api-key")


def _model_name(model: str) -> str:
    """models/SmolLM2-AWQ -> SmolLM2-AWQ; a Hub id stays as it is."""
    path = Path(model).expanduser()
    return path.resolve().name.removesuffix(".gguf") if path.exists() else model
