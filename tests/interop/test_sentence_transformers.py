"""Real sentence encoders against sentence-transformers, through a real server where it matters: `make test-slow`."""

from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from nibble.engine.config import EngineConfig
from nibble.engine.encoders.runner import EncoderRunner
from nibble.engine.pooling import Pooling
from nibble.engine.text.batch_encoder import BatchEncoder
from nibble.engine.text.tokenizer import Tokenizer
from nibble.tools.fetch import ENCODER_WHEELS, sentence_encoder

from .conftest import MODELS
from .test_real_models import passages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TEXTS = [
    "hello",
    "",
    "Wie spät ist es? Il est déjà midi, 日本語も少し。",
    "A man is eating food. [SEP] A [MASK] is not text.",
    *passages(6, 60),
    *passages(6, 400),
    *passages(2, 3000),  # longer than either model takes
]


@pytest.fixture(scope="module", params=list(ENCODER_WHEELS))
def folder(request: pytest.FixtureRequest) -> Path:
    return sentence_encoder(MODELS, request.param)


def embeddings(folder: Path, **flags) -> np.ndarray:
    """[texts, dimensions], texts cut as sentence-transformers cuts them."""
    runner = EncoderRunner(EngineConfig(model=str(folder), device="cpu", **flags))
    encoder = BatchEncoder(
        Tokenizer.from_pretrained(folder), runner.max_model_len, runner.max_model_len
    )
    texts = encoder.texts(TEXTS)
    found = runner.execute(texts, [Pooling()] * len(texts))
    return np.stack([np.frombuffer(vector, np.float32) for vector in found])


def test_float32_is_sentence_transformers_within_1e_5(folder: Path) -> None:
    want = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(embeddings(folder), want, atol=1e-5)


def test_8_bit_weights_keep_a_cosine_over_0_995(folder: Path) -> None:
    plain, quantized = embeddings(folder), embeddings(folder, quantize="int8")
    assert (plain * quantized).sum(1).min() > 0.995
