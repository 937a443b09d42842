"""The server as a stranger meets it: the official `openai` client against a real server process.

The model's tokens are bytes, so logit_bias can force any text, one byte at a time.
"""

import concurrent.futures
import time
from collections.abc import Iterator

import openai
import pytest

from .conftest import KEY, ServerProcess

EMOJI = "🙂"
LETTERS = {str(byte): 60 for byte in b"abcdefgh"}
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60
    ) as client:
        yield client


def chat(client: openai.OpenAI, **fields):
    given = {
        "model": "tiny",
        "messages": HELLO,
        "max_tokens": 12,
        "temperature": 0,
        "logit_bias": LETTERS,
    } | fields
    return client.chat.completions.create(**given)


def complete(client: openai.OpenAI, **fields):
    given = {
        "model": "tiny",
        "prompt": "Hello",
        "max_tokens": 12,
        "temperature": 0,
        "logit_bias": LETTERS,
    } | fields
    return client.completions.create(**given)


def text_of(chunks) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


# Answers


def test_chat(client: openai.OpenAI) -> None:
    answer = chat(client)
    choice = answer.choices[0]
    assert (answer.object, answer.model, choice.index) == ("chat.completion", "tiny", 0)
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert len(choice.message.content) == 12 and set(choice.message.content) <= set("abcdefgh")


def test_chat_streamed_is_chat(client: openai.OpenAI) -> None:
    chunks = list(chat(client, stream=True))
    assert text_of(chunks) == chat(client).choices[0].message.content
    assert (
        chunks[0].choices[0].delta.role == "assistant"
        and chunks[0].object == "chat.completion.chunk"
    )
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({c.id for c in chunks}) == 1
    # Role, text, finish: one for each token, but for those that arrived together.
    assert 1 + 2 + 1 <= len(chunks) <= 1 + 12 + 1


def test_completion_streamed_is_completion(client: openai.OpenAI) -> None:
    chunks = list(complete(client, stream=True))
    whole = complete(client)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert (whole.object, chunks[-1].choices[0].finish_reason) == ("text_completion", "length")


def test_completion_default_is_16_tokens(client: openai.OpenAI) -> None:
    assert (
        client.completions.create(
            model="tiny", prompt="x", logit_bias=LETTERS
        ).usage.completion_tokens
        == 16
    )


def test_prompt_as_token_ids_is_prompt_as_text(client: openai.OpenAI) -> None:
    assert (
        complete(client, prompt=list(b"Hello")).choices[0].text == complete(client).choices[0].text
    )


def test_several_prompts(client: openai.OpenAI) -> None:
    both = complete(client, prompt=["Hello", "Goodbye"], n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in both.choices[::2]] == [
        complete(client, prompt=prompt).choices[0].text for prompt in ("Hello", "Goodbye")
    ]
    assert both.usage.prompt_tokens == len("Hello") + len("Goodbye")
    ids = complete(client, prompt=[list(b"Hello"), list(b"Goodbye")])
    assert [choice.text for choice in ids.choices] == [choice.text for choice in both.choices[::2]]


def test_n_with_seed(client: openai.OpenAI) -> None:
    first, second = (chat(client, n=3, temperature=1.0, seed=7, logit_bias={}) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) == 3
    assert first.usage.completion_tokens == 36


def test_n_streamed(client: openai.OpenAI) -> None:
    whole = chat(client, n=3, temperature=1.0, seed=7)
    texts = ["", "", ""]
    for chunk in chat(client, n=3, temperature=1.0, seed=7, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_seed(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        return chat(client, temperature=1.0, seed=seed).choices[0].message.content

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_usage(client: openai.OpenAI) -> None:
    usage = complete(client, prompt="12345").usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 12, 17)


def test_cached_tokens_are_told(client: openai.OpenAI) -> None:
    prompt = "a prompt that is longer than two blocks of the key-value cache"
    usages = [complete(client, prompt=prompt, max_tokens=1).usage for _ in range(2)]
    assert usages[1].prompt_tokens_details.cached_tokens >= 48


def test_stream_usage(client: openai.OpenAI) -> None:
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage.model_dump() == chat(client).usage.model_dump() | {
        "prompt_tokens_details": chunks[-1].usage.prompt_tokens_details.model_dump()
    }


def test_continuous_usage(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(complete(client, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[0] >= 1 and counts[-2:] == [12, 12]


# Stopping


def test_stop_string_across_tokens(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=40).choices[0].text
    stop = whole[10:14]
    cut = complete(client, max_tokens=40, stop=stop)
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_stop_string_across_chunks(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=40).choices[0].text
    stop = whole[10:14]
    chunks = list(complete(client, max_tokens=40, stop=["zz", stop], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_include_stop_str(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=40).choices[0].text
    stop = whole[10:14]
    cut = complete(
        client, max_tokens=40, stop=stop, extra_body={"include_stop_str_in_output": True}
    )
    assert cut.choices[0].text == whole[: whole.index(stop) + 4]


def test_eos(client: openai.OpenAI) -> None:
    answer = chat(client, logit_bias={"257": 100})
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("", "stop")


def test_ignore_eos(client: openai.OpenAI) -> None:
    answer = chat(client, logit_bias={"257": 100}, extra_body={"ignore_eos": True})
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (12, "length")


def test_min_tokens(client: openai.OpenAI) -> None:
    answer = chat(client, logit_bias={"257": 100}, extra_body={"min_tokens": 5})
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (6, "stop")


def test_stop_token_ids(client: openai.OpenAI) -> None:
    answer = complete(client, logit_bias={"97": 100}, extra_body={"stop_token_ids": [97]})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")


# Text


def force(text: str) -> dict:
    """Fields that make the model say `text`, whose bytes all differ: the likeliest byte comes first, and a repetition
    penalty of 10 keeps it from coming again."""
    data = text.encode()
    return {
        "logit_bias": {str(byte): 100 - 15 * i for i, byte in enumerate(data)},
        "max_tokens": len(data),
        "extra_body": {"repetition_penalty": 10.0},
    }


def test_emoji_over_four_tokens(client: openai.OpenAI) -> None:
    answer = complete(client, **force(EMOJI + "!"))
    assert (answer.choices[0].text, answer.usage.completion_tokens) == (EMOJI + "!", 5)


def test_emoji_over_four_tokens_streamed(client: openai.OpenAI) -> None:
    chunks = list(chat(client, stream=True, **force("Z" + EMOJI)))
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert texts in (["Z", EMOJI], ["Z" + EMOJI])  # one piece where both arrived together


def test_stop_string_that_is_an_emoji(client: openai.OpenAI) -> None:
    answer = complete(client, stop=EMOJI, **force("ab" + EMOJI))
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ab", "stop")


def test_half_an_emoji_is_withheld_until_the_end(client: openai.OpenAI) -> None:
    first = EMOJI.encode()[0]
    chunks = list(complete(client, logit_bias={str(first): 100}, max_tokens=2, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "\ufffd\ufffd"
    assert len(chunks) == 1


def test_logprobs_carry_an_emojis_bytes(client: openai.OpenAI) -> None:
    byte = EMOJI.encode()[0]
    answer = chat(client, logit_bias={str(byte): 100}, max_tokens=1, logprobs=True)
    assert answer.choices[0].logprobs.content[0].bytes == [byte]


# Log-probabilities


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3, logit_bias={})
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs)  # greedy
        assert bytes(token.bytes).decode("utf-8", "replace") == token.token


def test_chat_logprobs_streamed(client: openai.OpenAI) -> None:
    whole = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    chunks = chat(client, logprobs=True, top_logprobs=2, stream=True)
    streamed = [
        token
        for chunk in chunks
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.model_dump() for token in streamed] == [token.model_dump() for token in whole]


def test_completion_logprobs(client: openai.OpenAI) -> None:
    answer = complete(client, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.text_offset == list(range(12))
    for token, own, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert top[token] == own and 2 <= len(top) <= 3


def test_logprobs_stay_with_their_tokens_at_a_stop(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=40).choices[0].text
    cut = complete(client, max_tokens=40, stop=whole[10:14], logprobs=0)
    logprobs = cut.choices[0].logprobs
    assert len(logprobs.tokens) == cut.usage.completion_tokens == len(cut.choices[0].text) + 4


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_the_prompt_for_lm_eval(client: openai.OpenAI, max_tokens: int) -> None:
    prompts = [list(b"The first"), list(b"A second one")]
    answer = complete(
        client, prompt=prompts, echo=True, logprobs=1, max_tokens=max_tokens, logit_bias={}
    )
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        logprobs = choice.logprobs
        assert len(logprobs.token_logprobs) == len(prompt) + max_tokens
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        assert "".join(logprobs.tokens[: len(prompt)]) == bytes(prompt).decode()
        assert all(
            own <= max(top.values())
            for own, top in zip(logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True)
        )
    assert answer.usage.completion_tokens == 2 * max_tokens


def test_echoed_prompts_score_what_generation_scored(client: openai.OpenAI) -> None:
    said = complete(client, prompt="abc", logprobs=0, max_tokens=6, logit_bias={})
    ids = [
        *b"abc",
        *(
            ord(token) if len(token) == 1 else int(token[-2:], 16)
            for token in said.choices[0].logprobs.tokens
        ),
    ]
    scored = complete(client, prompt=ids, echo=True, logprobs=1, max_tokens=1, logit_bias={})
    assert scored.choices[0].logprobs.token_logprobs[3:9] == pytest.approx(
        said.choices[0].logprobs.token_logprobs, abs=1e-4
    )


def test_echo_streamed(client: openai.OpenAI) -> None:
    chunks = list(complete(client, echo=True, stream=True))
    assert (
        "".join(chunk.choices[0].text for chunk in chunks)
        == complete(client, echo=True).choices[0].text
    )
    assert chunks[0].choices[0].text.startswith("Hello")


# Errors


def test_no_key(server: ServerProcess) -> None:
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        chat(client)
    assert (caught.value.code, caught.value.type) == ("invalid_api_key", "invalid_request_error")


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gpt-4")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert caught.value.body["type"] == "invalid_request_error"


def test_what_clients_send_who_know_of_no_name_is_the_model(client: openai.OpenAI) -> None:
    for name in ("tgi", "dummy"):
        assert chat(client, model=name, max_tokens=2).usage.completion_tokens == 2


def test_context_length(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, prompt="x" * 9000)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
    assert (
        "8192" in caught.value.message
        and "9012" in caught.value.message
        and "9000" in caught.value.message
    )


def test_max_tokens_beyond_the_context(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, max_tokens=8192)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"extra_body": {"guided_json": 3}}, "guided_json"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"store": True}, "store"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}],
                    }
                ]
            },
            "messages[0].content[0].image_url",
        ),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 128, "max_tokens": 8000, "extra_body": {"ignore_eos": True}}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"stop": [""]}, "stop.0"),
        ({"seed": 10**4000}, "seed"),
        ({"max_tokens": 10**4000}, "max_tokens"),
        ({"extra_body": {"top_k": 2**63}}, "top_k"),
        ({"extra_body": {"top_k": 2**100}, "stream": True}, "top_k"),
        ({"extra_body": {"repetition_penalty": 1e-45}}, "repetition_penalty"),
        ({"extra_body": {"repetition_penalty": 1e-300}}, "repetition_penalty"),
        ({"extra_body": {"min_tokens": 2**40}}, "min_tokens"),
        ({"logit_bias": {"07": 1}}, "logit_bias.07"),
        ({"logit_bias": {"9" * 4000: 1}}, "logit_bias." + "9" * 189),
        ({"stop": ["x"] * 17}, "stop"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, "chat_template_kwargs"),
        ({"extra_body": {"stop_token_ids": [-1]}}, "stop_token_ids.0"),
        ({"extra_body": {"stop_token_ids": [5000] * 256}}, "stop_token_ids"),
    ],
)
def test_bad_field_is_named(client: openai.OpenAI, fields: dict, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **fields)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error" and param.split(".")[0] in str(caught.value)
    assert len(caught.value.message) < 600


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt.0"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": [264]}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_bad_completion_field_is_named(client: openai.OpenAI, fields: dict, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **fields)
    assert caught.value.param == param


def test_a_temperature_next_to_zero_is_greedy(client: openai.OpenAI) -> None:
    """Clients that may not say 0 say 1e-8, which as a divisor would leave no numbers."""
    greedy = complete(client, max_tokens=20, temperature=0).choices[0].text
    for temperature in (1e-8, 1e-300):
        assert complete(client, max_tokens=20, temperature=temperature).choices[0].text == greedy


def test_no_op_values_are_accepted(client: openai.OpenAI) -> None:
    plain = chat(client).choices[0].message.content
    fields = {
        "tools": [],
        "stop": None,
        "response_format": {"type": "text"},
        "store": False,
        "user": "me",
        "n": 1,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "modalities": ["text"],
    }
    assert chat(client, **fields).choices[0].message.content == plain


def test_an_answer_may_be_sent_back(client: openai.OpenAI) -> None:
    answer = chat(client).choices[0].message
    messages = [
        *HELLO,
        answer.model_dump(),
        {"role": "user", "content": [{"type": "text", "text": "more"}]},
    ]
    assert chat(client, messages=messages).choices[0].finish_reason == "length"


# The rest of the API


def test_models(client: openai.OpenAI) -> None:
    cards = client.models.list().data
    assert [card.id for card in cards] == ["tiny", "alias"] and cards[0].max_model_len == 8192
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_request_id(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=HELLO, max_tokens=1
    )
    assert raw.request_id
    own = client.chat.completions.with_raw_response.create(
        model="tiny", messages=HELLO, max_tokens=1, extra_headers={"x-request-id": "mine-1"}
    )
    assert own.headers["x-request-id"] == "mine-1"
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gpt-4")
    assert caught.value.request_id


def test_concurrent_streams_say_what_they_say_alone(client: openai.OpenAI) -> None:
    prompts = ["x" * (1 + 17 * i) for i in range(12)]
    alone = [complete(client, prompt=prompt, max_tokens=24).choices[0].text for prompt in prompts]

    def stream(prompt: str) -> str:
        return "".join(
            c.choices[0].text for c in complete(client, prompt=prompt, max_tokens=24, stream=True)
        )

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(stream, prompts)) == alone


def test_a_client_that_leaves_frees_its_blocks(
    client: openai.OpenAI, server: ServerProcess
) -> None:
    streams = [
        complete(client, max_tokens=8000, stream=True, extra_body={"ignore_eos": True})
        for _ in range(3)
    ]
    for stream in streams:
        next(iter(stream))
    assert server.metric("nibble_num_requests_running") == 3
    for stream in streams:
        stream.close()
    deadline = time.monotonic() + 2
    while server.metric("nibble_num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("nibble_kv_blocks_free") == server.metric("nibble_kv_blocks")
