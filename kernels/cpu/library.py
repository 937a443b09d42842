"""The C++ kernels from Python: the library, found and checked, its structures (abi.h has the layouts), its threads."""

import ctypes
import weakref
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache

from ...errors import UserError
from .build import LIBRARY, architecture, source_hash

_ABI_VERSION = 18
MAX_INPUTS = 4  # NB_MAX_INPUTS
MAX_ROPES = 4  # NB_MAX_ROPES
_HOW_TO_BUILD = (
    "install a C++ compiler (g++) and reinstall Nibble (in a checkout: pip install -e .)"
)

_NEEDED_CPU = {
    "x86_64": "the C++ kernels need a CPU with AVX2",
    "aarch64": "the C++ kernels need a CPU with the dot product instructions (asimddp in /proc/cpuinfo)",
}

U4, U8, FP8, DENSE, T4 = range(5)  # NbFormat
MIDPOINT, ZEROS, MINS = range(3)  # NbOffset
SCORINGS = {"softmax": 0, "sigmoid": 1}  # NbScoring
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "relu2": 2}  # NbActivation
GATES = {None: 0, "q_proj": 1, "gate_proj": 2}  # NbGate


class NbLinear(ctypes.Structure):
    _fields_ = [
        ("format", c_int32),
        ("offset", c_int32),
        ("n", c_int32),
        ("group", c_int32),
        ("groups", c_int32),
        ("midpoint", c_int32),
        ("input", c_int32),
        ("multiplier", c_float),
        ("data", c_void_p),
        ("scales", c_void_p),
        ("offsets", c_void_p),
        ("bias", c_void_p),
        ("table", c_void_p),
    ]


class NbInput(ctypes.Structure):
    _fields_ = [
        ("k", c_int32),
        ("k_padded", c_int32),
        ("group", c_int32),
        ("sum_group", c_int32),
        ("perm", c_void_p),
    ]


class NbLinearGroup(ctypes.Structure):
    _fields_ = [
        ("num_inputs", c_int32),
        ("num_linears", c_int32),
        ("inputs", c_void_p),
        ("linears", c_void_p),
    ]


class NbRope(ctypes.Structure):
    _fields_ = [
        ("dim", c_int32),
        ("factor", c_float),
        ("interleaved", c_int32),
        ("inv_freq", c_void_p),
        ("long_inv_freq", c_void_p),
    ]


class NbAttention(ctypes.Structure):
    _fields_ = [
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("rope", c_int32),
        ("window", c_int32),
        ("qk_norm_all", c_int32),
        ("scale", c_float),
        ("soft_cap", c_float),
        ("query_beta", c_float),
        ("query_length", c_int32),
        ("output_gate", c_int32),
        ("head_gate", c_int32),
        ("reads_only", c_int32),
        ("keys_are_values", c_int32),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("v_norm", c_void_p),
        ("sinks", c_void_p),
        ("qkv", NbLinearGroup),
        ("o", NbLinearGroup),
    ]


class NbLatentAttention(ctypes.Structure):
    _fields_ = [
        ("num_heads", c_int32),
        ("q_rank", c_int32),
        ("kv_rank", c_int32),
        ("nope_dim", c_int32),
        ("rope_dim", c_int32),
        ("value_dim", c_int32),
        ("rope", c_int32),
        ("scale", c_float),
        ("eps", c_float),
        ("query_beta", c_float),
        ("query_length", c_int32),
        ("q_norm", c_void_p),
        ("kv_norm", c_void_p),
        ("in", NbLinearGroup),
        ("q_b", NbLinearGroup),
        ("keys", NbLinearGroup),
        ("values", NbLinearGroup),
        ("o", NbLinearGroup),
    ]


class NbDeltaNet(ctypes.Structure):
    _fields_ = [
        ("key_heads", c_int32),
        ("value_heads", c_int32),
        ("key_dim", c_int32),
        ("value_dim", c_int32),
        ("taps", c_int32),
        ("filters", c_void_p),
        ("rate", c_void_p),
        ("dt_bias", c_void_p),
        ("norm", c_void_p),
        ("in", NbLinearGroup),
        ("out", NbLinearGroup),
    ]


class NbShortConv(ctypes.Structure):
    _fields_ = [
        ("channels", c_int32),
        ("taps", c_int32),
        ("filters", c_void_p),
        ("bias", c_void_p),
        ("in", NbLinearGroup),
        ("out", NbLinearGroup),
    ]


class NbMamba2(ctypes.Structure):
    _fields_ = [
        ("heads", c_int32),
        ("head_dim", c_int32),
        ("state_dim", c_int32),
        ("groups", c_int32),
        ("taps", c_int32),
        ("min_step", c_float),
        ("max_step", c_float),
        ("filters", c_void_p),
        ("conv_bias", c_void_p),
        ("rate", c_void_p),
        ("dt_bias", c_void_p),
        ("skip", c_void_p),
        ("norm", c_void_p),
        ("in", NbLinearGroup),
        ("out", NbLinearGroup),
    ]


class NbGatedMlp(ctypes.Structure):
    _fields_ = [
        ("intermediate", c_int32),
        ("activation", c_int32),
        ("sparse", c_int32),
        ("deviations", c_float),
        ("alpha", c_float),
        ("limit", c_float),
        ("gate_up", NbLinearGroup),
        ("down", NbLinearGroup),
    ]


class NbPerLayerInput(ctypes.Structure):
    _fields_ = [("norm", c_void_p), ("gate", NbLinearGroup), ("projection", NbLinearGroup)]


class NbPerLayerInputs(ctypes.Structure):
    _fields_ = [
        ("width", c_int32),
        ("activation", c_int32),
        ("vocab", c_int32),
        ("projection_scale", c_float),
        ("table_scale", c_float),
        ("table", c_void_p),
        ("norm", c_void_p),
        ("projection", NbLinearGroup),
    ]


class NbExperts(ctypes.Structure):
    _fields_ = [
        ("num_experts", c_int32),
        ("top_k", c_int32),
        ("scoring", c_int32),
        ("norm_weights", c_int32),
        ("groups", c_int32),
        ("best_groups", c_int32),
        ("group_rank", c_int32),
        ("routed_scale", c_float),
        ("router", c_void_p),
        ("router_bias", c_void_p),
        ("correction_bias", c_void_p),
        ("experts", POINTER(NbGatedMlp)),
        ("shared", POINTER(NbGatedMlp)),
        ("shared_gate", c_void_p),
        ("latent", c_int32),
        ("into", NbLinearGroup),
        ("out_of", NbLinearGroup),
        ("norm", c_void_p),
        ("scales", c_void_p),
    ]


class NbLaurel(ctypes.Structure):
    _fields_ = [
        ("rank", c_int32),
        ("norm", c_void_p),
        ("left", NbLinearGroup),
        ("right", NbLinearGroup),
    ]


class NbAltUpLayer(ctypes.Structure):
    _fields_ = [
        ("router", c_void_p),
        ("predictions", c_void_p),
        ("corrections", c_void_p),
        ("scale", c_void_p),
    ]


class NbAltUp(ctypes.Structure):
    _fields_ = [
        ("streams", c_int32),
        ("active", c_int32),
        ("into", NbLinearGroup),
        ("back", POINTER(NbLinearGroup)),
    ]


class NbLayer(ctypes.Structure):
    _fields_ = [
        ("before_mixer", c_void_p),
        ("after_mixer", c_void_p),
        ("before_mlp", c_void_p),
        ("after_mlp", c_void_p),
        ("after_dense", c_void_p),
        ("after_experts", c_void_p),
        ("before_experts", c_void_p),
        ("attention", POINTER(NbAttention)),
        ("latent_attention", POINTER(NbLatentAttention)),
        ("delta_net", POINTER(NbDeltaNet)),
        ("short_conv", POINTER(NbShortConv)),
        ("mamba2", POINTER(NbMamba2)),
        ("mlp", POINTER(NbGatedMlp)),
        ("experts", POINTER(NbExperts)),
        ("per_layer_input", POINTER(NbPerLayerInput)),
        ("laurel", POINTER(NbLaurel)),
        ("alt_up", POINTER(NbAltUpLayer)),
        ("scalar", c_float),
    ]


class NbModel(ctypes.Structure):
    _fields_ = [
        ("hidden", c_int32),
        ("num_layers", c_int32),
        ("num_ropes", c_int32),
        ("vocab", c_int32),
        ("eps", c_float),
        ("after_eps", c_float),
        ("embedding_scale", c_float),
        ("block_size", c_int32),
        ("layers", POINTER(NbLayer)),
        ("ropes", POINTER(NbRope)),
        ("embedding", c_void_p),
        ("embedding_norm", c_void_p),
        ("norm", c_void_p),
        ("per_layer_inputs", POINTER(NbPerLayerInputs)),
        ("alt_up", POINTER(NbAltUp)),
        ("head", NbLinearGroup),
    ]


class NbBatch(ctypes.Structure):
    _fields_ = [
        ("num_tokens", c_int32),
        ("num_items", c_int32),
        ("tokens", c_void_p),
        ("items", c_void_p),
        ("tables", c_void_p),
        ("table_starts", c_void_p),
        ("layer_groups", c_void_p),
        ("cache", c_void_p),
        ("cache_offsets", c_void_p),
        ("cache_int8", c_int32),
        ("states", c_void_p),
        ("num_slots", c_int64),
        ("item_states", c_void_p),
        ("snapshots", c_void_p),
        ("last_seen", c_void_p),
    ]


_FUNCTIONS = {
    "nb_build": (c_char_p, []),
    "nb_abi_version": (c_int32, []),
    "nb_isas": (c_char_p, []),
    "nb_pool_new": (c_void_p, [c_int32, c_char_p]),
    "nb_pool_free": (None, [c_void_p]),
    "nb_forward": (None, [c_void_p, POINTER(NbModel), POINTER(NbBatch), c_void_p]),
    "nb_logits": (None, [c_void_p, POINTER(NbModel), c_void_p, c_int32, c_void_p]),
    "nb_linear": (None, [c_void_p, POINTER(NbLinearGroup), c_void_p, c_int32, c_void_p]),
}


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason why there is none."""
    if not LIBRARY.is_file():
        return None, f"the C++ kernels are not built: {_HOW_TO_BUILD}"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"the C++ kernels do not load ({error}): {_HOW_TO_BUILD}"
    if library.nb_abi_version() != _ABI_VERSION or source_hash() not in (
        None,
        library.nb_build().decode(),
    ):
        return None, f"the C++ kernels were built from other sources than these: {_HOW_TO_BUILD}"
    if not library.nb_isas():
        return None, _NEEDED_CPU[architecture()]
    return library, ""


def why_missing() -> str | None:
    """None where the C++ kernels can be used, else the reason and what to do."""
    return _load()[1] or None


def library() -> ctypes.CDLL:
    found, reason = _load()
    if found is None:
        raise UserError(reason)
    return found


def instruction_sets() -> list[str]:
    """What this machine can run, best first; empty where the library is missing."""
    found, _ = _load()
    return found.nb_isas().decode().split(",") if found is not None else []


class Pool:
    """Threads that run the kernels of one instruction set. They sleep while there is nothing to do."""

    def __init__(self, threads: int, isa: str = "auto"):
        """Raises UserError where the machine has no such instruction set."""
        known = instruction_sets()
        self.isa = known[0] if isa == "auto" and known else isa
        self.threads = threads
        self.library = library()
        self.handle = self.library.nb_pool_new(threads, self.isa.encode())
        if not self.handle:
            raise UserError(f"--cpu-isa {isa!r} is not one of this machine's: {', '.join(known)}")
        weakref.finalize(self, self.library.nb_pool_free, self.handle)
