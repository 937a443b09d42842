"""Architectures by name: the one table that serving, converting and GGUF files look in.

    config.json "architectures" -> else "model_type" -> Architecture -> ModelSpec   (multimodal.py: of the text part)
    GGUF "general.architecture" -> Architecture -> config.json -> ModelSpec

A new architecture is a function Config -> ModelSpec in its family's file and a line in ARCHITECTURES.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from . import (
    deepseek,
    dots,
    encoders,
    gemma,
    gemma3n,
    gemma4,
    glm,
    gpt_oss,
    granite,
    lfm2,
    llama,
    mamba,
    minicpm,
    ministral,
    mistral,
    muse_glimmer,
    nemotron,
    olmo,
    phi,
    qwen,
    qwen3_5,
    seed_oss,
    smollm3,
)
from .base import ModelSpec
from .config import Config
from .gguf import GgufFamily
from .multimodal import CLASSES, is_multimodal, layout, text_config


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model class of transformers."""

    name: str  # in config.json's "architectures"
    model_type: str
    spec: Callable[[Config], ModelSpec]
    gguf: tuple[str, GgufFamily] | None = None  # general.architecture, and what it means


ARCHITECTURES = (
    Architecture("LlamaForCausalLM", "llama", llama.spec, ("llama", llama.GGUF)),
    Architecture("MistralForCausalLM", "mistral", mistral.spec),
    Architecture("MixtralForCausalLM", "mixtral", mistral.mixtral),
    Architecture("MinistralForCausalLM", "ministral", ministral.ministral),
    Architecture("Ministral3ForCausalLM", "ministral3", ministral.ministral3),
    Architecture("Qwen2ForCausalLM", "qwen2", qwen.qwen2, ("qwen2", qwen.QWEN2_GGUF)),
    Architecture("Qwen3ForCausalLM", "qwen3", qwen.qwen3, ("qwen3", qwen.QWEN3_GGUF)),
    Architecture("Qwen2MoeForCausalLM", "qwen2_moe", qwen.qwen2_moe),
    Architecture(
        "Qwen3MoeForCausalLM", "qwen3_moe", qwen.qwen3_moe, ("qwen3moe", qwen.QWEN3_MOE_GGUF)
    ),
    Architecture(
        "Qwen3_5ForCausalLM", "qwen3_5_text", qwen3_5.qwen3_5, ("qwen35", qwen3_5.QWEN3_5_GGUF)
    ),
    Architecture(
        "Qwen3_5MoeForCausalLM",
        "qwen3_5_moe_text",
        qwen3_5.qwen3_5_moe,
        ("qwen35moe", qwen3_5.QWEN3_5_MOE_GGUF),
    ),
    Architecture("Qwen3NextForCausalLM", "qwen3_next", qwen3_5.qwen3_next),
    Architecture("Lfm2ForCausalLM", "lfm2", lfm2.lfm2),
    Architecture("Lfm2MoeForCausalLM", "lfm2_moe", lfm2.lfm2_moe),
    Architecture("Lfm3ForCausalLM", "lfm3", lfm2.lfm3),
    Architecture("SeedOssForCausalLM", "seed_oss", seed_oss.spec),
    Architecture("SmolLM3ForCausalLM", "smollm3", smollm3.spec),
    Architecture("Phi3ForCausalLM", "phi3", phi.phi3),
    Architecture("GptOssForCausalLM", "gpt_oss", gpt_oss.spec, ("gpt-oss", gpt_oss.GGUF)),
    Architecture("GraniteForCausalLM", "granite", granite.spec),
    Architecture("GraniteMoeForCausalLM", "granitemoe", granite.moe),
    Architecture("GraniteMoeSharedForCausalLM", "granitemoeshared", granite.moe_shared),
    Architecture("GraniteMoeHybridForCausalLM", "granitemoehybrid", granite.hybrid),
    Architecture("GraniteSWAForCausalLM", "granite_swa", granite.swa),
    Architecture("GraniteMoeSWAForCausalLM", "granitemoe_swa", granite.moe_swa),
    Architecture("BambaForCausalLM", "bamba", mamba.bamba),
    Architecture("Mamba2ForCausalLM", "mamba2", mamba.pure),
    Architecture("NemotronHForCausalLM", "nemotron_h", nemotron.nemotron_h),
    Architecture("Olmo2ForCausalLM", "olmo2", olmo.olmo2),
    Architecture("Olmo3ForCausalLM", "olmo3", olmo.olmo3),
    Architecture("OlmoeForCausalLM", "olmoe", olmo.olmoe, ("olmoe", olmo.OLMOE_GGUF)),
    Architecture("DeepseekV2ForCausalLM", "deepseek_v2", deepseek.deepseek_v2),
    Architecture("DeepseekV3ForCausalLM", "deepseek_v3", deepseek.deepseek_v3),
    Architecture("YoutuForCausalLM", "youtu", deepseek.youtu),
    Architecture("Glm4MoeForCausalLM", "glm4_moe", glm.glm4_moe),
    Architecture("Glm4MoeLiteForCausalLM", "glm4_moe_lite", glm.glm4_moe_lite),
    Architecture("MiniCPM3ForCausalLM", "minicpm3", minicpm.minicpm3),
    Architecture("Mistral4ForCausalLM", "mistral4", ministral.mistral4),
    Architecture("Dots1ForCausalLM", "dots1", dots.dots1),
    Architecture("GemmaForCausalLM", "gemma", gemma.gemma),
    Architecture("Gemma2ForCausalLM", "gemma2", gemma.gemma2),
    Architecture("Gemma3nForCausalLM", "gemma3n_text", gemma3n.spec),
    Architecture("Gemma4ForCausalLM", "gemma4_text", gemma4.spec),
    Architecture("Gemma4UnifiedForCausalLM", "gemma4_unified_text", gemma4.unified),
    Architecture("MuseGlimmerForConditionalGeneration", "muse_glimmer_text", muse_glimmer.spec),
    Architecture("Gemma3ForCausalLM", "gemma3_text", gemma.gemma3, ("gemma3", gemma.GEMMA3_GGUF)),
)
GGUF = {entry.gguf[0]: entry.gguf[1] for entry in ARCHITECTURES if entry.gguf is not None}


def model_spec(config: Mapping[str, Any], names: Collection[str] = ()) -> ModelSpec:
    """What config.json describes. names: of the checkpoint's tensors, which say where in a multimodal model the
    language model lies. UnsupportedError for an architecture or a value that Nibble does not compute, CheckpointError
    for a field that is missing or makes no sense."""
    architecture = find(config)
    try:
        spec = architecture.spec(Config(text_config(config)))
        if not is_multimodal(config):
            return _headless(spec) if _is_headless(spec, names) else spec
        prefix, head = layout(names)
        return replace(spec, prefix=prefix, head=head)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise CheckpointError(
            f"config.json makes no sense: {error}".splitlines()[0],
            fix="take config.json from the original model",
        ) from error


def _is_headless(spec: ModelSpec, names: Collection[str]) -> bool:
    """Whether tensors have the names of the decoder alone (QwenModel in QwenForCausalLM)."""
    whole = any(name.startswith((spec.prefix, f"{spec.head}.")) for name in names)
    return spec.prefix == "model." and not whole and any(n.startswith("layers.") for n in names)


def _headless(spec: ModelSpec) -> ModelSpec:
    return replace(spec, prefix="", headless=True, tie_word_embeddings=True)


def find(config: Mapping[str, Any]) -> Architecture:
    """The entry of a config.json, also of the decoder alone. Raises UnsupportedError naming those that there are."""
    config = text_config(config)
    names = config.get("architectures") or []
    if not isinstance(names, list):
        names = [names]
    for entry in ARCHITECTURES:
        bare = entry.name.replace("ForCausalLM", "Model")
        if {entry.name, bare} & set(names) or (
            not names and entry.model_type == config.get("model_type")
        ):
            return entry
    what = ", ".join(map(str, names)) or f"of model_type {config.get('model_type')!r}"
    if encoders.find(config) is not None:
        raise UnsupportedError(
            f"config.json: architecture {what} is an encoder: `nibble serve` takes it, for embeddings and scores; it "
            "generates no text and is not converted"
        )
    inside = "ForConditionalGeneration"
    causal, others = (
        ", ".join(name.removesuffix(kind) for name in known if name.endswith(kind))
        for kind, known in (
            ("ForCausalLM", [entry.name for entry in ARCHITECTURES]),
            (inside, sorted(CLASSES)),
        )
    )
    raise UnsupportedError(
        f"config.json: architecture {what} is not supported; Nibble serves and converts what is called ForCausalLM of "
        f"{causal}, and {inside} of {others}"
    )
