"""The `nibble` command: a group of verbs; each verb's code lives in its own room and is imported when it is run.

    nibble VERB ...    imports "module:function" from VERBS and makes a command of it
    exit codes         0 done, 1 a defect, 2 bad input (one line on stderr; --debug: a traceback), 130 interrupted

A verb is a plain function whose typer annotations are its options and which returns its exit code, or None for 0.
Invariant: help and completion of the group import no verb, and a verb's own help imports no torch.
"""

import logging
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from .errors import UserError
from .version import __version__


class Verb(NamedTuple):
    """Where a verb lives, what `nibble --help` says of it, and what bad usage is answered with."""

    home: str
    help: str
    example: str


VERBS = {
    "serve": Verb(
        ".cli:serve",
        "Serve a model behind an OpenAI-compatible API",
        "nibble serve ./SmolLM2-135M-Instruct-AWQ-INT4-g128",
    ),
    "chat": Verb(
        ".tools.chat:chat_command", "Talk to a server or a model in the terminal", "nibble chat"
    ),
    "convert": Verb(
        ".tools.convert_command:convert_command",
        "Quantize a model to AWQ, GPTQ or FP8",
        "nibble convert HuggingFaceTB/SmolLM2-135M-Instruct --awq",
    ),
    "evaluate": Verb(
        ".tools.evaluate:evaluate_command",
        "Measure what quantization cost: perplexity, KL, top-1 agreement",
        "nibble evaluate ./SmolLM2-135M-Instruct ./SmolLM2-135M-Instruct-AWQ-INT4-g128",
    ),
    "verify": Verb(
        ".tools.verify:verify_command",
        "Compare a model's files with the hashes that came with them",
        "nibble verify ./SmolLM2-135M-Instruct-AWQ-INT4-g128",
    ),
    "doctor": Verb(
        ".tools.doctor:doctor_command",
        "What this machine can do, and what a model would run on",
        "nibble doctor ./SmolLM2-135M-Instruct",
    ),
    "tune": Verb(
        ".tools.tune:tune_command",
        "Measure which tiles the quantized products are fastest with on this GPU",
        "nibble tune",
    ),
    "version": Verb(".cli:version", "Print the version", "nibble version"),
}
_UNITS = {
    prefix + infix: base**power
    for power, prefix in enumerate(["", "k", "m", "g", "t"])
    for infix, base in (("", 1000), ("i", 1024))
    if prefix or not infix
}
# Panels of `nibble serve --help`
_HTTP, _BATCH, _CPU = "HTTP", "Context and batches", "On a CPU"
# click's, or the copy of click that newer versions of typer carry
_UsageError: type[Exception] = next(
    cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "UsageError"
)


class _Verbs(TyperGroup):
    """Lists its verbs without importing them; a verb is made of its module when it is run."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, listed, rest = super().resolve_command(ctx, args)
        return name, listed and _load(name or ""), rest


app = typer.Typer(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="`nibble help VERB` is `nibble VERB --help`. Example: "
    "nibble convert HuggingFaceTB/SmolLM2-135M-Instruct --awq -o out && nibble serve out",
)
for _name, _verb in VERBS.items():
    app.command(_name, help=_verb.help)(lambda: None)


@app.callback(invoke_without_command=True)
def nibble(
    ctx: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", "-V", metavar="", help="Print the version")
    ] = False,
    _debug: Annotated[
        bool,
        typer.Option(
            "--debug", metavar="", help="Show the traceback of an error; also after the verb"
        ),
    ] = False,
) -> None:
    """Convert language models to AWQ, GPTQ and FP8, and serve them."""
    if show_version:
        version()
        raise typer.Exit()
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if args[:1] == ["help"]:
        args = [*args[1:2], "--help"]
    try:
        command = typer.main.get_command(app)
        return int(command.main(args, prog_name="nibble", standalone_mode=False) or 0)
    except (UserError, _UsageError) as error:
        if debug:
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort) as stop:
        if isinstance(stop.__cause__, EOFError):
            raise  # typer takes it for Ctrl-D; of a verb it is a defect
        return 130


def _load(name: str) -> Any:
    """The command that a verb is."""
    module, function = VERBS[name].home.split(":")
    single = typer.Typer(add_completion=False)
    single.command(name)(getattr(import_module(module, __package__), function))
    return typer.main.get_command(single)


def _one_line(error: Exception) -> str:
    """Bad usage is answered with an example where something is missing, else with where help is."""
    if not isinstance(error, _UsageError):
        return str(error)
    message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
    name = getattr(getattr(error, "ctx", None), "info_name", None)
    if name not in VERBS:
        return f"{message} (see nibble --help)"
    if message.startswith("Missing"):
        return f"{message} (for example: {VERBS[name].example})"
    return f"{message} (see nibble {name} --help)"


def parse_bytes(text: str) -> int:
    """`2GiB`, `512M`, `1.5t` or plain bytes, as a number of bytes. M is 10^6 and Mi 2^20."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise UserError(f"{text!r} is not a size (write 2GiB, 512M or a number of bytes)")
    return int(float(match[1]) * _UNITS[match[2]])


def version() -> None:
    """Print the version."""
    print(f"nibble {__version__}")


def serve(
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
            envvar="NIBBLE_API_KEY",
            help="A key that clients must bear; repeatable",
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
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="What open requests get after SIGTERM",
            min=0,
            rich_help_panel=_HTTP,
        ),
    ] = 30.0,
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
    from .engine.config import EngineConfig
    from .server.lifecycle import ServeOptions
    from .server.lifecycle import serve as run

    # Of other libraries, warnings alone: a Hub download is 25 lines of their HTTP client.
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO)
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
