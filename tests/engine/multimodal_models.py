"""Tiny seeded transformers models that see, with a language model that Nibble serves, saved as checkpoints."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 199,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_EYE = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
}
_QWEN_IDS = {
    "image_token_id": 5,
    "video_token_id": 6,
    "vision_start_token_id": 7,
    "vision_end_token_id": 8,
}


def _mrope(sections: list[int], **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, **more}
    return {"rope_parameters": rope}


def config(name: str) -> Any:
    """The transformers config of one of NAMES."""
    t = transformers
    match name:
        case "gemma3":
            text = _TEXT | {"query_pre_attn_scalar": 20, "sliding_window": 24}
            return t.Gemma3Config(
                text_config=text, vision_config=_CLIP, mm_tokens_per_image=4, image_token_index=5
            )
        case "gemma4":
            text = _TEXT | {"global_head_dim": 32, "sliding_window": 24}
            text |= {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 199}
            return t.Gemma4Config(
                text_config=text, vision_config=_CLIP, audio_config=None, image_token_id=5
            )
        case "gemma4_unified":
            text = _TEXT | {"global_head_dim": 32, "sliding_window": 24}
            return t.Gemma4UnifiedConfig(
                text_config=text,
                vision_config={"mm_embed_dim": 32, "output_proj_dims": 64},
                audio_config=None,
                image_token_id=5,
            )
        case "mistral3":
            return t.Mistral3Config(
                text_config=t.MistralConfig(**_TEXT, sliding_window=None),
                vision_config=t.PixtralVisionConfig(**_CLIP, head_dim=16),
                image_token_index=5,
                spatial_merge_size=1,
            )
        case "muse_glimmer":
            text = _TEXT | {"sliding_window": 24, "output_multiplier": 0.5}
            return t.MuseGlimmerConfig(
                text_config=text,
                vision_config={
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "pos_emb_height": 4,
                    "pos_emb_width": 4,
                },
                image_token_id=6,  # which are masked, and in no answer
                video_token_id=7,
                out_hidden_size=64,
                projector_hidden_size=48,
            )
        case "mistral4":
            text = {key: value for key, value in _TEXT.items() if key != "head_dim"}
            text |= {"num_key_value_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 32}
            text |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32}
            text |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
            return t.Mistral3Config(
                text_config=t.Mistral4Config(**text),
                vision_config=t.PixtralVisionConfig(**_CLIP, head_dim=16),
                image_token_index=5,
                spatial_merge_size=1,
            )
        case "qwen2_vl":
            eye = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
            text = _TEXT | _mrope([2, 3, 3])
            return t.Qwen2VLConfig(text_config=text, vision_config=eye, **_QWEN_IDS)
        case "qwen2_5_vl":
            eye = _QWEN_EYE | {"fullatt_block_indexes": [1]}
            text = _TEXT | _mrope([2, 3, 3])
            return t.Qwen2_5_VLConfig(text_config=text, vision_config=eye, **_QWEN_IDS)
        case "qwen3_vl":
            eye = _QWEN_EYE | {"num_position_embeddings": 64, "deepstack_visual_indexes": [1]}
            text = _TEXT | _mrope([4, 2, 2], mrope_interleaved=True)
            return t.Qwen3VLConfig(text_config=text, vision_config=eye, **_QWEN_IDS)
        case "qwen3_vl_moe":
            eye = _QWEN_EYE | {"num_position_embeddings": 64, "deepstack_visual_indexes": [1]}
            text = _TEXT | _mrope([4, 2, 2], mrope_interleaved=True)
            text |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
            return t.Qwen3VLMoeConfig(text_config=text, vision_config=eye, **_QWEN_IDS)
        case "qwen3_5" | "qwen3_5_moe":
            text = _TEXT | _mrope([2, 1, 1], partial_rotary_factor=0.5) | {"head_dim": 32}
            text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
            text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 32}
            eye = _QWEN_EYE | {"num_position_embeddings": 64}
            if name == "qwen3_5":
                return t.Qwen3_5Config(text_config=text, vision_config=eye, **_QWEN_IDS)
            text |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
            text |= {"shared_expert_intermediate_size": 80}
            return t.Qwen3_5MoeConfig(text_config=text, vision_config=eye, **_QWEN_IDS)
        case "llava":
            text = t.LlamaConfig(**_TEXT)
            eye = t.CLIPVisionConfig(**_CLIP)
            return t.LlavaConfig(text_config=text, vision_config=eye, image_token_index=5)
        case "smolvlm":
            text = t.LlamaConfig(**_TEXT)
            return t.SmolVLMConfig(
                text_config=text, vision_config=_CLIP, image_token_id=5, scale_factor=2
            )
        case "idefics3":
            text = t.LlamaConfig(**_TEXT)
            return t.Idefics3Config(
                text_config=text, vision_config=_CLIP, image_token_id=5, scale_factor=2
            )
        case "internvl":
            eye = t.InternVLVisionConfig(**_CLIP | {"image_size": [28, 28], "patch_size": [14, 14]})
            return t.InternVLConfig(
                text_config=t.Qwen2Config(**_TEXT), vision_config=eye, image_token_id=5
            )
    raise ValueError(name)


NAMES = (
    "gemma3",
    "gemma4",
    "gemma4_unified",
    "mistral3",
    "muse_glimmer",
    "mistral4",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "llava",
    "smolvlm",
    "idefics3",
    "internvl",
)


def build(name: str, folder: Path) -> PreTrainedModel:
    """A float32 model with weights large enough that mistakes show, saved into `folder`."""
    torch.manual_seed(7)
    model = AutoModelForImageTextToText.from_config(config(name), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.15))
    model.save_pretrained(folder)
    return model


def rename(folder: Path, old: str, new: str) -> None:
    """The tensors whose names begin with `old`, named as another version of transformers did."""
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        new + name.removeprefix(old) if name.startswith(old) else name: tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})


def text_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """float32 [T, vocab]"""
    with torch.no_grad():
        return model(input_ids=torch.tensor([token_ids])).logits[0]
