"""EncoderRunner: owns an encoder on one device and computes batches of texts."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ...architectures.encoder import EncoderSpec
from ...architectures.encoders import encoder_spec
from ...errors import UserError
from ...quant.at_load import quantized_at_load
from ...quant.checkpoint import Checkpoint, open_checkpoint
from ..backends.base import KernelReport
from ..config import EngineConfig
from ..host_memory import gib
from ..memory import available
from ..messages import Ready
from ..pooler import Pooler, vectors
from ..pooling import EncoderFiles, Pooling, read_encoder_files
from ..runner import resolve_device, resolve_dtype
from .batch import EncoderBatch
from .linears import LinearBuilder
from .model import EncoderModel, Loader
from .weights import EncoderWeights


class EncoderRunner:
    """Loads config.model, then executes batches. Raises UserError on bad input."""

    def __init__(self, config: EngineConfig, progress: Callable[[str], None] | None = None):
        started = time.perf_counter()
        self.config = config
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        checkpoint = open_checkpoint(config.model, config.revision)
        files = read_encoder_files(checkpoint.path)
        self.spec = encoder_spec(_with_activation(checkpoint, files), checkpoint.names())
        self.device = resolve_device(config.device)
        self.dtype = _dtype(config, checkpoint, self.spec, self.device)
        self.pooler: Pooler | None = None
        if self.spec.classifier is None:
            self.pooler = Pooler.load(checkpoint.path, "mean", self.spec.hidden_size, self.device)
        self.max_model_len = _max_tokens(config, self.spec, files.max_seq_length)
        self.vocab_size = self.spec.vocab_size
        if progress is not None:
            progress("loading")
        self._load(checkpoint)
        self.task: Literal["embed", "score"] = "score" if self.pooler is None else "embed"
        self._check_sanity()
        self.load_seconds = time.perf_counter() - started

    def _load(self, checkpoint: Checkpoint) -> None:
        config = self.config
        self.report = KernelReport()
        with quantized_at_load(checkpoint, config.quantize, config.save_quantized) as reading:
            _check_fit(reading.nbytes, self.device)
            build = LinearBuilder(self.dtype, self.device, config, self.report)
            with torch.inference_mode():
                self.model: EncoderModel = Loader(EncoderWeights(reading, self.spec), build).load()
            self.weight_bytes = build.weight_bytes
            self.quantization = reading.scheme.describe() if reading.scheme else "none"

    def ready(self) -> Ready:
        return Ready(
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            eos_token_ids=[],
            num_blocks=0,
            block_size=0,
            dtype=str(self.dtype).split(".")[1],
            device=str(self.device),
            quantization=self.quantization,
            kernels=dict(self.report.used),
            ledger={"weights": self.weight_bytes, "activations": self._activation_bytes()},
            load_seconds=self.load_seconds,
            tasks=(self.task,),
            embedding=None if self.pooler is None else self.pooler.info,
        )

    def execute(
        self, texts: Sequence[list[int]], asked: Sequence[Pooling]
    ) -> Sequence[bytes | None]:
        """What each text is, little-endian float32, in order: its embedding, or of a cross-encoder its one score."""
        batch = EncoderBatch.of(texts, [each.second_part for each in asked], self.device)
        rows = self._pooled(batch)
        found = vectors(rows, [asked[i] for i in batch.order])
        answer: list[bytes | None] = [None] * len(found)
        for i, vector in zip(batch.order, found, strict=True):
            answer[i] = vector
        return answer

    @torch.inference_mode()
    def _pooled(self, batch: EncoderBatch) -> Tensor:
        """float32 [texts, dimensions], in the batch's order; of a cross-encoder [texts, 1]."""
        groups = batch.grouped(self.model(batch))
        pooler = self.pooler
        if pooler is None:
            return torch.cat([self.model.scores(group) for group in groups])
        return pooler.finish(torch.cat([pooler.pool(group) for group in groups]))

    def _check_sanity(self) -> None:
        """One measured pass: broken weights are found now, not by a user."""
        (found,) = self.execute([[0] * min(2, self.max_model_len)], [Pooling()])
        if found is None:
            raise UserError(
                f"the model's results are not finite in {self.dtype}; try --dtype float32, or check the checkpoint"
            )

    def _activation_bytes(self) -> int:
        """Of one step at most: what a layer holds at once, and what is added to the scores of the longest text."""
        spec = self.spec
        rows = max(self.config.max_num_batched_tokens, self.max_model_len)
        inner = spec.intermediate_size * (3 if spec.gated else 2)
        scores = spec.num_heads * self.max_model_len**2 if spec.relative_buckets else 0
        # which of them count, a byte each, of which torch makes a number each
        windows = 5 * self.max_model_len**2 if any(spec.windows) else 0
        of_rows = rows * (2 * spec.hidden_size + max(5 * spec.hidden_size, inner))
        return (of_rows + scores) * self.dtype.itemsize + windows


def _with_activation(checkpoint: Checkpoint, files: EncoderFiles) -> dict[str, Any]:
    """config.json, with what a newer file beside it says of a cross-encoder's score."""
    if files.activation is None:
        return checkpoint.config
    return checkpoint.config | {"sentence_transformers": {"activation_fn": files.activation}}


def _max_tokens(config: EngineConfig, spec: EncoderSpec, own: int | None) -> int:
    """The user's, within what the model was made for; else what its files say."""
    if config.max_model_len is None:
        return min(spec.max_tokens, own or spec.max_tokens)
    if config.max_model_len > spec.max_tokens:
        raise UserError(
            f"--max-model-len {config.max_model_len} is more than the {spec.max_tokens} tokens that the model takes"
        )
    return config.max_model_len


def _dtype(
    config: EngineConfig, checkpoint: Checkpoint, spec: EncoderSpec, device: torch.device
) -> torch.dtype:
    """float32 on a CPU, where 16 bits are not faster everywhere and encoders are small; 16 bits on a GPU: float16, the
    more exact ones, unless the weights are stored as the others. What config.json says of that is often nothing."""
    if config.dtype == "auto" and device.type == "cpu":
        return torch.float32
    table = f"{spec.prefix}{spec.names.word}.weight"
    stored = checkpoint.dtype(table) if checkpoint.has(table) else torch.float32
    if config.dtype == "auto" and stored is not torch.bfloat16:
        return torch.float16
    return resolve_dtype(config.dtype, checkpoint, device)


def _check_fit(weight_bytes: int, device: torch.device) -> None:
    room = available(device)
    if weight_bytes > room.free:
        raise UserError(
            f"loading the weights needs {gib(weight_bytes)}, {gib(room.free)} are free of {room.limit}; use a smaller "
            "or a quantized checkpoint, or raise the limit"
        )
