"""Log-probabilities in OpenAI's two styles.

    chat          {"content": [{"token", "logprob", "bytes", "top_logprobs": [{"token", "logprob", "bytes"}]}]}
    completions   {"tokens": [], "token_logprobs": [], "top_logprobs": [{token: logprob}], "text_offset": []}

A token's logprob and its entry among the alternatives are the same float: lm-eval decides whether a token was greedy
by comparing them for equality.
"""

from collections.abc import Sequence
from typing import Any

from ...engine.messages import TokenLogprobs
from ...engine.text.tokenizer import Tokenizer

_LOWEST = -9999.0  # JSON has no -inf


def chat_logprobs(
    tokenizer: Tokenizer, positions: Sequence[TokenLogprobs], top_n: int
) -> dict[str, Any]:
    """`positions` in the chat style, with `top_n` alternatives each."""
    content = []
    for position in positions:
        top = [
            _chat_token(tokenizer, token_id, logprob) for token_id, logprob in _top(position, top_n)
        ]
        content.append(
            _chat_token(tokenizer, position.token_id, _own(position)) | {"top_logprobs": top}
        )
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer,
    positions: Sequence[TokenLogprobs | None],
    token_ids: Sequence[int],
    offsets: Sequence[int],
    top_n: int,
) -> dict[str, list[Any]]:
    """`positions` in the completions style; None (a prompt's first token) has no probability, only its token id.

    `offsets` says where in the choice's text each token starts, in characters.
    """
    result: dict[str, list[Any]] = {
        "text_offset": list(offsets),
        "token_logprobs": [],
        "tokens": [],
        "top_logprobs": [],
    }
    for position, token_id in zip(positions, token_ids, strict=True):
        token = tokenizer.token_str(token_id)
        own = None if position is None else _own(position)
        result["tokens"].append(token)
        result["token_logprobs"].append(own)
        if position is None or not top_n:
            result["top_logprobs"].append(None)
            continue
        top: dict[str, float] = {}
        for alternative, logprob in _top(position, top_n):
            top.setdefault(
                tokenizer.token_str(alternative), logprob
            )  # two ids may read the same: the likelier counts
        result["top_logprobs"].append(top | {token: own})
    return result


def prompt_logprobs(
    tokenizer: Tokenizer, positions: Sequence[TokenLogprobs | None], top_n: int
) -> list[dict[str, Any] | None]:
    """Those of a prompt's tokens as vLLM writes them: for each {id: {"logprob", "rank", "decoded_token"}}, its own and
    the `top_n` most probable; None for the first."""
    return [
        None if position is None else _ranked(tokenizer, position, top_n) for position in positions
    ]


def _ranked(tokenizer: Tokenizer, position: TokenLogprobs, top_n: int) -> dict[str, Any]:
    entries = {position.token_id: (position.rank, _own(position))}
    for rank, (token_id, logprob) in enumerate(_top(position, top_n), start=1):
        entries.setdefault(token_id, (rank, logprob))
    return {
        str(i): {"logprob": logprob, "rank": rank, "decoded_token": tokenizer.token_str(i)}
        for i, (rank, logprob) in entries.items()
    }


def _top(position: TokenLogprobs, n: int) -> list[tuple[int, float]]:
    return [
        (i, max(lp, _LOWEST))
        for i, lp in zip(position.top_ids[:n], position.top_logprobs[:n], strict=True)
    ]


def _own(position: TokenLogprobs) -> float:
    for token_id, logprob in zip(position.top_ids, position.top_logprobs, strict=True):
        if token_id == position.token_id:
            return max(logprob, _LOWEST)
    return max(position.logprob, _LOWEST)


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, object]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}
