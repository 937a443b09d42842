"""A Llama of random weights as a checkpoint folder, in bf16, AWQ or FP8: for measuring speed without a download.

    python bench/random_llama.py OUT [--format awq] [--layers 32]

One layer is drawn, and written as every layer, a file each: what a product costs does not depend on its values. They
are such that activations neither die nor explode. The tokenizer knows 128256 tokens that mean nothing.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nibble.kernels.dequant_gemm.trial import Kind, random_weight
from nibble.quant.formats import awq

FORMATS = {
    "bf16": None,
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
    },
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
}
_WRITERS = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """Llama-3-8B's."""

    hidden: int = 4096
    inner: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 128256

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a layer's matrices."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }


def write(out: Path, fmt: str, shape: Shape, device: torch.device) -> None:
    """Write the checkpoint. Random numbers are drawn on `device`."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    layer = {
        f"{name}.{suffix}": tensor.cpu().contiguous()
        for name, size in shape.projections.items()
        for suffix, tensor in _projection(fmt, *size, device).items()
    }
    layer |= {
        f"{norm}.weight": torch.ones(shape.hidden, dtype=torch.bfloat16)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    files = {
        f"model-layer-{i:03d}.safetensors": {
            f"model.layers.{i}.{name}": t for name, t in layer.items()
        }
        for i in range(shape.layers)
    }
    files["model-ends.safetensors"] = {
        "model.embed_tokens.weight": _dense(shape.vocab, shape.hidden, device, 1.0).cpu(),
        "lm_head.weight": _dense(shape.vocab, shape.hidden, device, shape.hidden**-0.5).cpu(),
        "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
    }
    with ThreadPoolExecutor(_WRITERS) as pool:
        list(
            pool.map(
                lambda file: save_file(file[1], out / file[0], metadata={"format": "pt"}),
                files.items(),
            )
        )
    index = {name: file for file, tensors in files.items() for name in tensors}
    _json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    _json(out / "config.json", _config(fmt, shape))
    _write_tokenizer(out, shape.vocab)


def _projection(fmt: str, out: int, inner: int, device: torch.device) -> dict[str, Tensor]:
    if fmt == "awq":
        return awq.write(random_weight(Kind("int", 4, 128), out, inner, device))
    if fmt == "fp8":
        weight = random_weight(Kind("fp8", 8, 0), out, inner, device)
        return {"weight": weight.codes, "weight_scale": weight.scales}
    return {"weight": _dense(out, inner, device, inner**-0.5)}


def _dense(out: int, inner: int, device: torch.device, scale: float) -> Tensor:
    return torch.randn(out, inner, device=device, dtype=torch.bfloat16) * scale


def _config(fmt: str, shape: Shape) -> dict:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return config if FORMATS[fmt] is None else config | {"quantization_config": FORMATS[fmt]}


def _write_tokenizer(out: Path, vocab: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = {f"t{i}": i for i in range(vocab)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="t0"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    tokenizer.save(str(out / "tokenizer.json"))
    _json(
        out / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t1"},
    )


def _json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--format", choices=FORMATS, default="bf16")
    parser.add_argument("--layers", type=int, default=Shape.layers)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write(args.out, args.format, replace(Shape(), layers=args.layers), device)


if __name__ == "__main__":
    main()
