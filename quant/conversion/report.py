"""What a conversion tells while it runs and in the end: plain figures, kept in the journal and the card."""

from dataclasses import dataclass, field
from pathlib import Path

from .block_quantizer import BlockResult
from .calibration import Samples
from .plan import Plan
from .recipe import Recipe


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is, told after each block (and of measuring, after each window of text)."""

    block: int  # blocks, or windows, that are done
    blocks: int
    seconds: float  # since this run began
    error: (
        float | None
    )  # relative output error of the worst layer of the block; None where nothing was calibrated
    blocks_before: int = 0  # done by the runs that this one resumes
    doing: str = "Quantizing"
    unit: str = "blocks"

    @property
    def seconds_left(self) -> float | None:
        """None while nothing is done that could be timed."""
        done = self.block - self.blocks_before
        return self.seconds / done * (self.blocks - self.block) if done else None


@dataclass(frozen=True, slots=True)
class BlockReport:
    """What became of one block, as the journal keeps it."""

    seconds: float
    quantized_weights: int
    quantized_bytes: int
    layer_error: dict[str, float]
    fallbacks: dict[str, str]
    note: str

    @classmethod
    def of(cls, result: BlockResult, seconds: float) -> "BlockReport":
        weights = result.weights.values()
        return cls(
            seconds,
            sum(weight.codes.numel() for weight in weights),
            sum(weight.nbytes for weight in weights),
            result.layer_error,
            result.fallbacks,
            result.note,
        )


@dataclass(slots=True)
class Report:
    """What a conversion did, for the accuracy card."""

    source: Path
    recipe: Recipe
    plan: Plan
    samples: Samples | None
    source_scheme: str | None = None  # what the source itself was quantized to
    seconds: float = 0.0  # of quantizing, over all runs that took part
    bytes_before: int = 0
    bytes_after: int = 0
    quantized_weights: int = 0
    quantized_bytes: int = 0  # of those weights with their scales and zero points
    layer_error: dict[str, float] = field(
        default_factory=dict
    )  # |(W - Q) x|^2 / |W x|^2 on calibration inputs
    fallbacks: dict[str, str] = field(
        default_factory=dict
    )  # module -> why round-to-nearest was used
    notes: list[str] = field(default_factory=list)  # for people: what calibration lacked

    def add(self, block: "BlockReport") -> None:
        """Take in what became of a block."""
        self.seconds += block.seconds
        self.quantized_weights += block.quantized_weights
        self.quantized_bytes += block.quantized_bytes
        self.layer_error |= block.layer_error
        self.fallbacks |= block.fallbacks
        self.notes += [block.note] if block.note else []

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized layers."""
        return 8 * self.quantized_bytes / self.quantized_weights
