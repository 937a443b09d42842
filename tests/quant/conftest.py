"""Tiny models on disk, made with other people's tools: transformers for folders, gguf-py for GGUF files."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.checkpoint.writer import dequantize_checkpoint

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 272, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


@pytest.fixture
def llama_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=True)).eval()


@pytest.fixture
def llama_folder(llama_model, tmp_path):
    llama_model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def make_gguf(tmp_path):
    """Writes a tiny model of an architecture to a GGUF file, as llama.cpp's convert_hf_to_gguf.py does."""

    def make(arch, qtype=gguf.GGMLQuantizationType.Q8_0, metadata=(), tensors=(), tokenizer=True):
        torch.manual_seed(1)
        if arch == "llama":
            model = LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=False))
        elif arch == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**TINY, tie_word_embeddings=True))
        elif arch == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**TINY, head_dim=128, tie_word_embeddings=False))
        else:
            config = TINY | {"num_hidden_layers": 7, "num_key_value_heads": 1}
            model = Gemma3ForCausalLM(
                Gemma3TextConfig(**config, head_dim=32, query_pre_attn_scalar=32, sliding_window=8)
            )
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        path = tmp_path / f"{arch}.gguf"
        writer = gguf.GGUFWriter(path, arch)
        write_metadata(writer, model.config, arch)
        if tokenizer:
            write_tokenizer(writer, arch)
        for key, value in dict(metadata).items():
            (writer.add_float32 if isinstance(value, float) else writer.add_string)(key, value)
        for name, tensor in model.named_parameters():
            write_tensor(writer, arch, name, tensor.detach().numpy(), qtype, model.config)
        for name, array in dict(tensors).items():
            writer.add_tensor(name, array)
        for step in (
            writer.write_header_to_file,
            writer.write_kv_data_to_file,
            writer.write_tensors_to_file,
            writer.close,
        ):
            step()
        return path

    return make


def write_metadata(writer, config, arch):
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0 if arch != "gemma3" else 1000000.0)
    if arch == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.head_dim)
    if arch in ("qwen3", "gemma3"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)


def write_tokenizer(writer, arch):
    """272 tokens: three special ones, every byte, a few merges."""
    if arch != "gemma3":
        letters = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 324)]]
        tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters]
        merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r"]
        tokens += [merge.replace(" ", "") for merge in merges]
        types = [3, 3, 3] + [1] * (len(tokens) - 3)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm" if arch == "llama" else "qwen2")
        if arch != "llama":
            writer.add_add_bos_token(False)
        writer.add_token_merges(merges)
    else:
        tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "h", "e", "l", "o",
                  "he", "ll", "hell", "hello", "  ", "w"]  # fmt: skip
        types = [3, 3, 3, 3] + [6] * 256 + [1] * 9 + [4] + [1]
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
        writer.add_add_bos_token(True)
        writer.add_add_space_prefix(False)
    missing = TINY["vocab_size"] - len(tokens)
    writer.add_token_list(tokens + [f"<unused{i}>" for i in range(missing)])
    writer.add_token_types(types + [3] * missing)
    for key, token in (
        (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2))
        if arch != "gemma3"
        else (("bos", 2), ("eos", 1), ("unk", 3), ("pad", 0))
    ):
        getattr(writer, f"add_{key}_token_id")(token)


def write_tensor(writer, arch, name, array, qtype, config):
    stem, _, suffix = name.rpartition(".")
    if stem in ("model.embed_tokens", "model.norm", "lm_head"):
        gguf_name = {
            "model.embed_tokens": "token_embd",
            "model.norm": "output_norm",
            "lm_head": "output",
        }[stem]
    else:
        _, _, index, rest = stem.split(".", 3)
        names = LAYER_NAMES | {
            "post_attention_layernorm": "ffn_norm" if arch != "gemma3" else "post_attention_norm"
        }
        gguf_name = f"blk.{index}.{names[rest]}"
    if arch == "gemma3" and "norm" in name:
        array = array + 1
    if arch == "llama" and rest_is(
        name, "q_proj", "k_proj"
    ):  # convert_hf_to_gguf.py: LlamaModel.permute
        heads = (
            config.num_attention_heads if rest_is(name, "q_proj") else config.num_key_value_heads
        )
        array = (
            array.reshape(heads, 2, array.shape[0] // heads // 2, -1)
            .swapaxes(1, 2)
            .reshape(array.shape)
        )
    kind = qtype if array.ndim == 2 else gguf.GGMLQuantizationType.F32
    writer.add_tensor(
        f"{gguf_name}.{suffix}",
        gguf.quants.quantize(np.ascontiguousarray(array), kind),
        raw_dtype=kind,
    )


def rest_is(name, *leaves):
    return name.split(".")[-2] in leaves


@pytest.fixture
def dense(make_gguf, tmp_path):
    """A tiny Llama in bfloat16, as a folder with a tokenizer."""
    dequantize_checkpoint(open_checkpoint(make_gguf("llama")), tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def make_checkpoint(dense, tmp_path):
    """A copy of the dense folder with another shape or architecture and random weights."""

    def make(name="variant", model_type="llama", **changes):
        shutil.copytree(dense, tmp_path / name)
        settings = json.loads((dense / "config.json").read_text()) | changes
        settings.pop("model_type"), settings.pop("architectures")
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **settings), dtype=torch.bfloat16
        )
        for parameter in model.parameters():
            parameter.data.copy_(
                torch.randn(parameter.shape) * (0.3 if parameter.dim() == 1 else 0.15)
            )
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make
