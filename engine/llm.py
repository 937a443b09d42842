"""LLM: an engine in this process, stepped by its caller. torch is imported when one is made, not before.

For an engine in a process of its own, see `client.py`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .config import EngineConfig
from .messages import AddRequest, RequestOutput, TokenLogprobs
from .request import FinishReason
from .sampling_params import SamplingParams
from .text.detokenizer import Detokenizer
from .text.token_sequences import with_token_ids
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Completion:
    """One finished generation."""

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_token_ids: list[int]
    stop_reason: int | str | None = None  # the stop string or stop token id that ended it
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0

    def add(self, output: RequestOutput, detokenizer: Detokenizer) -> None:
        """Take in the next output of the engine. RuntimeError if the request failed."""
        if output.error:
            raise RuntimeError(output.error)
        before = len(detokenizer.token_offsets)
        self.text += detokenizer.push(output.token_ids)
        num_new = (
            len(detokenizer.token_offsets) - before
        )  # fewer than came, if a stop string ended the text
        self.token_ids += output.token_ids[:num_new]
        self.num_cached_tokens = output.num_cached_tokens
        if output.logprobs is not None:
            self.logprobs = (self.logprobs or []) + output.logprobs[:num_new]
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.finish_reason is not None:
            self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
            self.text += detokenizer.finish()
        if detokenizer.stopped:
            self.finish_reason, self.stop_reason = FinishReason.STOP, detokenizer.stop_reason


class LLM:
    """A model in this process.

    >>> LLM("models/SmolLM2-AWQ", max_num_seqs=8).generate("Once upon a time")[0].text
    """

    def __init__(self, model: str, **engine_config: Any):
        """Load `model`: a local folder, a .gguf file or a Hub id. Further arguments are the fields of EngineConfig.

        UserError on bad input.
        """
        from .core import EngineCore  # torch comes in with the runner, when one is made

        config = EngineConfig(model=str(model), **engine_config)
        self.tokenizer = Tokenizer.from_pretrained(model, config.revision)
        self.core = EngineCore(config)
        self._ids = itertools.count()

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """One Completion for each prompt (text or token ids), in order; a single prompt gives a list of one.

        `sampling_params`: one for all or one for each. ValueError for a prompt that cannot be served.
        """
        token_ids = [self._encode(prompt) for prompt in _as_batch(prompts)]
        params = sampling_params or SamplingParams()
        each = [params] * len(token_ids) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(token_ids):
            raise ValueError(f"{len(token_ids)} prompts, but {len(each)} sampling_params")
        return self._run(token_ids, each)

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        parse_special_tokens: bool = False,
    ) -> list[Completion]:
        """The answer to one conversation, or to each of several. Special tokens that are written out in them are text,
        unless parse_special_tokens says otherwise. ValueError if the model has no chat template."""
        conversations: Sequence[Any] = (
            [messages] if messages and isinstance(messages[0], dict) else messages
        )
        prompts = [
            self.tokenizer.encode_chat(
                chat, parse_special_tokens=parse_special_tokens, **(chat_template_kwargs or {})
            )
            for chat in conversations
        ]
        return self.generate(prompts, sampling_params)

    def logits(self, token_ids: list[int]) -> "Tensor":
        """float32 [T, vocab]: the model's logits after each of T tokens."""
        return self.core.runner.logits(token_ids)

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Completion]:
        done: dict[str, tuple[Completion, Detokenizer]] = {}
        try:
            for token_ids, asked in zip(prompts, params, strict=True):
                each = with_token_ids(asked, self.tokenizer)
                request_id = str(next(self._ids))
                self.core.add(AddRequest(request_id, token_ids, each))
                done[request_id] = (
                    Completion("", [], "", token_ids),
                    Detokenizer(self.tokenizer, each, token_ids),
                )
            while self.core.has_work:
                for output in self.core.step():
                    completion, detokenizer = done[output.request_id]
                    completion.add(output, detokenizer)
                    if detokenizer.stopped:
                        self.core.abort(output.request_id)
        finally:  # also on KeyboardInterrupt: nothing may stay behind in the engine
            for request_id in done:
                self.core.abort(request_id)
        self.core.check_idle()
        return [completion for completion, _ in done.values()]


def _as_batch(prompts: Any) -> list[Any]:
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [prompts] if single else list(prompts)
