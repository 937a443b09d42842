"""Which backend computes which layers: the best that runs here and knows them, torch's operators for the rest.

    for each layer, the first of [cpp | triton, torch] that does not refuse it
    consecutive layers of one backend -> one decoder; several -> a chain of them (runs.py)

What a backend refuses is logged in its own words; what all refuse is an error.
"""

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass

from ...architectures.base import ModelSpec
from ...errors import UnsupportedError, UserError
from ...kernels.cpu import library
from ...quant.checkpoint import Checkpoint
from .base import Backend, Decoder, Target
from .cpp.loader import CppBackend
from .runs import ChainedDecoder
from .torch.loader import TorchBackend
from .triton.loader import TritonBackend
from .weights import ModelWeights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive layers on one backend."""

    backend: Backend
    layers: range


@dataclass(frozen=True, slots=True)
class Assignment:
    """Who computes what, and why not somebody faster."""

    runs: list[Run]
    refused: str | None  # the fast backend's reason, where torch's operators compute anything


def assign(target: Target, model: ModelSpec) -> Assignment:
    """Give every layer to a backend. UnsupportedError names the layer and the reasons where none takes it."""
    fast: Backend = (TritonBackend if target.device.type == "cuda" else CppBackend)(target)
    backends: list[Backend] = [fast, TorchBackend(target)]
    gone = fast.unavailable()
    chosen: list[Backend] = []
    refused = gone
    for index, layer in enumerate(model.layers):
        reasons = [
            (gone if backend is fast else None) or backend.why_not(layer, model)
            for backend in backends
        ]
        refused = refused or reasons[0]
        if all(reasons):
            raise UnsupportedError(
                f"layer {index} cannot be computed: "
                + "; ".join(f"{b.name} {why}" for b, why in zip(backends, reasons, strict=True))
            )
        chosen.append(backends[[reason is None for reason in reasons].index(True)])
    if _layers_need_each_other(model):
        chosen = [max(chosen, key=backends.index)] * len(chosen)
    runs = []
    for _, indices in itertools.groupby(range(len(chosen)), key=lambda i: id(chosen[i])):
        layers = list(indices)
        runs.append(Run(chosen[layers[0]], range(layers[0], layers[-1] + 1)))
    return Assignment(runs, refused)


def _layers_need_each_other(model: ModelSpec) -> bool:
    """Whether a layer reads what is made elsewhere than in the layer before, so that all must be of one decoder."""
    shared = any(mixer.kv_source is not None for mixer in model.attention.values())
    return shared or model.per_layer_inputs is not None or model.alt_up is not None


def load_decoder(
    target: Target,
    checkpoint: Checkpoint,
    model: ModelSpec,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """The model with its weights. progress(done, total) is called after every layer. Raises UserError on bad input."""
    assignment = assign(target, model)
    check_options(target, assignment.refused)
    ModelWeights(checkpoint, model).check()

    def tell(index: int) -> None:
        if progress is not None:
            progress(index + 1, model.num_layers)

    decoders = [run.backend.load(checkpoint, model, run.layers, tell) for run in assignment.runs]
    if assignment.refused is not None:
        lost = target.device.type == "cuda" or library.why_missing() is not None
        level = logging.WARNING if lost else logging.INFO
        logger.log(level, "torch's operators serve: %s", assignment.refused)
    return decoders[0] if len(decoders) == 1 else ChainedDecoder(decoders)


def check_options(target: Target, refused: str | None) -> None:
    """UserError for an option that is unknown, or that needs a backend which does not serve; refused: why not."""
    config, on_cpu = target.config, target.device.type == "cpu"
    if config.cpu_activations not in ("int8", "bf16"):
        raise UserError(
            f"--cpu-activations {config.cpu_activations!r} is unknown; use int8 or bf16"
        )
    if config.lm_head_bits not in (None, 8, 16):
        raise UserError(
            f"--lm-head-bits {config.lm_head_bits} is not supported; use 8, 16, or leave it out"
        )
    if config.kv_cache_dtype not in ("auto", "int8", "fp8"):
        raise UserError(
            f"--kv-cache-dtype {config.kv_cache_dtype!r} is unknown; use auto, int8 or fp8"
        )
    if config.kv_cache_dtype == "fp8" and on_cpu:
        raise UserError("--kv-cache-dtype fp8 needs a CUDA device; use int8 on a CPU")
    if config.kv_cache_dtype != "auto" and refused is not None:
        needs = "C++" if on_cpu else "Triton"
        raise UserError(
            f"--kv-cache-dtype {config.kv_cache_dtype} needs the {needs} backend, which does not "
            f"serve all of this model: {refused}"
        )
    if config.lm_head_bits == 8 and (refused is not None or not on_cpu):
        why = refused or "it runs on a CUDA device"
        raise UserError(
            f"--lm-head-bits 8 needs the C++ backend, which does not serve all of this model: {why}"
        )
