"""nomic-embed-text: BERT with rotary positions and gated feed-forwards. Its checkpoints name config fields as GPT-2
does and were written by code of their own; what transformers writes has its own names for the fields alone."""

from collections.abc import Collection
from typing import Any

from ..errors import UnsupportedError
from .config import Config
from .encoder import EncoderNames, EncoderSpec, prefix_in
from .rope import Rope

_NAMES = EncoderNames(
    word="embeddings.word_embeddings",
    position="",
    token_type="embeddings.token_type_embeddings",
    embedding_norm="emb_ln",
    layer="encoder.layers.{}",
    qkv=("attn.Wqkv",),
    out="attn.out_proj",
    up=("mlp.fc12", "mlp.fc11"),
    down="mlp.fc2",
    attention_norm="norm1",
    mlp_norm="norm2",
)
_OLDER = {  # transformers' name -> the original's
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "layer_norm_eps": "layer_norm_epsilon",
}
_ONLY: dict[str, tuple[Any, ...]] = {  # a field of the original -> what of it is computed
    "activation_function": ("swiglu",),
    "hidden_act": ("silu",),
    "rotary_emb_fraction": (1, 1.0),
    "rotary_emb_interleaved": (False,),
    "rotary_emb_scale_base": (),
    "rotary_scaling_factor": (),
    "prenorm": (False,),
    "use_rms_norm": (False,),
    "causal": (False,),
    "num_experts": (0,),
    "moe_every_n_layers": (0,),
}


def spec(config: Config, names: Collection[str], head: bool) -> EncoderSpec:
    if head:
        raise UnsupportedError("config.json: nomic-bert with a classifier is not supported")
    own = {new: config.get(old) for new, old in _OLDER.items() if config.get(old) is not None}
    config = Config({**config.values, **own})
    for field, allowed in _ONLY.items():
        value = config.get(field)
        if value is not None and value not in allowed:
            wanted = " or ".join(map(repr, allowed)) or "null"
            raise UnsupportedError(f"config.json: {field} {value!r} is not supported ({wanted} is)")
    layers, hidden = config.size("num_hidden_layers", 12), config.size("hidden_size", 768)
    rope = config.rope(theta=config.positive("rotary_emb_base", 1000.0))
    return EncoderSpec(
        hidden_size=hidden,
        vocab_size=config.size("vocab_size"),
        num_layers=layers,
        num_heads=config.size("num_attention_heads", 12),
        intermediate_size=_rounded(config.size("intermediate_size", 4 * hidden), config),
        max_tokens=config.size("max_position_embeddings", 2048),
        norm_eps=config.epsilon("layer_norm_eps", 1e-12),
        activation="silu",
        names=_NAMES,
        prefix=prefix_in(names, "nomic_bert.") or prefix_in(names, "bert."),
        gated=True,
        position_offset=None,
        token_types=config.count("type_vocab_size", 2),
        ropes=_each(rope, layers),
    )


def _rounded(size: int, config: Config) -> int:
    """The original makes whole multiples of 256 of it; transformers takes it as it is."""
    return size if config.get("n_inner") is None else -(-size // 256) * 256


def _each(rope: Rope, layers: int) -> tuple[Rope, ...]:
    return (rope,) * layers
