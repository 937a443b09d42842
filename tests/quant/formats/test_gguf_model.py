"""GGUF models against transformers' own GGUF loading: the same config, weights, logits and tokens."""

import struct
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nibble.architectures.llama import llama3_divisors
from nibble.errors import CheckpointError, UnsupportedError
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.checkpoint.side_files import copy_side_files
from nibble.quant.checkpoint.writer import dequantize_checkpoint, write_json
from nibble.quant.formats.gguf.container import GgufFile
from nibble.quant.formats.gguf.model import architecture, synthesize_config
from nibble.quant.formats.gguf.tokenizer import build_tokenizer
from nibble.quant.weight import QuantizedWeight

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma3"]
F32, Q4_0, Q8_0 = (
    gguf.GGMLQuantizationType.F32,
    gguf.GGMLQuantizationType.Q4_0,
    gguf.GGMLQuantizationType.Q8_0,
)


def theirs(path):
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("qtype", [F32, Q4_0, Q8_0])
def test_every_tensor_is_the_one_transformers_loads(make_gguf, arch, qtype):
    path = make_gguf(arch, qtype)
    checkpoint, state = open_checkpoint(path), theirs(path).state_dict()
    tied = {"lm_head.weight"} if checkpoint.config["tie_word_embeddings"] else set()
    assert checkpoint.names() == state.keys() - tied
    for name in checkpoint.names():
        assert checkpoint.shape(name) == tuple(state[name].shape)
        torch.testing.assert_close(
            checkpoint.tensor(name, torch.float32), state[name], rtol=0, atol=1e-7
        )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_linear_is_the_quantized_form_of_the_tensor(make_gguf, arch):
    checkpoint = open_checkpoint(make_gguf(arch, Q4_0))
    for module in (
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.embed_tokens",
    ):
        weight = checkpoint.linear(module)
        assert (
            isinstance(weight, QuantizedWeight)
            and weight.bits == 4
            and checkpoint.is_quantized(module)
        )
        assert torch.equal(weight.dequantize(), checkpoint.tensor(f"{module}.weight"))
    assert checkpoint.scheme.describe() == "gguf Q4_0"
    bias = checkpoint.bias("model.layers.0.self_attn.q_proj")
    assert (bias is not None) == (arch == "qwen2")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_config_is_what_transformers_makes_of_the_file(make_gguf, arch, tmp_path):
    path = make_gguf(arch)
    write_json(tmp_path / "config.json", open_checkpoint(path).config)
    ours = AutoConfig.from_pretrained(tmp_path).to_dict()
    reference = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    own = {
        "_name_or_path",
        "_model_name_or_path",
        "architectures",
        "dtype",
        "rms_norm_eps",
        "query_pre_attn_scalar",
        "unk_token_id",
        "sliding_window_pattern",
        "_sliding_window_pattern",
        "rope_theta",
        "rope_local_base_freq",
    }
    if arch == "qwen2":
        own |= {"attention_bias"}  # which Qwen 2 has always, and does not say
    assert {k: v for k, v in ours.items() if k not in own} == {
        k: v for k, v in reference.items() if k not in own
    }
    assert ours["rms_norm_eps"] == pytest.approx(reference["rms_norm_eps"])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_dequantized_folder_computes_the_same_logits(make_gguf, arch, tmp_path):
    path = make_gguf(arch)
    dequantize_checkpoint(open_checkpoint(path), tmp_path / "dense", torch.float32)
    ours, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(3, 40).reshape(1, -1)
    reference = theirs(path)
    reference.config.query_pre_attn_scalar = ours.config.to_dict().get("query_pre_attn_scalar")
    for layer, other in zip(ours.model.layers, reference.model.layers, strict=True):
        other.self_attn.scaling = (
            layer.self_attn.scaling
        )  # transformers takes Gemma's 256 for every head_dim
    torch.testing.assert_close(ours(ids).logits, reference(ids).logits)


TEXTS = ["hello world", "hello 12345", "  two  spaces", "héllo 東京 🙂\n\n\ttab", "<|im_start|>user\nhello<|im_end|>",
         "<bos>hello<eos>", "hell", "3.14e-10", ""]  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tokenizer_splits_as_transformers_does(make_gguf, arch, tmp_path):
    path = make_gguf(arch)
    written = copy_side_files(open_checkpoint(path), tmp_path / "side")
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(written)
    ours = AutoTokenizer.from_pretrained(tmp_path / "side")
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        assert ours(text).input_ids == reference(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == reference.decode(reference(text).input_ids)
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == (
        reference.bos_token,
        reference.eos_token,
        reference.unk_token,
    )


def test_smollm_digits_stand_alone(make_gguf, tmp_path):
    """Also where the vocabulary could merge them; transformers 5.23 ignores this pre-tokenizer."""
    copy_side_files(open_checkpoint(make_gguf("llama")), tmp_path / "side")
    pre_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "side").backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in pre_tokenizer.pre_tokenize_str("ab 123")] == [
        "ab",
        "Ġ",
        "1",
        "2",
        "3",
    ]


def test_chat_template_and_end_of_turn(make_gguf, tmp_path):
    template = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|endoftext|>' }}{% endfor %}<|im_end|>"
    path = make_gguf("llama", metadata={"tokenizer.chat_template": template})
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["eos_token_id"] == 2
    copy_side_files(checkpoint, tmp_path / "side")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "side")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text == "<|im_start|>hello<|endoftext|><|im_end|>"


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_other_rope_scaling_is_read(make_gguf, arch):
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 32.0}
    metadata = {f"{arch}.rope.scaling.{key}": value for key, value in yarn.items()}
    config = open_checkpoint(make_gguf(arch, metadata=metadata)).config
    assert config["rope_parameters"] == {
        "rope_theta": 10000.0,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32.0,
    }


def test_qwen2_splits_single_digits_and_composes_characters(make_gguf):
    """As its tokenizer.json does: NFC first, and no word passes its merges by."""
    tokenizer = build_tokenizer(GgufFile(make_gguf("qwen2")))
    assert tokenizer.normalizer.normalize_str("e\u0301") == "\u00e9"
    assert [text for text, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a 12")] == [
        "a", "\u0120", "1", "2",
    ]  # fmt: skip


def test_llama3_rope_scaling_is_recovered(make_gguf):
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    divisors = np.ones(
        8, np.float32
    )  # head_dim 16, theta 10000: as convert_hf_to_gguf.py writes them
    for i in range(8):
        wavelength = 2 * np.pi * 10000 ** (2 * i / 16)
        if wavelength > 8192:
            divisors[i] = 32
        elif wavelength > 8192 / 4:
            smooth = (8192 / wavelength - 1) / 3
            divisors[i] = 1 / ((1 - smooth) / 32 + smooth)
    np.testing.assert_allclose(llama3_divisors(scaling, 16, 10000.0), divisors, rtol=1e-6)
    config = open_checkpoint(make_gguf("llama", tensors={"rope_freqs.weight": divisors})).config
    assert config["rope_parameters"] == {"rope_theta": 10000.0} | scaling
    with pytest.raises(UnsupportedError, match="rope_freqs"):
        open_checkpoint(make_gguf("llama", tensors={"rope_freqs.weight": divisors[::-1].copy()}))


def test_unsupported_files_are_named(make_gguf):
    with pytest.raises(UnsupportedError, match="rope scaling 'longrope'"):
        open_checkpoint(make_gguf("llama", metadata={"llama.rope.scaling.type": "longrope"}))
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ssm_in\.weight': is no part"):
        open_checkpoint(
            make_gguf("llama", tensors={"blk.0.ssm_in.weight": np.zeros((2, 2), np.float32)})
        )
    with pytest.raises(UnsupportedError, match="type I8"):
        open_checkpoint(make_gguf("llama", tensors={"blk.0.ffn_up.bias": np.zeros(4, np.int8)}))


@pytest.mark.parametrize("named", [None, "mamba", 7, ["llama"]])
def test_an_architecture_that_is_not_known_is_named(named):
    file = SimpleNamespace(path="x.gguf", metadata={"general.architecture": named})
    with pytest.raises(UnsupportedError, match="architecture") as error:
        architecture(file)
    assert repr(named) in str(error.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(20, "IQ4_NL"), (31, "Q4_0_4_4"), (40, "NVFP4"), (41, "Q1_0"), (77, "number 77")],
)
def test_a_tensor_type_that_is_not_read_is_named_and_the_file_not_blamed(tmp_path, kind, name):
    tensor = struct.pack("<Q1sIQQIQ", 1, b"w", 2, 256, 256, kind, 0)
    header = struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + tensor
    (tmp_path / "m.gguf").write_bytes(header + bytes(256 * 256))
    with pytest.raises(UnsupportedError, match=f"'w': type {name} is not supported") as caught:
        GgufFile(tmp_path / "m.gguf")
    assert "download" not in str(caught.value)


def test_nan_scale_is_named(make_gguf):
    path = make_gguf("llama", Q8_0)
    checkpoint = open_checkpoint(path)
    start = checkpoint.file.tensors["blk.1.ffn_down.weight"].start
    with path.open("r+b") as file:
        file.seek(start + 34)
        file.write(np.float16("nan").tobytes())
    with pytest.raises(
        CheckpointError, match=r"llama.gguf, tensor 'blk.1.ffn_down.weight': holds NaN"
    ):
        open_checkpoint(path).linear("model.layers.1.mlp.down_proj")


def test_truncated_and_foreign_files(make_gguf, tmp_path):
    path = make_gguf("llama")
    whole = path.read_bytes()
    for size in (0, 10, 30, 500, 5000, len(whole) - 40):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"llama\.gguf"):
            open_checkpoint(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        open_checkpoint(path)


def test_a_damaged_header_never_crashes(make_gguf):
    """Flip bytes of the header anywhere: the file opens, or one of our errors says why not."""
    path = make_gguf("llama", tokenizer=False)
    whole = bytearray(path.read_bytes())
    header = min(t.start for t in open_checkpoint(path).file.tensors.values())
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(0, header, 2):
            damaged[at] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(path)
            for name in checkpoint.names():
                checkpoint.tensor(name)
        except (CheckpointError, UnsupportedError):
            pass


def test_biases_of_a_llama_are_in_the_order_of_the_rows(make_gguf):
    """llama.cpp's converter permutes attn_q.bias and attn_k.bias as it does the weights (LlamaModel.permute)."""
    config, tensors, biases = open_checkpoint(make_gguf("llama")).config, {}, {}
    for name, key in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
        heads = config[key]
        width = heads * config["head_dim"]
        bias = np.random.default_rng(heads).standard_normal(width).astype(np.float32)
        biases[name] = torch.from_numpy(bias)
        pairs = bias.reshape(heads, 2, -1).swapaxes(1, 2)
        tensors[f"blk.0.attn_{name}.bias"] = np.ascontiguousarray(pairs.reshape(width))
    checkpoint = open_checkpoint(make_gguf("llama", tensors=tensors))
    for name, bias in biases.items():
        assert torch.equal(checkpoint.bias(f"model.layers.0.self_attn.{name}_proj"), bias)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 10**9),
        ("block_count", 2.5),
        ("embedding_length", 2**39),
        ("block_count", "x"),
    ],
)
def test_a_size_beyond_its_bound_is_refused_before_anything_is_made_of_it(
    make_gguf, arch, key, value
):
    file = GgufFile(make_gguf(arch))
    file.metadata[f"{arch}.{key}"] = value
    with pytest.raises(CheckpointError, match="want"):
        synthesize_config(file)


def test_counts_beyond_their_bounds_are_refused(make_gguf, tmp_path):
    data = make_gguf("llama").read_bytes()
    for at, what in ((8, "tensors"), (16, "metadata entries")):
        (tmp_path / "claims.gguf").write_bytes(
            data[:at] + struct.pack("<Q", 2**20) + data[at + 8 :] + bytes(2**25)
        )
        with pytest.raises(CheckpointError, match=f"claims 1048576 {what}"):
            GgufFile(tmp_path / "claims.gguf")
