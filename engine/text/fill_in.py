"""Fill in the middle: what a model writes between a prefix and a suffix, asked for with the tokens that it learnt.

prefix, suffix   ->   PREFIX prefix SUFFIX suffix MIDDLE      and what follows is the middle
"""

from dataclasses import dataclass

from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class FillIn:
    """The tokens of one family of models."""

    prefix: str
    suffix: str
    middle: str


FORMS = (
    FillIn("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen
    FillIn("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    FillIn("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    FillIn("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    FillIn("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)


def with_suffix(tokenizer: Tokenizer, prompts: list[list[int]], suffix: str) -> list[list[int]]:
    """Prompts of token ids as prefixes, each with what asks for the text between it and the suffix. ValueError, fit
    for the client to read, where the model's tokenizer has no such tokens."""
    for form in FORMS:
        before, between, after = map(
            tokenizer.backend.token_to_id, (form.prefix, form.suffix, form.middle)
        )
        if before is not None and between is not None and after is not None:
            behind = [between, *tokenizer.encode(suffix, add_special_tokens=False), after]
            return [[before, *prompt, *behind] for prompt in prompts]
    raise ValueError("this model has no tokens to fill in the middle with")
