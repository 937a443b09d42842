"""Encoders by name: the table that says whether a checkpoint is one.

    config.json "architectures" -> else "model_type" -> a family's function -> EncoderSpec

A new one is a function in its family's file and a line in FAMILIES. Its classes are the bare model, what was trained to
fill masks, whose head is left aside, and a classifier, which makes a cross-encoder of it.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from . import bert, modernbert, nomic_bert
from .config import Config
from .encoder import EncoderSpec

_CLASSIFIER = "ForSequenceClassification"
_ENDINGS = ("Model", "ForMaskedLM", _CLASSIFIER)


@dataclass(frozen=True, slots=True)
class EncoderFamily:
    """The classes of transformers that begin with one name."""

    name: str
    model_type: str
    spec: Callable[[Config, Collection[str], bool], EncoderSpec]  # of tensor names; with a head?


FAMILIES = (
    EncoderFamily("Bert", "bert", bert.bert),
    EncoderFamily("Roberta", "roberta", bert.roberta),
    EncoderFamily("XLMRoberta", "xlm-roberta", bert.roberta),
    EncoderFamily("Camembert", "camembert", bert.roberta),
    EncoderFamily("MPNet", "mpnet", bert.mpnet),
    EncoderFamily("DistilBert", "distilbert", bert.distilbert),
    EncoderFamily("NomicBert", "nomic_bert", nomic_bert.spec),
    EncoderFamily("ModernBert", "modernbert", modernbert.spec),
)


def find(config: Mapping[str, Any]) -> tuple[EncoderFamily, bool] | None:
    """The family of a config.json, and whether it is of a classifier; None: it is of no encoder."""
    named = config.get("architectures") or []
    names = [str(name) for name in named] if isinstance(named, list) else [str(named)]
    for family in FAMILIES:
        for ending in _ENDINGS:
            if family.name + ending in names:
                return family, ending == _CLASSIFIER
        if not names and config.get("model_type") == family.model_type:
            return family, False
    return None


def encoder_spec(config: Mapping[str, Any], names: Collection[str]) -> EncoderSpec:
    """What config.json describes. names: of the checkpoint's tensors. UnsupportedError for a value that is not
    computed, CheckpointError for a field that is missing or makes no sense. ValueError where it is of no encoder."""
    found = find(config)
    if found is None:
        raise ValueError("no encoder")
    family, head = found
    try:
        return family.spec(Config(config), names, head)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise CheckpointError(
            f"config.json makes no sense: {error}".splitlines()[0],
            fix="take config.json from the original model",
        ) from error
