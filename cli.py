"""The `nibble` command: one line per verb; each verb's code lives in its own room and is imported on use.

    nibble VERB ...    imports "module:function" from VERBS and gives the rest of the line to it
    exit codes         0 done, 1 a defect, 2 bad input (one line on stderr; --debug: a traceback), 130 interrupted

A verb is a plain function whose typer annotations are its options and which returns its exit code, or None for 0.
"""

import difflib
import functools
import logging
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UserError
from .version import __version__

# verb -> (where it lives, what --help says)
VERBS = {
    "serve": (".cli:serve", "serve a model behind an OpenAI-compatible API"),
    "chat": (".tools.chat:chat_command", "talk to a server or a model in the terminal"),
    "convert": (".tools.convert:convert_command", "quantize a model to AWQ, GPTQ or FP8"),
    "evaluate": (
        ".tools.evaluate:evaluate_command",
        "measure what quantization cost: perplexity, KL, top-1 agreement",
    ),
    "doctor": (
        ".tools.doctor:doctor_command",
        "what this machine can do, and what a model would run on",
    ),
    "tune": (
        ".tools.tune:tune_command",
        "measure which tiles the quantized products are fastest with on this GPU",
    ),
    "version": (".cli:version", "print the version"),
}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    name = {"--version": "version"}.get(args[0], args[0])
    if name not in VERBS:
        close = difflib.get_close_matches(name, VERBS, 1)
        print(
            f"error: no verb {name!r}"
            + (f" (did you mean {close[0]!r}?)" if close else "; see nibble --help"),
            file=sys.stderr,
        )
        return 2
    try:
        return _run(name, args[1:])
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _help() -> str:
    lines = [f"  {name:<10} {text}" for name, (_, text) in VERBS.items()]
    return "\n".join(
        [
            "usage: nibble VERB ...   (nibble VERB --help for its options)",
            "",
            *lines,
            "",
            "  --debug    show the traceback of an error",
            "",
            "example: nibble convert HuggingFaceTB/SmolLM2-135M-Instruct --awq -o out && nibble serve out",
        ]
    )


def _run(name: str, args: list[str]) -> int:
    module, function_name = VERBS[name][0].split(":")
    function = getattr(import_module(module, __package__), function_name)

    @functools.wraps(function)
    def verb(*args: Any, **options: Any) -> None:
        raise SystemExit(function(*args, **options))  # typer drops what a command returns

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name)(verb)
    try:
        app(args, prog_name=f"nibble {name}")
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


def parse_bytes(text: str) -> int:
    """`2GiB`, `512M`, `1.5g` or plain bytes, as a number of bytes. M is 10^6 and Mi 2^20."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise UserError(f"{text!r} is not a size (write 2GiB, 512M or a number of bytes)")
    return int(float(match[1]) * _UNITS[match[2]])


def version() -> None:
    """Print the version."""
    print(f"nibble {__version__}")


def serve(
    model: Annotated[str, typer.Argument(help="local folder, .gguf file or Hub id")],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="port to listen on; 0: any free one", min=0, max=65535)
    ] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="the name clients use; repeatable [default: the last part of MODEL]"),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="NIBBLE_API_KEY", help="key that clients must bear; repeatable"),
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="quantize a 16-bit model while it loads: int4, int8 or fp8")
    ] = None,
    save_quantized: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="keep what --quantize made, to serve it at once the next time"
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    revision: Annotated[str | None, typer.Option(help="the Hub revision of MODEL")] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            help="context in tokens [default: the model's, bounded by the KV cache]", min=1
        ),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="sequences in one step", min=1)] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(help="tokens in one step", min=1)] = 2048,
    kv_cache_memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="2GiB, 512M [default: planned from free memory]",
        ),
    ] = None,
    kv_cache_dtype: Annotated[
        str, typer.Option(help="auto: as activations; int8, fp8 (CUDA): half of it")
    ] = "auto",
    no_prefix_caching: Annotated[
        bool, typer.Option("--no-prefix-caching", help="share no prompt prefixes")
    ] = False,
    num_threads: Annotated[
        int | None, typer.Option(help="CPU threads of the engine", min=1)
    ] = None,
    cpu_isa: Annotated[
        str,
        typer.Option(
            help="C++ kernels: auto, avx512bf16, avx512vnni, avxvnni, avx2, neon, or none"
        ),
    ] = "auto",
    cpu_activations: Annotated[
        str,
        typer.Option(
            help="what integer weights are multiplied with on a CPU: int8 (by group) or bf16"
        ),
    ] = "int8",
    lm_head_bits: Annotated[
        int | None,
        typer.Option(
            help="of a 16-bit output head (CPU): 8, or 16 to keep it [default: 8 beside 4-bit weights]"
        ),
    ] = None,
    prepared_cache: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="keeps weights in the CPU kernels' layout for the next start; none: nothing is kept",
        ),
    ] = "~/.cache/nibble/prepared",
    seed: Annotated[int, typer.Option(help="for requests that bring none")] = 0,
    max_queued_requests: Annotated[
        int, typer.Option(help="sequences admitted beyond --max-num-seqs; more get a 503", min=0)
    ] = 1024,
    shutdown_timeout: Annotated[
        float, typer.Option(help="seconds that open requests get after SIGTERM", min=0)
    ] = 30.0,
) -> int:
    """Serve MODEL behind an OpenAI-compatible API.

    Example: nibble serve ./SmolLM2-AWQ --port 8000 --kv-cache-memory 2GiB
    """
    from .engine.config import EngineConfig
    from .server.lifecycle import ServeOptions
    from .server.lifecycle import serve as run

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
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
        api_keys=tuple(api_key or ()),
        shutdown_timeout=shutdown_timeout,
        max_queued_requests=max_queued_requests,
    )
    return run(config, options)


def _model_name(model: str) -> str:
    """models/SmolLM2-AWQ -> SmolLM2-AWQ; a Hub id stays as it is."""
    path = Path(model).expanduser()
    return path.resolve().name.removesuffix(".gguf") if path.exists() else model
