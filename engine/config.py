"""EngineConfig: everything the engine is told at start-up, frozen. `auto` values are decided once, when it
loads, and reported in the `Ready` message; nothing else reads flags or the environment. Importing this needs no torch.
"""

import msgspec

from ..quant.locate import is_hub_id


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """As given by the user. None or "auto" means: decide from the checkpoint and the machine."""

    model: str  # local folder, .gguf file or Hub id
    revision: str | None = None
    quantize: str | None = None  # int4, int8, fp8: quantize a 16-bit checkpoint while it loads
    save_quantized: str | None = None  # a folder to keep the result of `quantize` in
    dtype: str = "auto"  # auto, bfloat16, float16, float32
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    max_model_len: int | None = None  # tokens; None: the checkpoint's, bounded by the KV cache
    max_num_seqs: int = 64  # requests in one step
    max_num_batched_tokens: int = 2048  # tokens in one step; longer prompts are computed in chunks
    kv_cache_memory: int | None = None  # bytes; None: planned from free memory
    kv_cache_dtype: str = (
        "auto"  # auto: the activations'; int8, fp8 (CUDA): a scale for each token and head
    )
    block_size: int = 16  # tokens a KV block
    enable_prefix_caching: bool = True
    num_threads: int | None = None  # CPU threads; None: torch's choice
    cpu_isa: str = (
        "auto"  # C++ kernels: auto, avx512bf16, avx512vnni, avxvnni, avx2, neon, or none (torch)
    )
    cpu_activations: str = (
        "int8"  # what integer weights are multiplied with on a CPU: int8 (by group) or bf16
    )
    lm_head_bits: int | None = (
        None  # of a 16-bit output head in the CPU kernels: 8, 16; None: 8 beside 4-bit weights
    )
    prepared_cache: str | None = (
        "~/.cache/nibble"  # weights in the CPU kernels' layout; None: nothing is kept
    )
    seed: int = 0  # for requests that bring none

    @property
    def is_from_hub(self) -> bool:
        """Whether `model` is a Hub id, which may have to be downloaded."""
        return is_hub_id(self.model)
