"""A Llama of about a billion random weights as one Q4_0 GGUF file, which Nibble and llama.cpp both serve as it is.

    python bench/random_gguf.py TOKENIZER.gguf OUT.gguf      (needs the package `gguf`)

TinyLlama-1.1B's shape, with the vocabulary of TOKENIZER.gguf and its own output head. The values mean nothing; the
scales are such that activations neither die nor explode.
"""

import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS = 2048, 5632, 22, 32, 4
BLOCK, BLOCK_BYTES = 32, 18  # Q4_0: a float16 scale, then 32 codes of 4 bits
SCALE = 1 / (4.6 * HIDDEN**0.5)  # uniform codes -8..7 have a deviation of 4.6
KV_WIDTH = HIDDEN // HEADS * KV_HEADS


def random_q4_0(draw: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """uint8[rows, bytes of a row]."""
    blocks = draw.integers(0, 256, (rows, columns // BLOCK, BLOCK_BYTES), dtype=np.uint8)
    blocks[..., :2] = np.array([SCALE], dtype="<f2").view(np.uint8)
    return blocks.reshape(rows, -1)


def write(tokenizer: Path, out: Path) -> None:
    writer, draw = GGUFWriter(out, "llama"), np.random.default_rng(0)
    vocab = _copy_tokenizer(GGUFReader(tokenizer), writer)
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_file_type(2)  # mostly Q4_0
    matrices = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (KV_WIDTH, HIDDEN),
        "attn_v": (KV_WIDTH, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (FFN, HIDDEN),
        "ffn_up": (FFN, HIDDEN),
        "ffn_down": (HIDDEN, FFN),
    }
    shapes = {"token_embd": (vocab, HIDDEN), "output": (vocab, HIDDEN)}
    shapes |= {
        f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in matrices.items()
    }
    for name, shape in shapes.items():
        writer.add_tensor(
            f"{name}.weight", random_q4_0(draw, *shape), raw_dtype=GGMLQuantizationType.Q4_0
        )
    norms = [f"blk.{layer}.{name}" for layer in range(LAYERS) for name in ("attn_norm", "ffn_norm")]
    for name in [*norms, "output_norm"]:
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_tokenizer(source: GGUFReader, writer: GGUFWriter) -> int:
    """Copy everything under `tokenizer.`; the number of tokens."""
    for field in source.fields.values():
        if field.name.startswith("tokenizer."):
            kind = field.types[0]
            writer.add_key_value(
                field.name,
                field.contents(),
                kind,
                field.types[-1] if kind == GGUFValueType.ARRAY else None,
            )
    return len(source.fields["tokenizer.ggml.tokens"].data)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
