"""What the user asked for, checked against what the formats can hold before anything is read.

Invariant: a Recipe that exists can be written: its bits, group size, zero points and scales have a place in its target.
"""

from dataclasses import dataclass
from typing import Literal

from ...errors import UnsupportedError
from ..scheme import GROUP_MIN, LayerScheme

Method = Literal["awq", "gptq", "fp8"]
Target = Literal["awq", "gptq", "gptq_v2", "compressed-tensors", "fp8"]
FP8Scheme = Literal["channel", "tensor", "block"]
CALIB_SAMPLES = 24  # windows; more helps a little and costs in proportion
CALIB_SEQLEN = 512  # tokens a window
# The first of each is the default.
BITS = {"awq": (4,), "gptq": (4, 2, 3, 8), "fp8": (8,)}
TARGETS: dict[str, tuple[Target, ...]] = {
    "awq": ("awq", "compressed-tensors"),
    "gptq": ("gptq", "gptq_v2", "compressed-tensors"),
    "fp8": ("compressed-tensors", "fp8"),
}
FP8_LAYERS: dict[str, LayerScheme] = {
    "channel": LayerScheme("fp8", 8, -1, True, strategy="channel", act_quant="token"),
    "tensor": LayerScheme("fp8", 8, -1, True, strategy="tensor", act_quant="tensor"),
    "block": LayerScheme(
        "fp8", 8, 128, True, strategy="block", act_quant="group", block=(128, 128)
    ),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the user asked for, checked."""

    method: Method
    bits: int
    group_size: int
    symmetric: bool
    target: Target  # the format that is written
    fp8_scheme: FP8Scheme = "channel"
    kv_scales: bool = False  # scales for an FP8 KV cache beside the weights
    desc_act: bool = False  # groups of columns of like importance, wherever these are
    auto_bits: float | None = (
        None  # bits per weight on average, chosen layer by layer; then `bits` is only the default
    )

    @classmethod
    def of(
        cls,
        method: Method,
        bits: int | None = None,
        group_size: int = 128,
        symmetric: bool | None = None,
        *,
        target: Target | None = None,
        fp8_scheme: FP8Scheme | None = None,
        kv_scales: bool = False,
        desc_act: bool = False,
        auto_bits: float | None = None,
    ) -> "Recipe":
        """Fill in the method's defaults. Raises UnsupportedError for what the format cannot hold."""
        if method not in BITS:
            raise UnsupportedError(f"method {method!r} is not supported ({', '.join(BITS)} are)")
        if auto_bits is not None and bits is not None:
            raise UnsupportedError(
                "--auto-bits chooses the bits of each layer: give no --bits beside it"
            )
        if bits is None:
            bits = BITS[method][0]
        if bits not in BITS[method]:
            raise UnsupportedError(
                f"--bits {bits} is not possible with {method} "
                f"({', '.join(map(str, sorted(BITS[method])))} are)"
            )
        if group_size != -1 and (group_size < GROUP_MIN or group_size % GROUP_MIN):
            raise UnsupportedError(
                f"--group-size {group_size} is not possible (a multiple of {GROUP_MIN}, or -1)"
            )
        if fp8_scheme is not None and (method != "fp8" or fp8_scheme not in FP8_LAYERS):
            raise UnsupportedError(
                f"--fp8-scheme {fp8_scheme} is not possible with --{method} (with --fp8: "
                f"{', '.join(FP8_LAYERS)})"
            )
        symmetric = method != "awq" if symmetric is None else symmetric
        if method == "fp8":
            group_size, symmetric, fp8_scheme = -1, True, fp8_scheme or "channel"
        target = target or ("fp8" if fp8_scheme == "block" else TARGETS[method][0])
        recipe = cls(
            method,
            bits,
            group_size,
            symmetric,
            target,
            fp8_scheme or "channel",
            kv_scales,
            desc_act,
            auto_bits,
        )
        if problem := recipe._misfit():
            raise UnsupportedError(problem)
        return recipe

    @property
    def fp8_layer(self) -> LayerScheme:
        return FP8_LAYERS[self.fp8_scheme]

    @property
    def calibrated(self) -> bool:
        """Whether text has to run through the model."""
        return self.method != "fp8" or self.fp8_scheme == "tensor" or self.kv_scales

    @property
    def widths(self) -> tuple[int, ...]:
        """The bits that the format can give a layer, where it lets layers differ."""
        if self.method != "gptq":
            return (self.bits,)
        return (4, 8) if self.target == "compressed-tensors" else tuple(sorted(BITS["gptq"]))

    def _misfit(self) -> str | None:
        """Why the format cannot hold what was asked for, and what to ask for instead."""
        if self.target not in TARGETS[self.method]:
            return f"--to {self.target} is not possible with --{self.method} ({', '.join(TARGETS[self.method])} are)"
        if self.target == "fp8" and self.fp8_scheme == "channel":
            return "--to fp8 has no scale per channel: --fp8-scheme tensor or block, or --to compressed-tensors"
        if self.target == "compressed-tensors" and self.bits not in (4, 8):
            return f"--to compressed-tensors holds 4 and 8 bits, not {self.bits}: --to gptq"
        if self.desc_act and (self.target not in ("gptq", "gptq_v2") or self.group_size == -1):
            return "--desc-act needs --gptq in its own format, and groups: no other says which group a column is in"
        if self.auto_bits is not None and self.method != "gptq":
            return f"--auto-bits needs --gptq: layers of {self.method} all have {self.bits} bits"
        if self.auto_bits is not None and not self.widths[0] <= self.auto_bits <= self.widths[-1]:
            return (
                f"--auto-bits {self.auto_bits:g} is not possible: {self.target} holds "
                f"{', '.join(map(str, self.widths))} bits"
            )
        if self.kv_scales and self.target != "compressed-tensors":
            return f"--kv-scales needs --to compressed-tensors: {self.target} has no place for them"
        return None
