"""What becomes of a text's hidden states: as a request asks for it, and as the checkpoint's files say it. No torch.

    modules.json                          the steps: Transformer, Pooling, then Dense and Normalize in any order
    1_Pooling/config.json                 cls, mean or the last token
    2_Dense/config.json, .safetensors     a projection
    sentence_bert_config.json             max_seq_length, do_lower_case
    config_sentence_transformers.json     prompts, and which one is a text's unless it asks for another

These are sentence-transformers' files. Where there is no modules.json, an encoder's embedding is the mean of all
tokens, a decoder's its last, and both are normalized.
"""

from pathlib import Path
from typing import Any, Literal

import msgspec

from ..architectures import limits
from ..errors import CheckpointError, UnsupportedError
from ..quant.files import read_bounded

Task = Literal["generate", "embed", "score"]
Mode = Literal["cls", "mean", "lasttoken"]
NORMALIZE = "normalize"  # a step; any other is the folder of a projection
MODES: tuple[Mode, ...] = ("cls", "mean", "lasttoken")
# Before sentence-transformers 6, a flag for each
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_MAX_MODULES = 16


class Pooling(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one request wants of its prompt's hidden states, in place of tokens."""

    task: Literal["embed", "score"] = "embed"
    dimensions: int | None = None  # the first so many, of length 1 again; None: all
    unit: bool = False  # of length 1, whatever the checkpoint says: for cosines
    second_part: int = 0  # where the tokens of the second text of a pair begin; 0: there is none


class EmbeddingInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the server must know of a model that embeds."""

    dimensions: int
    prompts: dict[str, str] = {}  # name -> what is put before a text
    default_prompt: str | None = None  # the name of the one that texts get that ask for none
    lower_case: bool = False  # texts are made so before anything else


class EmbeddingFiles(msgspec.Struct, frozen=True):
    """What a checkpoint's files say."""

    mode: Mode
    steps: tuple[str, ...] = (NORMALIZE,)
    lower_case: bool = False
    prompts: dict[str, str] = {}
    default_prompt: str | None = None


def read_files(path: Path, default: Mode) -> EmbeddingFiles:
    """Of a checkpoint's folder; of a file, what holds without. UnsupportedError for what is not computed."""
    if not (path / "modules.json").is_file():
        return EmbeddingFiles(default)
    mode, steps = _modules(path)
    own = _object(path / "sentence_bert_config.json")
    texts = _object(path / "config_sentence_transformers.json")
    prompts, chosen = texts.get("prompts") or {}, texts.get("default_prompt_name")
    if not (isinstance(prompts, dict) and all(isinstance(p, str) for p in prompts.values())):
        raise _senseless(path / "config_sentence_transformers.json", "prompts are no texts")
    if chosen is not None and chosen not in prompts:
        raise _senseless(
            path / "config_sentence_transformers.json", f"there is no prompt {chosen!r}"
        )
    return EmbeddingFiles(
        mode,
        steps,
        own.get("do_lower_case") is True,
        {name: text for name, text in prompts.items() if text},
        chosen if prompts.get(chosen) else None,
    )


class EncoderFiles(msgspec.Struct, frozen=True):
    """What they say of an encoder whatever it is for."""

    max_seq_length: int | None
    activation: str | None  # of a cross-encoder's score; older files name it in config.json


def read_encoder_files(path: Path) -> EncoderFiles:
    own = _object(path / "sentence_bert_config.json")
    found = _object(path / "config_sentence_transformers.json").get("activation_fn")
    return EncoderFiles(_length(path, own), found if isinstance(found, str) else None)


def _modules(path: Path) -> tuple[Mode, tuple[str, ...]]:
    file = path / "modules.json"
    modules = _json(file)
    if not isinstance(modules, list) or not 0 < len(modules) <= _MAX_MODULES:
        raise _senseless(file, "is no list of modules")
    mode: Mode | None = None
    steps: list[str] = []
    for module in modules:
        kind, folder = (str(module.get(key, "")) for key in ("type", "path"))
        kind = kind.rpartition(".")[2]
        if kind == "Transformer":
            continue
        if folder != Path(folder).name:  # of this checkpoint, and nothing above it
            raise _senseless(file, f"{folder!r} is no folder in it")
        if kind == "Pooling" and mode is None:
            mode = _mode(path / folder / "config.json")
        elif kind == "Dense" and mode is not None:
            steps.append(folder)
        elif kind == "Normalize" and mode is not None:
            steps.append(NORMALIZE)
        else:
            raise UnsupportedError(
                f"{file}: a module {kind!r} is not supported there (one Pooling, then Dense and Normalize are)"
            )
    if mode is None:
        raise UnsupportedError(f"{file}: a model without Pooling is not supported")
    return mode, tuple(steps)


def _mode(file: Path) -> Mode:
    config = _object(file)
    found = config.get("pooling_mode") or [n for flag, n in _FLAGS.items() if config.get(flag)]
    modes = [found] if isinstance(found, str) else found or ["mean"]
    if len(modes) != 1 or modes[0] not in MODES:
        raise UnsupportedError(
            f"{file}: pooling by {' and '.join(map(str, modes))} is not supported (one of {', '.join(MODES)} is)"
        )
    if config.get("include_prompt") is False:
        raise UnsupportedError(f"{file}: include_prompt false is not supported")
    mode: Mode = modes[0]
    return mode


def _length(path: Path, own: dict[str, Any]) -> int | None:
    """sentence_bert_config.json's, else the tokenizer's own; those that say nothing write a number with 30 digits."""
    found = own.get("max_seq_length")
    if found is None:
        found = _object(path / "tokenizer_config.json").get("model_max_length")
    plausible = isinstance(found, (int, float)) and 1 <= found <= limits.MAX_SIZE
    return int(found) if plausible and not isinstance(found, bool) else None  # type: ignore[arg-type]


def _object(file: Path) -> dict[str, Any]:
    found = _json(file)
    if not isinstance(found, dict):
        raise _senseless(file, "holds no JSON object")
    return found


def _json(file: Path) -> Any:
    """{} where there is no such file."""
    if not file.is_file():
        return {}
    try:
        return msgspec.json.decode(read_bounded(file, limits.MAX_JSON_BYTES))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _senseless(file, f"cannot be read as JSON: {error}") from None


def _senseless(file: Path, problem: str) -> CheckpointError:
    return CheckpointError(problem, file=file, fix="take it from the original model")
