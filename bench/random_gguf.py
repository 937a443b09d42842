"""Models of random weights as GGUF files, which Nibble and llama.cpp both serve as they are.

    python bench/random_gguf.py SHAPE TOKENIZER.gguf OUT.gguf      (needs the package `gguf`)

    llama    TinyLlama-1.1B, Q4_0
    olmoe    OLMoE-7B-A1B: 64 experts of 1024, 8 for a token, Q4_0
    qwen35   Qwen3.5-0.8B: a gated delta rule in three layers of four, Q4_0
    gpt-oss  GPT-OSS-20B with a quarter of its experts, in MXFP4, the rest in Q8_0

Each with the vocabulary of TOKENIZER.gguf. The values mean nothing; the scales are such that activations neither die
nor explode.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFValueType, GGUFWriter, RopeScalingType

BLOCK_BYTES = {Kind.Q4_0: 18, Kind.Q8_0: 34, Kind.MXFP4: 17}  # of 32 weights
DEVIATION = {Kind.Q4_0: 4.6, Kind.Q8_0: 74.0, Kind.MXFP4: 3.3}  # of uniform codes
Shape = tuple[int, ...]


@dataclass(slots=True)
class Model:
    """What is written: metadata, matrices in blocks and tensors in float32, by GGUF name."""

    arch: str
    sizes: dict[str, int | float]  # metadata, without the architecture before them
    matrices: dict[str, tuple[Shape, Kind]] = field(default_factory=dict)
    plain: dict[str, np.ndarray] = field(default_factory=dict)

    def block(self, layer: int, kind: Kind, **shapes: Shape) -> None:
        self.matrices |= {f"blk.{layer}.{name}": (shape, kind) for name, shape in shapes.items()}

    def vectors(self, layer: int, value: float, **shapes: int | Shape) -> None:
        """Names with "__" for the dot before their ending; all else are norms' weights."""
        for name, shape in shapes.items():
            full = name.replace("__", ".") if "__" in name else f"{name}.weight"
            self.plain[f"blk.{layer}.{full}"] = np.full(shape, value, np.float32)


def llama() -> Model:
    hidden, ffn, layers, heads, kv_heads = 2048, 5632, 22, 32, 4
    model = Model("llama", _sizes(hidden, ffn, layers, heads, kv_heads, hidden // heads))
    kv = hidden // heads * kv_heads
    for layer in range(layers):
        model.block(layer, Kind.Q4_0, **_attention(hidden, hidden, kv), **_mlp(hidden, ffn))
        model.vectors(layer, 1.0, attn_norm=hidden, ffn_norm=hidden)
    return model


def olmoe() -> Model:
    hidden, inner, layers, heads, experts = 2048, 1024, 16, 16, 64
    sizes = _sizes(hidden, inner, layers, heads, heads, hidden // heads)
    model = Model("olmoe", sizes | {"expert_count": experts, "expert_used_count": 8})
    for layer in range(layers):
        model.block(layer, Kind.Q4_0, **_attention(hidden, hidden, hidden))
        model.block(layer, Kind.Q4_0, **_experts(hidden, inner, experts))
        model.vectors(layer, 1.0, attn_norm=hidden, ffn_norm=hidden)
        model.vectors(layer, 1.0, attn_q_norm=hidden, attn_k_norm=hidden)
        _router(model, layer, experts, hidden)
    return model


def qwen35() -> Model:
    hidden, ffn, layers, heads, kv_heads, dim = 1024, 3584, 24, 8, 2, 256
    delta_heads, delta_dim, taps = 16, 128, 4
    inner = delta_heads * delta_dim
    sizes = _sizes(hidden, ffn, layers, heads, kv_heads, dim)
    sizes |= {"ssm.conv_kernel": taps, "ssm.state_size": delta_dim, "ssm.inner_size": inner}
    sizes |= {"ssm.group_count": delta_heads, "ssm.time_step_rank": delta_heads}
    sizes |= {"full_attention_interval": 4, "rope.dimension_count": dim // 4}
    model = Model("qwen35", sizes)
    for layer in range(layers):
        model.block(layer, Kind.Q4_0, **_mlp(hidden, ffn))
        model.vectors(layer, 1.0, attn_norm=hidden, post_attention_norm=hidden)
        if layer % 4 == 3:
            attention = _attention(hidden, heads * dim, kv_heads * dim)
            model.block(layer, Kind.Q4_0, **attention | {"attn_q": (2 * heads * dim, hidden)})
            model.vectors(layer, 1.0, attn_q_norm=dim, attn_k_norm=dim)
            continue
        model.block(layer, Kind.Q4_0, attn_qkv=(3 * inner, hidden), attn_gate=(inner, hidden))
        model.block(layer, Kind.Q4_0, ssm_out=(hidden, inner))
        model.block(
            layer, Kind.Q8_0, ssm_alpha=(delta_heads, hidden), ssm_beta=(delta_heads, hidden)
        )
        model.vectors(layer, 1.0, ssm_norm=delta_dim, ssm_dt__bias=delta_heads)
        model.plain[f"blk.{layer}.ssm_a"] = np.full(delta_heads, -0.5, np.float32)
        model.vectors(layer, 0.25, ssm_conv1d=(3 * inner, taps))
    return model


def gpt_oss() -> Model:
    hidden, inner, layers, heads, kv_heads, dim, experts = 2880, 2880, 24, 64, 8, 64, 8
    sizes = _sizes(hidden, inner, layers, heads, kv_heads, dim)
    sizes |= {"expert_count": experts, "expert_used_count": 4, "expert_feed_forward_length": inner}
    sizes |= {"attention.sliding_window": 128, "rope.scaling.factor": 32.0}
    model = Model("gpt-oss", sizes | {"rope.scaling.original_context_length": 4096})
    queries, keys = heads * dim, kv_heads * dim
    for layer in range(layers):
        model.block(layer, Kind.Q8_0, **_attention(hidden, queries, keys))
        model.block(layer, Kind.MXFP4, **_experts(hidden, inner, experts))
        model.vectors(layer, 1.0, attn_norm=hidden, post_attention_norm=hidden)
        model.vectors(layer, 0.0, attn_q__bias=queries, attn_k__bias=keys, attn_v__bias=keys)
        model.vectors(layer, 0.0, attn_output__bias=hidden, attn_sinks=heads)
        model.vectors(layer, 0.0, ffn_gate_inp__bias=experts, ffn_down_exps__bias=(experts, hidden))
        inside = (experts, inner)
        model.vectors(layer, 0.0, ffn_gate_exps__bias=inside, ffn_up_exps__bias=inside)
        _router(model, layer, experts, hidden)
    return model


SHAPES: dict[str, Callable[[], Model]] = {
    "llama": llama,
    "olmoe": olmoe,
    "qwen35": qwen35,
    "gpt-oss": gpt_oss,
}


def _sizes(
    hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, dim: int
) -> dict[str, int | float]:
    return {
        "context_length": 32768,
        "embedding_length": hidden,
        "block_count": layers,
        "feed_forward_length": ffn,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": dim,
        "attention.value_length": dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": dim,
        "rope.freq_base": 10000.0,
    }


def _attention(hidden: int, queries: int, keys: int) -> dict[str, Shape]:
    each = {"attn_q": (queries, hidden), "attn_output": (hidden, queries)}
    return each | {"attn_k": (keys, hidden), "attn_v": (keys, hidden)}


def _mlp(hidden: int, ffn: int) -> dict[str, Shape]:
    return {"ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden), "ffn_down": (hidden, ffn)}


def _experts(hidden: int, inner: int, count: int) -> dict[str, Shape]:
    return {f"{name}_exps": (count, *shape) for name, shape in _mlp(hidden, inner).items()}


def _router(model: Model, layer: int, experts: int, hidden: int) -> None:
    draw = np.random.default_rng(layer)
    matrix = draw.normal(size=(experts, hidden), scale=hidden**-0.5)
    model.plain[f"blk.{layer}.ffn_gate_inp.weight"] = matrix.astype(np.float32)


def random_blocks(draw: np.random.Generator, shape: Shape, kind: Kind) -> np.ndarray:
    """uint8[..., bytes of a row]."""
    *rows, columns = shape
    blocks = draw.integers(0, 256, (*rows, columns // 32, BLOCK_BYTES[kind]), dtype=np.uint8)
    scale = 1 / (DEVIATION[kind] * columns**0.5)
    if kind == Kind.MXFP4:
        blocks[..., 0] = 128 + round(np.log2(scale))
    else:
        blocks[..., :2] = np.array([scale], dtype="<f2").view(np.uint8)
    return blocks.reshape(*rows, -1)


def write(shape: str, tokenizer: Path, out: Path) -> None:
    model, draw = SHAPES[shape](), np.random.default_rng(0)
    writer = GGUFWriter(out, model.arch)
    vocab = _copy_tokenizer(GGUFReader(tokenizer), writer)
    for name, value in model.sizes.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{model.arch}.{name}", value)
    if model.arch == "gpt-oss":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
    if model.arch == "qwen35":
        writer.add_rope_dimension_sections([11, 11, 10, 0])
    hidden = int(model.sizes["embedding_length"])
    kind = Kind.Q8_0 if model.arch == "gpt-oss" else Kind.Q4_0
    ends = dict.fromkeys(("token_embd", "output"), ((vocab, hidden), kind))
    for name, (sizes, own) in (ends | model.matrices).items():
        writer.add_tensor(f"{name}.weight", random_blocks(draw, sizes, own), raw_dtype=own)
    model.plain["output_norm.weight"] = np.ones(hidden, np.float32)
    for name, array in model.plain.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_tokenizer(source: GGUFReader, writer: GGUFWriter) -> int:
    """Copy everything under `tokenizer.`; the number of tokens."""
    for each in source.fields.values():
        if each.name.startswith("tokenizer."):
            kind = each.types[0]
            writer.add_key_value(
                each.name,
                each.contents(),
                kind,
                each.types[-1] if kind == GGUFValueType.ARRAY else None,
            )
    return len(source.fields["tokenizer.ggml.tokens"].data)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
