"""What a conversion keeps of its own answers, against transformers' whole model."""

import pytest
import torch

from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.conversion import witness
from nibble.quant.conversion.blocks import BlockSource

from ...engine.models import CONFIGS, build


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_are_those_of_transformers(name, tmp_path, monkeypatch):
    monkeypatch.setattr(witness, "_ROWS", 50)  # the head in several parts
    model = build(name, tmp_path)
    tokens = torch.tensor([[(31 * i + 5) % 199 for i in range(40)]])
    got = witness._logits(BlockSource(open_checkpoint(tmp_path), torch.device("cpu")), tokens)
    torch.testing.assert_close(got, model(tokens).logits[0], rtol=1e-4, atol=1e-4)


def test_a_prompt_is_text_where_the_tokenizer_can_be_read(tiny_llama, tmp_path):
    assert witness._prompt(tiny_llama, 264) == list(b"The capital of F")
    assert witness._prompt(tiny_llama, 100) == witness._prompt(
        tmp_path, 100
    )  # beyond it: any tokens
    any_tokens = witness._prompt(tmp_path, 100)
    assert len(any_tokens) == 16 and all(0 <= token < 100 for token in any_tokens)
