"""LLM: prompts in, completions out, around a fake model that knows the tiny tokenizer's vocabulary."""

from pathlib import Path

import pytest

from nibble import LLM, SamplingParams
from nibble.engine.text.tokenizer import Tokenizer

from .fakes import FakeRunner, next_token
from .text.tiny_tokenizers import CHATML, byte_level


@pytest.fixture(params=[1, 6])
def llm(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """With one token a step, and with up to six."""
    folder = byte_level(tmp_path, chat_template=CHATML)
    vocab_size = Tokenizer.from_pretrained(folder).vocab_size
    monkeypatch.setattr(
        "nibble.engine.core._load_runner",
        lambda *_: FakeRunner(block_size=16, vocab_size=vocab_size, max_new_tokens=request.param),
    )
    return LLM(str(folder), max_num_seqs=4)


def params(**values) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **values})


def expected_ids(llm: LLM, prompt: list[int], n: int) -> list[int]:
    history = list(prompt)
    for _ in range(n):
        history.append(next_token(history, llm.tokenizer.vocab_size))
    return history[len(prompt) :]


def test_text_and_token_prompts_alone_and_in_batches(llm: LLM) -> None:
    texts = ["the cat", "the dog", "a", "b", "c", "d"]
    ids = [llm.tokenizer.encode(text) for text in texts]
    many = llm.generate(texts, params())
    assert [c.token_ids for c in many] == [expected_ids(llm, prompt, 8) for prompt in ids]
    assert [c.prompt_token_ids for c in many] == ids
    assert [c.text for c in many] == [llm.tokenizer.decode(c.token_ids) for c in many]
    assert llm.generate(ids, params()) == llm.generate(
        texts, params()
    )  # both now with warm prefixes
    assert [c.token_ids for c in llm.generate(texts[0], params())] == [many[0].token_ids]
    assert [c.token_ids for c in llm.generate(ids[0], params())] == [many[0].token_ids]
    assert llm.generate([], params()) == []


def test_cached_tokens_are_those_found_at_admission(llm: LLM) -> None:
    """However many outputs say so."""
    (first,) = llm.generate([list(range(40))], params())
    (second,) = llm.generate([list(range(40))], params())
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32)


def test_each_prompt_may_have_its_own_params(llm: LLM) -> None:
    short, long = llm.generate(
        ["a", "b"], [params(max_tokens=2), params(max_tokens=5, logprobs=0, prompt_logprobs=0)]
    )
    assert (len(short.token_ids), len(long.token_ids)) == (2, 5)
    assert short.logprobs is None
    assert [entry.token_id for entry in long.logprobs] == long.token_ids
    assert len(long.prompt_logprobs) == len(long.prompt_token_ids)
    with pytest.raises(ValueError, match="2 prompts, but 1 sampling_params"):
        llm.generate(["a", "b"], [params()])


def test_chat_is_the_template_then_generate(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "the cat"}]
    text = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    one, two = llm.chat(conversation, params())[0], llm.chat([conversation, conversation], params())
    assert one.prompt_token_ids == ids
    assert [c.token_ids for c in two] == [one.token_ids] * 2 == [expected_ids(llm, ids, 8)] * 2
    bare = llm.chat(conversation, params(), chat_template_kwargs={"add_generation_prompt": False})[
        0
    ]
    assert len(bare.prompt_token_ids) < len(ids)


def test_a_stop_string_ends_text_and_request(llm: LLM) -> None:
    free = llm.generate("the cat", params(max_tokens=30))[0]
    stop = next(
        free.text[i : i + 2] for i in range(2, len(free.text)) if free.text[i : i + 2].isprintable()
    )
    stopped = llm.generate("the cat", params(max_tokens=30, stop=(stop,), logprobs=0))[0]
    assert stopped.text == free.text[: free.text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert [entry.token_id for entry in stopped.logprobs] == stopped.token_ids
    last = stopped.token_ids.pop()
    assert stop not in llm.tokenizer.decode(stopped.token_ids)
    assert stop in llm.tokenizer.decode([*stopped.token_ids, last])


def test_a_bad_prompt_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(ValueError, match="no room"):
        llm.generate([[1, 2], list(range(80))], params())
    assert not llm.core.has_work
    assert len(llm.generate("a", params())[0].token_ids) == 8


def test_a_failing_step_is_raised_and_the_next_call_works(llm: LLM) -> None:
    llm.core.runner.fail_next = 1
    with pytest.raises(RuntimeError, match="the engine failed"):
        llm.generate(["a", "b"], params())
    assert len(llm.generate("a", params())[0].token_ids) == 8
