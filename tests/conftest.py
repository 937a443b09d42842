"""Checkpoints that more than one room tests with."""

import json
import os
from pathlib import Path

import pytest

# Triton kernels run in the interpreter, on the CPU. Triton reads this when it is first imported, by whichever test, so
# it is set here, before any; compiling happens in processes of their own without it. `make test-gpu` sets 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

if "NIBBLE_TEST_CPU_LIBRARY" in os.environ:  # tests/sanitize.py: another build of the C++ kernels
    from nibble.kernels.cpu import library

    library.LIBRARY = Path(os.environ["NIBBLE_TEST_CPU_LIBRARY"])


def _why_no_cpp() -> str | None:
    from nibble.kernels.cpu import library

    return library.why_missing()


def _why_no_triton() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


# What a run may not do without: where NIBBLE_TESTS_REQUIRE names it (`make test` and .ci/run do), its absence ends the
# run at once, so that no test of it can skip unseen.
_REQUIREMENTS = {"cpp": _why_no_cpp, "triton": _why_no_triton}


def pytest_sessionstart() -> None:
    """Fail at once, in one line for each, where something that is required is missing."""
    wanted = [name for name in os.environ.get("NIBBLE_TESTS_REQUIRE", "").split(",") if name]
    if unknown := sorted(set(wanted) - set(_REQUIREMENTS)):
        pytest.exit(f"NIBBLE_TESTS_REQUIRE={unknown[0]}: give some of cpp,triton", 4)
    missing = [f"{name}: {why}" for name in wanted if (why := _REQUIREMENTS[name]())]
    if missing:
        lines = "\n".join(f"required, but missing: {line}" for line in missing)
        pytest.exit(f"{lines}\n(NIBBLE_TESTS_REQUIRE= runs without it)", 4)


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")  # ids 256, 257, 258


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded two-layer Llama, hidden size 64, saved by transformers. A token's id is its byte; 256.. are SPECIALS."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        bos_token_id=256,
        eos_token_id=257,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:  # wide enough that the likeliest token depends on the context
                weight.copy_(torch.randn_like(weight) * (1.0 if "embed" in name else 0.2))
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


def write_byte_tokenizer(folder: Path) -> None:
    """Of tiny_llama, beside any checkpoint."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(hidden)
    }
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIALS]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|im_end|>",
                "chat_template": CHAT_TEMPLATE,
            }
        )
    )
