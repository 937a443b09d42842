"""The models under attack: seeded, made here, without a network and without calibration."""

import json
import shutil
from pathlib import Path

WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5,
        "num_attention_heads": 16, "num_key_value_heads": 8}  # fmt: skip
GROUP = 128


def quantized(template: Path, folder: Path, seed: int = 0, group: int = 32, **sizes: int) -> Path:
    """An AWQ checkpoint of random codes for the configuration of `template` (a Llama) with other `sizes`; its
    tokenizer is the template's."""
    import torch
    from safetensors.torch import save_file

    shutil.copytree(template, folder)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text()) | sizes
    config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": group,
                                     "zero_point": True, "version": "gemm"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    def dense(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.float16)

    hidden, tensors = config["hidden_size"], {}
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}."
        for name, (n, k) in _linears(config).items():
            tensors[f"{block}{name}.qweight"] = codes(k, n // 8)
            tensors[f"{block}{name}.qzeros"] = codes(k // group, n // 8)
            scales = torch.rand((k // group, n), generator=generator) + 0.5
            tensors[f"{block}{name}.scales"] = (scales * 0.2 * k**-0.5).to(torch.float16)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}{norm}.weight"] = torch.ones(hidden, dtype=torch.float16)
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.float16)
    tensors["model.embed_tokens.weight"] = dense(config["vocab_size"], hidden)
    tensors["lm_head.weight"] = dense(config["vocab_size"], hidden) * hidden**-0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _linears(config: dict) -> dict[str, tuple[int, int]]:
    """Name -> outputs, inputs."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    keys = config["head_dim"] * config["num_key_value_heads"]
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }


def copy(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    return folder
