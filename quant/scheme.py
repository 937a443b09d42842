"""QuantScheme: how a checkpoint is quantized, the only reader and writer of `quantization_config`.

A scheme is frozen and complete: a LayerScheme for a typical layer, overrides by module name, and the modules that stay
dense. `from_config` understands every spelling on disk (`quant_method` awq, gptq, fp8, compressed-tensors, hqq,
modelopt, and the side files quantize_config.json, quant_config.json and hf_quant_config.json, passed in as the same
dict); `to_config` writes the spelling that transformers and vLLM read.
"""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from . import config_fields as fields

_KV_FP8 = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "dynamic": False,
    "symmetric": True,
}
GROUP_MIN = 16  # columns a scale, at the least: fewer cost more in scales than they gain
EMBEDDINGS = ("embed_tokens", "embeddings")  # what models call their table of tokens
Method = Literal["awq", "gptq", "fp8", "compressed-tensors", "hqq", "modelopt", "gguf"]
ActQuant = Literal["none", "token", "group", "tensor"]
Strategy = Literal["tensor", "channel", "group", "block"]


@dataclass(frozen=True, slots=True)
class LayerScheme:
    """How one linear layer is quantized."""

    kind: Literal["int", "fp8", "fp4"]
    bits: int
    group_size: int  # input columns per scale; -1: the whole row
    symmetric: bool
    desc_act: bool = False
    block: tuple[int, int] | None = None  # FP8 block scales, e.g. (128, 128); None: see strategy
    strategy: Strategy = "group"
    act_quant: ActQuant = "none"

    def describe(self) -> str:
        """Such as "int4 g64 asym" or "fp8 channel, token activations"."""
        if self.kind == "fp8":
            text = (
                f"fp8 block {self.block[0]}x{self.block[1]}"
                if self.block
                else f"fp8 {self.strategy}"
            )
        elif self.kind == "fp4":
            text = f"fp4 g{self.group_size}"
        else:
            group = "channel" if self.group_size == -1 else f"g{self.group_size}"
            text = f"int{self.bits} {group} {'sym' if self.symmetric else 'asym'}" + (
                " act-order" * self.desc_act
            )
        return text if self.act_quant == "none" else f"{text}, {self.act_quant} activations"


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """How one checkpoint is quantized."""

    method: Method
    format: str  # awq: "gemm", ...; gptq: "gptq" (v1), "gptq_v2", ...; compressed-tensors: "pack-quantized", ...
    default: LayerScheme | None
    overrides: tuple[
        tuple[str, LayerScheme | None], ...
    ] = ()  # (regex on the module name, scheme); None: dense
    ignore: tuple[str, ...] = ()  # module names, or "re:..." patterns, that stay dense
    lm_head: bool = False
    kv_cache: Literal["fp8"] | None = (
        None  # k_scale and v_scale beside the projections, for an FP8 cache
    )
    raw: dict[str, Any] = field(default_factory=dict, compare=False)  # as read; for the model card

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QuantScheme":
        """Read a `quantization_config` (or the content of an older side file, with its quant_method set).

        Raises UnsupportedError naming the field for anything Nibble does not do or cannot make sense of.
        """
        method = str(config.get("quant_method", "")).lower()
        readers = {
            "awq": _read_awq,
            "gptq": _read_gptq,
            "fp8": _read_fp8,
            "compressed-tensors": _read_ct,
            "modelopt": _read_modelopt,
            "hqq": _read_hqq,
            "auto-round": _read_auto_round,
            "mxfp4": _read_mxfp4,
        }
        if method not in readers:
            raise fields.unsupported("quant_method", method, f" ({', '.join(readers)} are)")
        return cls(**{"method": method, "raw": config} | readers[method](config))

    def to_config(self) -> dict[str, Any]:
        """The `quantization_config` that transformers and vLLM read. Raises ValueError if the format cannot say it."""
        writers = {
            "awq": _write_awq,
            "gptq": _write_gptq,
            "fp8": _write_fp8,
            "compressed-tensors": _write_ct,
        }
        if self.method not in writers:
            raise ValueError(f"{self.method} has no quantization_config")
        return writers[self.method](self)

    def layer(self, module: str) -> LayerScheme | None:
        """The scheme of a linear module by its full name ("model.layers.0.mlp.up_proj"); None: it stays dense."""
        if any(_names(pattern, module) for pattern in self.ignore):
            return None
        for pattern, scheme in self.overrides:
            if re.match(pattern, module):
                return scheme
        leaf = module.rpartition(".")[2]
        if leaf in EMBEDDINGS or (leaf == "lm_head" and not self.lm_head):
            return None
        return self.default

    def describe(self) -> str:
        """One line for people, such as "awq int4 g64 asym"."""
        if self.method == "gguf":
            return f"gguf {self.format}"
        others = sum(scheme is not None for _, scheme in self.overrides)
        name = self.default.describe() if self.default else "mixed"
        prefix = "" if self.method == "fp8" else f"{self.method} "
        return f"{prefix}{name}" + (f", {others} layers otherwise" if others else "")


def fitting_group(group_size: int, width: int) -> int | None:
    """The wished group size, halved until it divides the width, down to GROUP_MIN; None where none does.

    group_size -1: the whole row.
    """
    if group_size == -1:
        return width
    size = group_size
    while width % size and size % 2 == 0 and size // 2 >= GROUP_MIN:
        size //= 2
    return size if width % size == 0 else None


def exactly(module: str) -> str:
    """The override pattern that matches this module name alone."""
    return re.escape(module) + "$"


def modules_of(parts: Sequence[str], by_name: bool) -> list[str]:
    """`ignore` entries for all modules of these parts of a model, which transformers of before and after 5.0 name with
    and without "model.". by_name: for configs that list names (vLLM looks for them anywhere in a module's, transformers
    at its beginning), not patterns."""
    if by_name:
        return [name for part in parts for name in (part, f"model.{part}")]
    return [rf"re:(model\.)?{re.escape(part)}\..*" for part in parts]


def _names(pattern: str, module: str) -> bool:
    """Whether an ignore entry means the module: "re:..." matches from the start, a name as whole dotted parts."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return f".{pattern}." in f".{module}."


def _read_awq(config: dict[str, Any]) -> dict[str, Any]:
    version = fields.get(config, str, "gemm", "version", "format").lower()
    if version not in ("gemm", "gemv", "gemv_fast", "marlin"):
        raise fields.unsupported("version", version, " (gemm, gemv, gemv_fast and marlin are)")
    layer = LayerScheme(
        kind="int",
        bits=fields.bits(config, (4,), "bits", "w_bit"),
        group_size=fields.group_size(config, 128, "group_size", "q_group_size"),
        symmetric=not fields.get(config, bool, True, "zero_point"),
    )
    ignore = fields.strings(config, "modules_to_not_convert")
    lm_head = fields.get(config, bool, False, "lm_head")
    return {"format": version, "default": layer, "ignore": ignore, "lm_head": lm_head}


def _write_awq(scheme: QuantScheme) -> dict[str, Any]:
    layer = _only_layer(scheme)
    config = {
        "quant_method": "awq",
        "bits": layer.bits,
        "group_size": layer.group_size,
        "zero_point": not layer.symmetric,
        "version": scheme.format,
        "modules_to_not_convert": list(scheme.ignore) or None,
    }
    return config | ({"lm_head": True} if scheme.lm_head else {})


def _read_hqq(config: dict[str, Any]) -> dict[str, Any]:
    """One set of parameters, or one for each kind of linear ("self_attn.q_proj")."""
    params = fields.get(config, dict, {}, "quant_config")
    if "weight_quant_params" in params:
        return {
            "format": "hqq",
            "default": _hqq_layer(params),
            "ignore": fields.strings(config, "skip_modules"),
        }
    overrides = tuple(
        (rf".*\.{re.escape(name)}$", _hqq_layer(each)) for name, each in params.items()
    )
    return {
        "format": "hqq",
        "default": None,
        "overrides": overrides,
        "ignore": fields.strings(config, "skip_modules"),
    }


def _hqq_layer(params: Any) -> LayerScheme:
    if not isinstance(params, dict) or not isinstance(
        weights := params.get("weight_quant_params"), dict
    ):
        raise fields.unsupported("quant_config", params)
    for nested in ("scale_quant_params", "zero_quant_params"):
        if params.get(nested):
            raise fields.unsupported(
                nested, params[nested], " (scales and zero points must be floats)"
            )
    bits = fields.bits(weights, (1, 2, 3, 4, 5, 6, 8), "nbits")
    return LayerScheme("int", bits, fields.group_size(weights, -1, "group_size"), symmetric=False)


def _read_gptq(config: dict[str, Any]) -> dict[str, Any]:
    old = "marlin" if config.get("is_marlin_format") else "gptq"  # AutoGPTQ 0.6 and 0.7
    fmt = fields.get(config, str, old, "checkpoint_format", "format").lower()
    if fmt not in ("gptq", "gptq_v2", "marlin"):
        raise fields.unsupported("checkpoint_format", fmt, " (gptq, gptq_v2 and marlin are)")
    layer = _gptq_layer(config)
    overrides = []
    for key, changes in fields.get(config, dict, {}, "dynamic").items():
        skip = key.startswith("-:")
        pattern = fields.checked_regex(key.removeprefix("-:").removeprefix("+:"), "dynamic")
        overrides.append((pattern, None if skip else _gptq_layer(config | (changes or {}))))
    return {
        "format": fmt,
        "default": layer,
        "overrides": tuple(overrides),
        "lm_head": fields.get(config, bool, False, "lm_head"),
    }


def _gptq_layer(config: dict[str, Any]) -> LayerScheme:
    return LayerScheme(
        kind="int",
        bits=fields.bits(config, (2, 3, 4, 8), "bits"),
        group_size=fields.group_size(config, 128, "group_size"),
        symmetric=fields.get(config, bool, True, "sym"),
        desc_act=fields.get(config, bool, False, "desc_act"),
    )


def _write_gptq(scheme: QuantScheme) -> dict[str, Any]:
    layer = scheme.default
    if layer is None or scheme.format == "marlin":
        raise ValueError(
            "a gptq checkpoint states one scheme and its exceptions, and is not written as marlin"
        )
    dynamic: dict[str, Any] = {
        f"-:{_as_regex(name)}": {} for name in scheme.ignore if name != "lm_head"
    }
    for pattern, other in scheme.overrides:
        dynamic[f"{'-' if other is None else '+'}:{pattern}"] = (
            {} if other is None else _gptq_keys(other)
        )
    config = {
        "quant_method": "gptq",
        **_gptq_keys(layer),
        "lm_head": scheme.lm_head,
        "checkpoint_format": scheme.format,
        "pack_dtype": "int32",
        "static_groups": False,
        "true_sequential": True,
    }
    extra = {"dynamic": dynamic} if dynamic else {}
    return config | extra | ({"meta": scheme.raw["meta"]} if "meta" in scheme.raw else {})


def _gptq_keys(layer: LayerScheme) -> dict[str, Any]:
    return {
        "bits": layer.bits,
        "group_size": layer.group_size,
        "desc_act": layer.desc_act,
        "sym": layer.symmetric,
    }


# How AutoRound packs its tensors, and where: zero points less one as GPTQ's first version, or as they are
_AUTO_ROUND = {
    "auto_round:auto_gptq": ("gptq", "gptq"),
    "auto_round:gptqmodel": ("gptq", "gptq_v2"),
    "auto_round": ("gptq", "gptq_v2"),
    "auto_round:auto_awq": ("awq", "gemm"),
}


def _read_auto_round(config: dict[str, Any]) -> dict[str, Any]:
    """AutoRound's own: one LayerScheme, and in extra_config what differs, by a module's name or a regex."""
    packing = fields.get(config, str, "auto_round:auto_gptq", "packing_format", "backend")
    if packing not in _AUTO_ROUND:
        raise fields.unsupported("packing_format", packing, f" ({', '.join(_AUTO_ROUND)} are)")
    method, fmt = _AUTO_ROUND[packing]
    overrides = []
    for name, changes in fields.get(config, dict, {}, "extra_config").items():
        layer = _auto_round_layer(config | (changes if isinstance(changes, dict) else {}))
        known = re.fullmatch(r"[\w.]+", name) is not None
        pattern = exactly(name) if known else fields.checked_regex(name, "extra_config")
        overrides.append((pattern, layer))
    lm_head = any(re.match(pattern, "lm_head") and layer for pattern, layer in overrides)
    return {
        "method": method,
        "format": fmt,
        "default": _auto_round_layer(config),
        "overrides": tuple(overrides),
        "lm_head": lm_head,
    }


def _auto_round_layer(config: dict[str, Any]) -> LayerScheme | None:
    """None: 16 bits."""
    if config.get("bits") in (16, 32):
        return None
    if (kind := fields.get(config, str, "int", "data_type")) != "int":
        raise fields.unsupported("data_type", kind, " (int is)")
    return LayerScheme(
        "int",
        fields.bits(config, (2, 3, 4, 8), "bits"),
        fields.group_size(config, 128, "group_size"),
        fields.get(config, bool, True, "sym"),
    )


def _read_mxfp4(config: dict[str, Any]) -> dict[str, Any]:
    """GPT-OSS's: experts in MXFP4, all else in 16 bits."""
    return {
        "method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "default": LayerScheme("fp4", 4, 32, True),
        "ignore": fields.strings(config, "modules_to_not_convert"),
    }


def _read_fp8(config: dict[str, Any]) -> dict[str, Any]:
    block = fields.get(config, list, None, "weight_block_size")
    activations = fields.get(config, str, "dynamic", "activation_scheme")
    if activations not in ("dynamic", "static"):
        raise fields.unsupported("activation_scheme", activations, " (dynamic and static are)")
    if activations == "static":
        act_quant: ActQuant = "tensor"
    else:
        act_quant = "group" if block else "token"
    layer = _fp8_layer("block" if block else "tensor", block, act_quant)
    ignore = fields.strings(config, "modules_to_not_convert", "ignored_layers")
    return {"format": "fp8", "default": layer, "ignore": ignore}


def _fp8_layer(strategy: Strategy, block: Any, act_quant: ActQuant) -> LayerScheme:
    if block is not None and (
        len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block)
    ):
        raise fields.unsupported("weight_block_size", block, " (want two positive integers)")
    return LayerScheme(
        "fp8",
        8,
        block[1] if block else -1,
        True,
        strategy=strategy,
        act_quant=act_quant,
        block=tuple(block) if block else None,
    )


def _read_modelopt(config: dict[str, Any]) -> dict[str, Any]:
    """hf_quant_config.json, whose keys lie under "quantization", or the same in config.json (TensorRT ModelOpt)."""
    keys = fields.get(config, dict, config, "quantization")
    algorithm = fields.get(keys, str, "", "quant_algo").upper()
    default, overrides = None, []
    if algorithm == "MIXED_PRECISION":  # an algorithm for each module, 16 bits where none is named
        for name, own in fields.get(keys, dict, {}, "quantized_layers").items():
            each = fields.get(own, str, "", "quant_algo").upper() if isinstance(own, dict) else ""
            overrides.append((exactly(name), _modelopt_layer(each)))
    else:
        default = _modelopt_layer(algorithm)
    skipped = fields.get(keys, list, [], "exclude_modules", "ignore")
    ignore = tuple(f"re:{fnmatch.translate(str(item))}" for item in skipped)
    cache = fields.get(keys, str, None, "kv_cache_quant_algo")
    fp8_cache = str(cache).upper() == "FP8" or _kv_cache(keys) == "fp8"
    return {
        "method": "modelopt",
        "format": "modelopt",
        "default": default,
        "overrides": tuple(overrides),
        "ignore": ignore,
        "kv_cache": "fp8" if fp8_cache else None,
    }


def _modelopt_layer(algorithm: str) -> LayerScheme:
    layers: dict[str, tuple[Strategy, Any, ActQuant]] = {
        "FP8": ("tensor", None, "tensor"),
        "FP8_PER_CHANNEL_PER_TOKEN": ("channel", None, "token"),
        "FP8_PB_WO": ("block", [128, 128], "none"),
    }
    if algorithm in ("NVFP4", "W4A16_NVFP4"):
        return LayerScheme("fp4", 4, 16, True)
    if algorithm not in layers:
        known = ", ".join(("MIXED_PRECISION", "NVFP4", *layers))
        raise fields.unsupported("quant_algo", algorithm, f" ({known} are)")
    return _fp8_layer(*layers[algorithm])


def _kv_cache(config: dict[str, Any]) -> Literal["fp8"] | None:
    """kv_cache_scheme: FP8 with a scale per layer, or nothing; other schemes are left to the cache's own precision."""
    scheme = fields.get(config, dict, {}, "kv_cache_scheme")
    return "fp8" if scheme.get("type") == "float" and scheme.get("num_bits") == 8 else None


def _write_fp8(scheme: QuantScheme) -> dict[str, Any]:
    layer = _only_layer(scheme)
    return {
        "quant_method": "fp8",
        "activation_scheme": "static" if layer.act_quant == "tensor" else "dynamic",
        "weight_block_size": list(layer.block) if layer.block else None,
        "modules_to_not_convert": list(scheme.ignore) or None,
    }


def _read_ct(config: dict[str, Any]) -> dict[str, Any]:
    sparsity = fields.get(config, dict, {}, "sparsity_config").get("format", "dense")
    if sparsity != "dense":
        raise fields.unsupported("sparsity_config.format", sparsity)
    default, overrides = None, []
    for name, group in fields.get(config, dict, {}, "config_groups").items():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise fields.unsupported(f"config_groups.{name}", group, " (want weights)")
        layer = _ct_layer(group["weights"], group.get("input_activations"))
        for target in fields.strings(group, "targets"):
            if target in ("Linear", "torch.nn.Linear"):
                default = layer
            else:
                overrides.append((_as_regex(target), layer))
    if default is None and not overrides:
        raise fields.unsupported(
            "config_groups", config.get("config_groups"), " (no group of weights)"
        )
    return {
        "format": fields.get(config, str, "pack-quantized", "format"),
        "default": default,
        "lm_head": True,
        "overrides": tuple(overrides),
        "ignore": fields.strings(config, "ignore"),
        "kv_cache": _kv_cache(config),
    }


def _ct_layer(weights: dict[str, Any], inputs: dict[str, Any] | None) -> LayerScheme:
    strategy = fields.get(weights, str, "tensor", "strategy")
    kind = fields.get(weights, str, "int", "type")
    if kind == "float" and weights.get("num_bits") == 4:  # activations stay in 16 bits
        return LayerScheme("fp4", 4, fields.group_size(weights, 16, "group_size"), True)
    if strategy not in ("tensor", "channel", "group", "block"):
        raise fields.unsupported("weights.strategy", strategy)
    act_quant: Any = "none" if inputs is None else fields.get(inputs, str, "tensor", "strategy")
    if act_quant not in ("none", "token", "group", "tensor"):
        raise fields.unsupported("input_activations.strategy", act_quant)
    if kind == "float" and fields.bits(weights, (8,), "num_bits"):
        block = fields.get(weights, list, None, "block_structure") if strategy == "block" else None
        return _fp8_layer(strategy, block, act_quant)
    if kind != "int":
        raise fields.unsupported("weights.type", kind)
    return LayerScheme(
        kind="int",
        bits=fields.bits(weights, (4, 8), "num_bits"),
        group_size=fields.group_size(weights, -1, "group_size") if strategy == "group" else -1,
        symmetric=fields.get(weights, bool, True, "symmetric"),
        strategy=strategy,
        act_quant=act_quant,
    )


def _write_ct(scheme: QuantScheme) -> dict[str, Any]:
    targets: dict[LayerScheme, list[str]] = {scheme.default: ["Linear"]} if scheme.default else {}
    ignore = list(scheme.ignore) + (
        [] if scheme.lm_head or "lm_head" in scheme.ignore else ["lm_head"]
    )
    for pattern, layer in scheme.overrides:
        if layer is None:
            ignore.append(f"re:{pattern}")
        else:
            targets.setdefault(layer, []).append(f"re:{pattern}")
    groups = {
        f"group_{i}": _ct_group(layer, names) for i, (layer, names) in enumerate(targets.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": _KV_FP8 if scheme.kv_cache else None,
    }


def _ct_group(layer: LayerScheme, targets: list[str]) -> dict[str, Any]:
    if layer.kind == "fp4":
        raise ValueError("FP4 is read, not written")
    number_type = "float" if layer.kind == "fp8" else "int"
    weights = {
        "num_bits": layer.bits,
        "type": number_type,
        "symmetric": layer.symmetric,
        "strategy": _ct_strategy(layer),
        "group_size": layer.group_size if _ct_strategy(layer) == "group" else None,
        "dynamic": False,
    }
    if layer.block:
        weights["block_structure"] = list(layer.block)
    inputs = None
    if layer.act_quant != "none":
        inputs = {
            "num_bits": 8,
            "type": number_type,
            "symmetric": True,
            "strategy": layer.act_quant,
            "group_size": layer.block[1] if layer.act_quant == "group" and layer.block else None,
            "dynamic": layer.act_quant != "tensor",
        }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }


def _ct_strategy(layer: LayerScheme) -> Strategy:
    return "channel" if layer.strategy == "group" and layer.group_size == -1 else layer.strategy


def _as_regex(target: str) -> str:
    return target[3:] if target.startswith("re:") else exactly(target)


def _only_layer(scheme: QuantScheme) -> LayerScheme:
    """The one LayerScheme of a method whose config has no way to name another."""
    if scheme.default is None or any(
        layer not in (None, scheme.default) for _, layer in scheme.overrides
    ):
        raise ValueError(f"a {scheme.method} checkpoint has one scheme for all its layers")
    if any(layer is None for _, layer in scheme.overrides):
        raise ValueError(
            f"a {scheme.method} checkpoint names its dense modules in `ignore`, not by pattern"
        )
    return scheme.default
