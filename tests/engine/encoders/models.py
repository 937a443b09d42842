"""Tiny seeded encoders of transformers, saved as checkpoints, and what transformers makes of texts: the oracle."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    ModernBertConfig,
    MPNetConfig,
    NomicBertConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

VOCAB = 128
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 200,
    "layer_norm_eps": 1e-5,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**_SIZES, type_vocab_size=2),
    "roberta": RobertaConfig(**_SIZES, type_vocab_size=1, pad_token_id=1, hidden_act="relu"),
    "xlm-roberta": XLMRobertaConfig(**_SIZES, type_vocab_size=1, pad_token_id=1),
    "camembert": CamembertConfig(
        **_SIZES, type_vocab_size=1, pad_token_id=1, hidden_act="gelu_new"
    ),
    "mpnet": MPNetConfig(**_SIZES),
    "distilbert": DistilBertConfig(
        vocab_size=VOCAB,
        dim=64,
        hidden_dim=96,
        n_layers=3,
        n_heads=4,
        max_position_embeddings=200,
    ),
    "nomic_bert": NomicBertConfig(**_SIZES, type_vocab_size=2),
    "modernbert": ModernBertConfig(
        **{k: v for k, v in _SIZES.items() if k != "layer_norm_eps"},
        local_attention=16,
        norm_bias=False,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        cls_token_id=2,
        sep_token_id=3,
        global_attn_every_n_layers=2,
    ),
}
CLASSIFIERS = sorted(CONFIGS.keys() - {"nomic_bert"})


def save(folder: Path, name: str, classifier: bool = False) -> Path:
    """A tiny model whose every weight matters, with a tokenizer of words."""
    config = type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict())
    torch.manual_seed(sum(map(ord, name)))
    if classifier:
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = AutoModel.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():  # far from what they begin as: norms not 1, biases not 0
            width = weight.shape[-1] ** -0.5 if weight.dim() == 2 else 0.3
            plain = weight if weight.dim() == 1 and bool((weight == 1).all()) else 0.0
            weight.copy_(plain + 1.5 * width * torch.randn_like(weight))
    model.save_pretrained(folder)
    write_word_tokenizer(folder)
    return folder


def rewrite(file: Path, **changes) -> None:
    """A JSON object with these fields; those that are ... are taken out."""
    content = json.loads(file.read_text()) if file.exists() else {}
    content |= changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def write_word_tokenizer(folder: Path) -> None:
    """Words w4 .. w127 are their numbers; [CLS] 2 and [SEP] 3 stand around a text, 0 for any other word."""
    specials = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]
    vocab = {name: i for i, name in enumerate(specials)} | {f"w{i}": i for i in range(4, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    rewrite(
        folder / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
    )


def words(count: int, seed: int = 0) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(4, VOCAB, (count,), generator=generator))


def ids(text: str) -> list[int]:
    return [2, *(int(word[1:]) for word in text.split()), 3]


def pair_ids(first: str, second: str) -> tuple[list[int], int]:
    """And where the second part begins."""
    begin = ids(first)
    return begin + ids(second)[1:], len(begin)


@torch.inference_mode()
def hidden(folder: Path, token_ids: list[int]) -> Tensor:
    """[T, hidden_size] by transformers, of one text alone."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model(input_ids=torch.tensor([token_ids])).last_hidden_state[0]


@torch.inference_mode()
def logit(folder: Path, token_ids: list[int], second_part: int) -> float:
    """Of a tiny cross-encoder, by transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = {"input_ids": torch.tensor([token_ids])}
    if getattr(model.config, "type_vocab_size", 1) > 1:
        types = [0] * second_part + [1] * (len(token_ids) - second_part)
        inputs["token_type_ids"] = torch.tensor([types])
    return model(**inputs).logits.item()


def write_modules(folder: Path, mode: str, *steps: str) -> None:
    """sentence-transformers' side files: pooling, then steps ("Normalize", "Dense")."""
    kinds = ["Transformer", "Pooling", *steps]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 64, f"pooling_mode_{mode}": True})
    )
