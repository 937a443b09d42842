"""`nibble doctor`: what this machine can do, and what a checkpoint would run on here, before anything large is loaded.

Every line is ok, slow (it works; what would make it faster) or no (it does not; what to do). Kernels are not guessed:
one layer of the checkpoint is loaded by the loader that would serve it.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from nibble.architectures.base import LatentAttention, ModelSpec
from nibble.errors import UserError

if TYPE_CHECKING:
    import torch

    from nibble.architectures.base import ModelSpec
    from nibble.quant.checkpoint import Checkpoint

_STYLES = {"ok": "green", "slow": "yellow", "no": "red"}
_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the diagnosis. `fix` is empty where there is nothing to do."""

    subject: str
    state: str  # ok, slow, no
    text: str
    fix: str = ""


def doctor_command(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Local folder, .gguf file or Hub id to look at"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="One JSON list on standard output")
    ] = False,
) -> int:
    """Say what this machine can do and, given a model, whether and on what it would run. Exit code 2: it would not."""
    findings = machine() + (checkpoint(model, device) if model else [])
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(_table(findings))
    return 2 if any(finding.state == "no" for finding in findings) else 0


def machine() -> list[Finding]:
    """Versions, processor, C++ kernels, memory and GPUs."""
    import torch

    from nibble.engine.host_memory import gib
    from nibble.engine.memory import available_bytes

    packages = ", ".join(filter(None, map(_version, _PACKAGES)))
    found = [
        Finding("python", "ok", f"{platform.python_version()}, {packages}"),
        Finding(
            "cpu",
            "ok",
            f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores for this process, "
            f"{torch.get_num_threads()} threads",
        ),
        _cpp_kernels(),
        Finding("memory", "ok", f"{gib(available_bytes(torch.device('cpu')))} free"),
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            Finding(
                f"cuda:{index}",
                "ok",
                f"{properties.name}, compute capability {properties.major}."
                f"{properties.minor}, {gib(torch.cuda.mem_get_info(index)[0])} free",
            )
        )
        found.append(tiles(properties.name, 10 * properties.major + properties.minor))
    if not torch.cuda.is_available():
        found.append(Finding("gpu", "ok", "torch sees none: models run on the CPU"))
    return found


def tiles(card: str, cc: int) -> Finding:
    """Whether the tiles of a card's quantized products were measured."""
    from nibble.kernels.awq.linear import CONFIGS
    from nibble.kernels.dequant_gemm.tiles import table

    origin = table(card, cc, "int4", CONFIGS).origin
    if origin:
        return Finding("tiles", "ok", f"of quantized products: {origin}")
    return Finding(
        "tiles",
        "ok",
        "of quantized products: by compute capability, not measured on this card",
        "nibble tune measures which are fastest (minutes)",
    )


def checkpoint(model: str, device_name: str) -> list[Finding]:
    """The format, the kernels of one layer, and whether it fits. Stops at the first thing that cannot be."""
    from nibble.architectures.registry import model_spec
    from nibble.engine.runner import resolve_device, resolve_dtype
    from nibble.quant.checkpoint import open_checkpoint

    found: list[Finding] = []
    try:
        opened = open_checkpoint(model)
        scheme = opened.scheme.describe() if opened.scheme else "16-bit weights"
        found.append(
            Finding("checkpoint", "ok", f"{opened.path}: {scheme}, {opened.nbytes / 1e9:.2f} GB")
        )
        spec = model_spec(opened.config, opened.names())
        found.append(
            Finding(
                "architecture",
                "ok",
                _architecture(spec),
            )
        )
        device = resolve_device(device_name)
        dtype = resolve_dtype("auto", opened, device)
        found += _kernels(opened, spec, dtype, device)
        found += _memory(opened, spec, dtype, device)
    except UserError as error:
        found.append(Finding("model", "no", str(error)))
    return found


def _architecture(spec: ModelSpec) -> str:
    said = f"{spec.num_layers} layers of {spec.hidden_size}"
    attention = list(spec.attention.values())
    if attention:
        said += f", {attention[0].num_heads} heads, {attention[0].num_kv_heads} of them with keys and values"
    latent = [m for m in spec.cached.values() if isinstance(m, LatentAttention)]
    if latent:
        said += f", {latent[0].num_heads} heads over latents of {latent[0].kv_rank}"
    if states := sum(bool(layer.state_shapes) for layer in spec.layers):
        said += f"; {states} layers carry a state instead"
    return said


def _kernels(
    opened: "Checkpoint", spec: "ModelSpec", dtype: "torch.dtype", device: "torch.device"
) -> list[Finding]:
    """What each matrix of a layer runs on, and why not on something better."""
    import torch

    from nibble.engine.backends.base import Target
    from nibble.engine.backends.choose import assign, load_decoder
    from nibble.engine.config import EngineConfig

    target = Target(EngineConfig(model=str(opened.path), prepared_cache=None), dtype, device)
    assignment = assign(target, spec)
    # without what is of all layers together
    one = dataclasses.replace(spec, layers=spec.layers[:1], per_layer_inputs=None, alt_up=None)
    with torch.inference_mode():
        report = load_decoder(target, opened, one).report
    best = "C++, one call a step" if device.type == "cpu" else "Triton kernels, CUDA graphs"
    found = [
        Finding("backend", "slow", "torch's operators", assignment.refused)
        if assignment.refused
        else Finding("backend", "ok", best)
    ]
    for name, count in report.used.items():
        found.append(
            Finding("kernel", "ok", f"{name}: {count} matrices (of one layer and the head)")
        )
    found += [
        Finding("kernel", "ok", f"not {name}: {reason}") for name, reason in report.refused.items()
    ]
    return found


def _memory(
    opened: "Checkpoint", spec: "ModelSpec", dtype: "torch.dtype", device: "torch.device"
) -> list[Finding]:
    from nibble.engine import memory
    from nibble.engine.host_memory import gib

    free, weights = memory.available_bytes(device), opened.nbytes
    token, state = memory.kv_bytes_per_token(spec, dtype), memory.state_bytes(spec)
    context = spec.max_position_embeddings
    if weights > free:
        return [
            Finding(
                "fits",
                "no",
                f"weights {gib(weights)}, free {gib(free)}",
                "a smaller or a quantized checkpoint (nibble convert), or serve --quantize int4",
            )
        ]
    left = free - weights
    text = f"weights {gib(weights)} of {gib(free)} free; {token / 1024:.0f} KiB a token of context"
    if state:
        text += f" and {state / 2**20:.0f} MiB for the state of a sequence"
    if left < (request := context * token + state):
        tokens = max(0, left - state) // max(1, token)
        return [
            Finding(
                "fits",
                "slow",
                f"{text}: {tokens} tokens, the model could take {context}",
                "a shorter --max-model-len",
            )
        ]
    return [
        Finding("fits", "ok", f"{text}: room for {left // request} requests of {context} tokens")
    ]


def _cpp_kernels() -> Finding:
    from nibble.kernels.cpu import library

    reason = library.why_missing()
    if reason:
        return Finding(
            "c++ kernels", "slow", "none: torch's operators serve, several times slower", reason
        )
    return Finding(
        "c++ kernels", "ok", f"built; instruction sets {', '.join(library.instruction_sets())}"
    )


def _version(package: str) -> str | None:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _table(findings: list[Finding]) -> Table:
    table = Table("", "", "found", "to do", box=None)
    for finding in findings:
        table.add_row(
            finding.subject,
            f"[{_STYLES[finding.state]}]{finding.state}[/]",
            finding.text,
            finding.fix,
        )
    return table
