"""Deltas as TGI writes them: one object, or an event for each token, the last of which has the whole text.

data:{"index", "token": {"id", "text", "logprob", "special"}, "generated_text": null, "details": null}
"""

from itertools import pairwise
from typing import Any

from fastapi import Response

from ...engine.messages import TokenLogprobs
from ...engine.text.tokenizer import Tokenizer
from .. import errors
from ..generation import Delta, Sequence
from ..openai.answer import Answer, AnswerBody, encode, json_response
from ..openai.completions import most_probable
from .errors import error_body
from .schema import GenerateRequest

Json = dict[str, Any]


class GenerationAnswer(Answer):
    """Of one prompt; of several samples the most probable is the answer, the others are among its details."""

    def __init__(
        self, asked: GenerateRequest, body: AnswerBody, tokenizer: Tokenizer, listed: bool
    ):
        """listed: one object comes as a list of one, as POST / gives it."""
        super().__init__(body, "")
        self.asked, self.tokenizer, self.listed = asked.parameters, tokenizer, listed
        self.prompt = asked.inputs if asked.parameters.return_full_text else ""
        self.text = ""  # what was streamed

    def begin(self, generation_id: str) -> None:
        """TGI's answers bear no id."""

    def whole(self, deltas: list[Delta], usage: Json) -> Response:
        best, *others = most_probable(deltas, len(deltas))
        answer: Json = {"generated_text": self.prompt + best.text}
        if self.asked.details or self.asked.decoder_input_details:
            details = self._of(best) | {"prefill": self._prefill(best.sequence)}
            details["tokens"] = self._tokens(best)
            details |= self._top_tokens(best)
            if others:
                details["best_of_sequences"] = [
                    {
                        "generated_text": self.prompt + other.text,
                        **self._of(other),
                        "prefill": details["prefill"],
                        "tokens": self._tokens(other),
                        **self._top_tokens(other),
                    }
                    for other in others
                ]
            answer["details"] = details
        return json_response([answer] if self.listed else answer)

    def event(self, delta: Delta) -> bytes:
        sequence = delta.sequence
        tokens = self._tokens(delta, len(self.text))
        tops = self._top_tokens(delta).get("top_tokens", [[]] * len(tokens))
        self.text += delta.text
        if delta.finish_reason is not None and not tokens:  # text alone was held back
            tokens, tops = [_token(self.tokenizer, None, delta.text)], [[]]
        events: list[Json] = []
        first = sequence.num_tokens - len(tokens) + 1
        for index, (token, top) in enumerate(zip(tokens, tops, strict=True), start=first):
            event = {"index": index, "token": token, "generated_text": None, "details": None}
            events.append(event | ({"top_tokens": top} if top else {}))
        if delta.finish_reason is not None:
            events[-1]["generated_text"] = self.prompt + self.text
            events[-1]["details"] = self._of(delta) | {
                "input_length": len(sequence.prompt_token_ids)
            }
        return b"".join(b"data:" + encode(event) + b"\n\n" for event in events)

    def closing(self, usage: Json) -> bytes:
        return b""

    def failure(self, error: errors.ApiError) -> bytes:
        return b"data:" + error_body(error) + b"\n\n"

    def _of(self, delta: Delta) -> Json:
        sequence = delta.sequence
        return {
            "finish_reason": _finish_reason(delta),
            "generated_tokens": sequence.num_tokens,
            "seed": sequence.params.seed,
        }

    def _tokens(self, delta: Delta, said: int = 0) -> list[Json]:
        """The tokens of a delta and what each adds to the text; what was held back goes with the last. said: characters
        of the text before the delta's."""
        starts = [min(max(offset - said, 0), len(delta.text)) for offset in delta.offsets[1:]]
        pieces = pairwise([0, *starts, len(delta.text)])
        return [
            _token(self.tokenizer, position, delta.text[begin:end])
            for position, (begin, end) in zip(delta.logprobs or [], pieces, strict=False)
        ]

    def _top_tokens(self, delta: Delta) -> Json:
        count = self.asked.top_n_tokens
        if not count:
            return {}
        special = self.tokenizer.special_ids
        tops = [
            [
                {
                    "id": i,
                    "text": self.tokenizer.token_str(i),
                    "logprob": logprob,
                    "special": i in special,
                }
                for i, logprob in zip(
                    position.top_ids[:count], position.top_logprobs[:count], strict=True
                )
            ]
            for position in delta.logprobs or []
        ]
        return {"top_tokens": tops}

    def _prefill(self, sequence: Sequence) -> list[Json]:
        if not self.asked.decoder_input_details:
            return []
        positions = sequence.prompt_logprobs or []
        return [
            {
                "id": i,
                "text": self.tokenizer.token_str(i),
                "logprob": None if position is None else position.logprob,
            }
            for i, position in zip(sequence.prompt_token_ids, positions, strict=True)
        ]


def _finish_reason(delta: Delta) -> str:
    if delta.finish_reason != "stop":
        return delta.finish_reason or "length"
    return "stop_sequence" if delta.sequence.detokenizer.stopped else "eos_token"


def _token(tokenizer: Tokenizer, position: TokenLogprobs | None, text: str) -> Json:
    if position is None:
        return {"id": 0, "text": text, "logprob": 0.0, "special": False}
    i = position.token_id
    is_special = i in tokenizer.special_ids
    return {
        "id": i,
        "text": tokenizer.token_str(i) if is_special and not text else text,
        "logprob": position.logprob,
        "special": is_special,
    }
