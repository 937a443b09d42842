"""Images in the Triton decoder, in the interpreter, against the torch one."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from nibble.engine.vision.encoder import ImageEncoder

from ..backends.test_triton_decoder import torch_runner, triton_runner
from ..driving import logits, make_request
from .checkpoints import SIZES, build, inputs, png


@pytest.mark.parametrize("chunk", [64, 1])
def test_images_also_where_steps_of_one_token_come_from_graphs(chunk: int, tmp_path: Path) -> None:
    build("smolvlm-whole", tmp_path)
    files = [png(SIZES[1])]
    ids = inputs(tmp_path, "<image>a", files)["input_ids"][0].tolist()
    found = []
    for make in (torch_runner, triton_runner):
        runner = make(tmp_path)
        request = make_request(ids, [0, 1, 2])
        request.images = ImageEncoder(runner.vision).spans(ids, files)
        found += logits(runner, [request], chunk)
    want, ours = found
    assert torch.allclose(ours, want, atol=0.02 * want.abs().max())
