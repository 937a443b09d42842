"""The families that see: the class that has their vision tower, and what stands in a prompt for an image.

    Idefics3, SmolVLM    the image cut into rows and columns, a tag before each frame, and all of it once more, small
    Gemma 3              the image, and crops of long ones if its processor makes them; tokens of each see each other

A placeholder is text for the tokenizer, with one image token for each run of embeddings that follow each other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..messages import Placeholder

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

_FRAME = "<fake_token_around_image>"


@dataclass(frozen=True, slots=True)
class VisionFamily:
    """How one kind of model sees."""

    image_token: str  # as its chat template writes an image
    is_whole: bool  # tokens of a run see each other, not only those before them
    image_token_id: str  # the key in config.json
    language: str  # prefix of what is no part of the tower, in transformers' module
    # (transformers' module, its image processor, the image) -> placeholder, embeddings [*, hidden_size]
    encode: Callable[[Any, Any, "Image.Image"], "tuple[Placeholder, Tensor]"]


def _encode_frames(
    model: Any, processor: Any, image: "Image.Image"
) -> "tuple[Placeholder, Tensor]":
    """One frame after the other: a large image has many, and memory is wanted for one."""
    import torch

    cut = processor(images=[image], return_row_col_info=True, return_tensors="pt")
    frames = [
        model.get_image_features(
            pixels[None, None].to(model.device), mask[None, None].to(model.device)
        ).pooler_output[0]
        for pixels, mask in zip(cut["pixel_values"][0], cut["pixel_attention_mask"][0], strict=True)
    ]
    runs = [len(frame) for frame in frames]
    return Placeholder(_frames(cut["rows"][0][0], cut["cols"][0][0]), runs), torch.cat(frames)


def _frames(rows: int, cols: int) -> str:
    """What the processor of Idefics3 writes, each run of image tokens as one. No rows: the image is one frame."""
    whole = f"{_FRAME}<global-img><image>{_FRAME}"
    if not rows:
        return whole
    lines = (
        "".join(f"{_FRAME}<row_{row}_col_{col}><image>" for col in range(1, cols + 1))
        for row in range(1, rows + 1)
    )
    return "".join(f"{line}\n" for line in lines) + f"\n{whole}"


def _encode_crops(model: Any, processor: Any, image: "Image.Image") -> "tuple[Placeholder, Tensor]":
    import torch

    cut = processor(images=[image], return_tensors="pt")
    crops = [
        model.get_image_features(pixels[None].to(model.device, model.dtype)).pooler_output[0]
        for pixels in cut["pixel_values"]
    ]
    return Placeholder(_crops(len(crops) - 1), [len(crop) for crop in crops]), torch.cat(crops)


def _crops(count: int) -> str:
    """What the processor of Gemma 3 writes for an image and so many crops of it."""
    one = "\n\n<start_of_image><image_soft_token><end_of_image>\n\n"
    if not count:
        return one
    return (
        f"Here is the original image {one} and here are some crops to help you see better "
        + " ".join([one] * count)
    )


_IDEFICS3 = VisionFamily("<image>", False, "image_token_id", "model.text_model.", _encode_frames)
FAMILIES: Mapping[str, VisionFamily] = {
    "Idefics3ForConditionalGeneration": _IDEFICS3,
    "SmolVLMForConditionalGeneration": _IDEFICS3,
    "Gemma3ForConditionalGeneration": VisionFamily(
        "<start_of_image>", True, "image_token_id", "model.language_model.", _encode_crops
    ),
}
