"""Tiny seeded checkpoints that see, with a tokenizer and an image processor; what transformers makes of prompts."""

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from ...conftest import write_byte_tokenizer

SIZES = [(20, 24), (90, 40), (57, 200)]  # width, height
IMAGE_ID = 259
_TOKENS = ["<image>", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>", "<row_1_col_2>"]
_GEMMA_TOKENS = ["<image_soft_token>", "<start_of_image>", "<end_of_image>"]
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ':' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 272,
    "max_position_embeddings": 1024,
    "pad_token_id": 258,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
_EYE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
_PROCESSORS = {
    "idefics3": partial(Idefics3ImageProcessorPil, size={"longest_edge": 56}),
    "smolvlm": partial(SmolVLMImageProcessorPil, size={"longest_edge": 84}),  # up to 3 x 3 frames
    "smolvlm-whole": partial(SmolVLMImageProcessorPil, size={"longest_edge": 28}),  # one frame
    "gemma3": partial(Gemma3ImageProcessorPil, size={"height": 56, "width": 56}),
}
NAMES = tuple(_PROCESSORS)


def _config(name: str) -> Any:
    if name == "gemma3":
        eye = _EYE | {"image_size": 56}
        text = _TEXT | {"query_pre_attn_scalar": 20, "sliding_window": 24}
        text["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
        return transformers.Gemma3Config(
            text_config=text,
            vision_config=eye,
            mm_tokens_per_image=16,
            image_token_id=IMAGE_ID,
            boi_token_id=IMAGE_ID + 1,
            eoi_token_id=IMAGE_ID + 2,
        )
    kind = transformers.Idefics3Config if name == "idefics3" else transformers.SmolVLMConfig
    text = transformers.LlamaConfig(**_TEXT)
    return kind(text_config=text, vision_config=_EYE, image_token_id=IMAGE_ID, scale_factor=2)


def build(name: str, folder: Path) -> PreTrainedModel:
    """A float32 model whose embeddings of images weigh as much as those of tokens, saved into `folder`."""
    torch.manual_seed(7)
    model = transformers.AutoModelForImageTextToText.from_config(_config(name), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.15))
    model.eval().save_pretrained(folder)
    cut = {} if name == "gemma3" else {"max_image_size": {"longest_edge": 28}}
    _PROCESSORS[name](**cut).save_pretrained(folder)
    _write_tokenizer(folder, name == "gemma3")
    return model


def _write_tokenizer(folder: Path, is_gemma: bool) -> None:
    from tokenizers import AddedToken, Tokenizer

    write_byte_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in (_GEMMA_TOKENS if is_gemma else _TOKENS)
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    image = "<start_of_image>" if is_gemma else "<image>"
    config["chat_template"] = _TEMPLATE.replace("<image>", image)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def png(size: tuple[int, int], seed: int = 0) -> bytes:
    """A file of random pixels in blocks, so that resizing leaves contrasts."""
    width, height = size
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3))
    pixels = np.kron(coarse, np.ones((4, 4, 1)))[:height, :width].astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def inputs(folder: Path, text: str, files: list[bytes]) -> dict[str, torch.Tensor]:
    """What transformers makes of a text with <image> in it: its own processor, or for Gemma 3, whose processor wants a
    tokenizer of its own, what that writes."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    eye = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    images = [Image.open(io.BytesIO(file)) for file in files]
    if is_whole(folder):
        image = f"\n\n<start_of_image>{'<image_soft_token>' * 16}<end_of_image>\n\n"
        given = tokenizer(text.replace("<image>", image), return_tensors="pt")
        types = (given["input_ids"] == IMAGE_ID).long()
        pixels = eye(images=images, return_tensors="pt")["pixel_values"]
        return {**given, "token_type_ids": types, "pixel_values": pixels}
    processor = transformers.Idefics3Processor(eye, tokenizer, image_seq_len=4)
    return processor(text=text, images=images, return_tensors="pt")


def is_whole(folder: Path) -> bool:
    """Whether tokens of an image see each other."""
    return json.loads((folder / "config.json").read_text())["model_type"] == "gemma3"
