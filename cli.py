"""The `nibble` command: a group of verbs; each verb's code lives in its own room and is imported when it is run.

    nibble VERB ...    imports "module:function" from VERBS and makes a command of it
    exit codes         0 done, 1 a defect, 2 bad input (one line on stderr; --debug: a traceback), 130 interrupted

A verb is a plain function whose typer annotations are its options and which returns its exit code, or None for 0.
Invariant: help and completion of the group import no verb, and a verb's own help imports no torch.
"""

import re
import sys
from collections.abc import Sequence
from importlib import import_module
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
        ".tools.serve_command:serve_command",
        "Serve a model behind an OpenAI-compatible API",
        "nibble serve ./SmolLM2-135M-Instruct-AWQ-INT4-g128",
    ),
    "chat": Verb(
        ".tools.chat:chat_command", "Talk to a server or a model in the terminal", "nibble chat"
    ),
    "top": Verb(".tools.top:top_command", "Watch what a running server is doing", "nibble top"),
    "convert": Verb(
        ".tools.convert_command:convert_command",
        "Quantize a model to AWQ, GPTQ or FP8",
        "nibble convert HuggingFaceTB/SmolLM2-135M-Instruct --awq",
    ),
    "evaluate": Verb(
        ".tools.evaluate_command:evaluate_command",
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
        ".tools.tune_command:tune_command",
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
        if args[:1] == ["serve"]:
            args = ["serve", *_translated(args[1:])]
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


def _translated(args: list[str]) -> list[str]:
    """With the flags of other servers as ours."""
    from .tools.peer_flags import translated

    return translated(args)


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
