"""Models that also see or hear: the causal language model inside them, which is what Nibble serves and converts.

    config.json   text_config, of a model_type of its own (Qwen 2 VL of before transformers 4.52: the top level itself)
    tensors       LAYOUTS: where the language model lies, as each age of transformers wrote it

Encoders and projectors are neither read nor changed. Tokens of text alone have the same position in every section of a
multimodal rotary embedding, so it is the plain one to them.
"""

from collections.abc import Collection, Mapping
from typing import Any

CLASSES = frozenset(
    f"{name}ForConditionalGeneration"
    for name in (
        "Gemma3",
        "Gemma3n",
        "Gemma4",
        "Gemma4Unified",
        "Idefics3",
        "InternVL",
        "Llava",
        "Mistral3",
        "MuseGlimmer",
        "Qwen2VL",
        "Qwen2_5_VL",
        "Qwen3VL",
        "Qwen3VLMoe",
        "Qwen3_5",
        "Qwen3_5Moe",
        "SmolVLM",
    )
)
# (prefix of the language model's tensors, module of its output head)
LAYOUTS = (
    ("model.language_model.", "lm_head"),
    ("language_model.model.", "language_model.lm_head"),
    ("model.text_model.", "lm_head"),
    ("model.", "lm_head"),
)
_SAME_AS = {  # model_type of a text_config -> that of the language model which it is
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
_IMPLIED = {"qwen3_vl_moe_text": {"norm_topk_prob": True}}  # what goes without saying there
_INHERITED = ("eos_token_id", "dtype", "torch_dtype")  # where text_config does not say


def is_multimodal(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures")
    return isinstance(names, list) and not CLASSES.isdisjoint(
        n for n in names if isinstance(n, str)
    )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json says of the causal language model: all of it, or of a multimodal model its part."""
    if not is_multimodal(config):
        return config
    found = config.get("text_config")
    text = dict(found) if isinstance(found, Mapping) else dict(config)
    kind = text.get("model_type")
    text |= _IMPLIED.get(kind, {}) if isinstance(kind, str) else {}
    text["model_type"] = _SAME_AS.get(kind, kind) if isinstance(kind, str) else kind
    text["architectures"] = None
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(text.get(name), Mapping):
            text[name] = _plain_rope(text[name])
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    text["tie_word_embeddings"] = True if tied is None else tied  # a head in the file counts
    for name in _INHERITED:
        if text.get(name) is None and config.get(name) is not None:
            text[name] = config[name]
    return text


def _plain_rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Without the sections; "mrope" is what older files call the default with them."""
    plain = {key: value for key, value in parameters.items() if not key.startswith("mrope_")}
    return {key: "default" if value == "mrope" else value for key, value in plain.items()}


def layout(names: Collection[str]) -> tuple[str, str]:
    """The one of LAYOUTS that a checkpoint's tensors have; the newest where none is to be seen."""
    for prefix, head in LAYOUTS:
        if any(name.startswith(f"{prefix}embed_tokens.") for name in names):
            return prefix, head
    return LAYOUTS[0]


def other_parts(config: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """Modules that hold what is not of the language model's layers ("vision_tower"; what drafts tokens: "mtp", or a
    layer behind them, "layers.61"), without the "model." that newer checkpoints have before them."""
    if not is_multimodal(config):
        return sorted({part for name in names if (part := _drafting(config, name))})
    prefix, head = layout(names)
    others = (name for name in names if not name.startswith((prefix, f"{head}.")))
    return sorted({name.removeprefix("model.").partition(".")[0] for name in others})


def _drafting(config: Mapping[str, Any], name: str) -> str:
    """The part of a tensor that drafts tokens, "" of others."""
    parts, depth = name.removeprefix("model.").split("."), config.get("num_hidden_layers")
    if parts[0] == "mtp":
        return "mtp"
    behind = parts[0] == "layers" and len(parts) > 2 and parts[1].isdecimal()
    return (
        ".".join(parts[:2]) if behind and isinstance(depth, int) and int(parts[1]) >= depth else ""
    )
