"""Image files within bounds; embeddings kept within bounds; a tower that cannot be loaded is no reason not to serve."""

import io
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import nibble
from nibble.engine.config import EngineConfig
from nibble.engine.messages import Placeholder, VisionInfo
from nibble.engine.runner import Runner
from nibble.engine.vision import ImageRefusedError
from nibble.engine.vision.encoder import ImageEncoder
from nibble.engine.vision.image import ImageError, read_image

from ..multimodal_models import rename
from .checkpoints import SIZES, build, png


class CountingTower:
    """Four embeddings of 8 bytes an image; b"bad" is none."""

    info, is_whole = VisionInfo("<image>", 9), False

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def encode(self, data: bytes) -> tuple[Placeholder, torch.Tensor]:
        self.seen.append(data)
        if data == b"bad":
            raise ImageError("bad")
        return Placeholder("<image>", [4]), torch.full((4, 2), float(data[0]))


def test_what_comes_again_is_kept_and_what_has_not_been_used_longest_goes() -> None:
    tower = CountingTower()
    encoder = ImageEncoder(tower, kept_bytes=64)  # two images
    for files in ([b"a", b"b"], [b"a"], [b"c"], [b"a", b"c"]):
        encoder.encode(files).result()
    assert tower.seen == [b"a", b"b", b"c"]
    encoder.encode([b"b"]).result()
    assert tower.seen == [b"a", b"b", b"c", b"b"]


def test_spans_are_those_of_the_prompt_in_order() -> None:
    encoder = ImageEncoder(CountingTower())
    prompt = [9, 9, 1, 9, 9, 2, 9, 9, 9, 9]
    first, second = encoder.spans(prompt, [b"a", b"b"])
    assert (first.positions, second.positions) == ([0, 1, 3, 4], [6, 7, 8, 9])
    assert first.embeddings[0, 0] == ord("a") and second.embeddings[0, 0] == ord("b")
    assert first.digest != second.digest


def test_a_refusal_says_which_and_is_not_kept() -> None:
    tower = CountingTower()
    encoder = ImageEncoder(tower)
    for _ in range(2):
        with pytest.raises(ImageRefusedError, match="bad") as caught:
            encoder.encode([b"a", b"bad", b"c"]).result()
        assert caught.value.index == 1
    assert tower.seen == [b"a", b"bad", b"bad"]


def test_an_image_is_read_upright_in_rgb() -> None:
    image = Image.new("RGB", (6, 4), "red")
    image.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    found = read_image(file.getvalue())
    assert (found.size, found.mode, found.getpixel((3, 0))) == ((4, 6), "RGB", (0, 0, 255))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    file = io.BytesIO()
    Image.new(mode, (5, 5)).save(file, "PNG")
    assert read_image(file.getvalue()).mode == "RGB"


def test_formats_that_are_not_listed_are_not_tried() -> None:
    for name in ("BMP", "TIFF", "PPM"):
        file = io.BytesIO()
        Image.new("RGB", (5, 5)).save(file, name)
        with pytest.raises(ImageError, match="PNG, JPEG, WEBP, GIF"):
            read_image(file.getvalue())


def runner_of(folder: Path) -> Runner:
    config = EngineConfig(
        model=str(folder), dtype="float32", kv_cache_memory=1 << 22, prepared_cache=None
    )
    return Runner(config)


def test_the_ledger_has_the_tower(tmp_path: Path) -> None:
    model = build("idefics3", tmp_path)
    ready = runner_of(tmp_path).ready()
    parts = [model.model.vision_model, model.model.connector]
    weights = sum(p.nbytes for part in parts for p in part.parameters())
    assert weights < ready.ledger["vision"] < weights + 2**30
    assert ready.vision == VisionInfo("<image>", model.config.image_token_id)


@pytest.mark.parametrize("damage", ["processor", "weight", "shape"])
def test_a_model_whose_tower_cannot_be_loaded_is_served_for_text(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build("idefics3", tmp_path)
    name = "model.connector.modality_projection.proj.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    if damage == "processor":
        (tmp_path / "preprocessor_config.json").unlink()
    elif damage == "weight":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:, :3].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        runner = runner_of(tmp_path)
    assert runner.vision is None and "will not see" in caplog.text
    assert "vision" not in runner.ready().ledger and runner.logits([5, 6]).isfinite().all()


def test_an_answer_of_the_tower_in_16_bits(tmp_path: Path) -> None:
    build("idefics3", tmp_path)
    exact = runner_of(tmp_path).vision.encode(png(SIZES[1]))[1]
    config = EngineConfig(model=str(tmp_path), dtype="bfloat16", kv_cache_memory=1 << 22)
    half = Runner(config).vision.encode(png(SIZES[1]))[1]
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_the_names_that_published_checkpoints_of_gemma_3_have(tmp_path: Path) -> None:
    build("gemma3", tmp_path)
    want = runner_of(tmp_path).vision.encode(png(SIZES[1]))[1]
    rename(tmp_path, "vision_tower.", "vision_tower.vision_model.")
    assert torch.equal(runner_of(tmp_path).vision.encode(png(SIZES[1]))[1], want)


@pytest.mark.parametrize("name", ["smolvlm", "gemma3"])
def test_a_conversion_sees_as_its_original_does(name: str, tmp_path: Path) -> None:
    build(name, tmp_path / "original").bfloat16().save_pretrained(tmp_path / "original")
    out = nibble.convert(tmp_path / "original", tmp_path / "out", "fp8", evaluate=False)
    want, found = (
        runner_of(each).vision.encode(png(SIZES[1])) for each in (tmp_path / "original", out)
    )
    assert found[0] == want[0] and torch.equal(found[1], want[1])


def test_quantized_at_load_it_sees_as_before(tmp_path: Path) -> None:
    build("idefics3", tmp_path)
    want = runner_of(tmp_path).vision.encode(png(SIZES[1]))[1]
    config = EngineConfig(
        model=str(tmp_path), dtype="float32", kv_cache_memory=1 << 22, quantize="int8"
    )
    assert torch.equal(Runner(config).vision.encode(png(SIZES[1]))[1], want)
