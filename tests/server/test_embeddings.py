"""Embeddings, rerank and score from real server processes, by the openai client unmodified: transformers' numbers."""

import base64
import math
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from ..engine.encoders import models
from .conftest import KEY, ServerProcess

TEXTS = [models.words(count, count) for count in (3, 20, 1, 3, 11)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mean pooling, normalized, up to 40 tokens, prompts for queries and passages."""
    folder = models.save(tmp_path_factory.mktemp("encoder") / "tiny-bert", "bert")
    models.write_modules(folder, "mean_tokens", "Normalize")
    models.rewrite(folder / "sentence_bert_config.json", max_seq_length=40)
    models.rewrite(
        folder / "config_sentence_transformers.json", prompts={"query": "w9 ", "passage": "w8 w7 "}
    )
    return folder


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("reranker") / "tiny-reranker", "bert", True)


@pytest.fixture(scope="module")
def embedding_server(start_server: Callable[..., ServerProcess], encoder: Path) -> ServerProcess:
    return start_server(encoder, "--api-key", KEY, "--max-num-batched-tokens", "64").wait_ready()


@pytest.fixture(scope="module")
def score_server(start_server: Callable[..., ServerProcess], reranker: Path) -> ServerProcess:
    return start_server(reranker, "--api-key", KEY).wait_ready()


@pytest.fixture(scope="module")
def client(embedding_server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{embedding_server.url}/v1", api_key=KEY, max_retries=0, timeout=60
    ) as client:
        yield client


def post(server: ServerProcess, path: str, **body) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=60)


def refusal(response: httpx.Response) -> tuple[str, str | None]:
    """The message of a 400, and the field that it names."""
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["message"], error["param"]


def unit(vector: list[float]) -> list[float]:
    norm = math.sqrt(sum(x * x for x in vector))
    return [x / norm for x in vector]


def embedded(folder: Path, text: str) -> list[float]:
    return unit(models.hidden(folder, models.ids(text)).mean(0).tolist())


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


# Embeddings


def test_texts_in_order(client: openai.OpenAI, encoder: Path) -> None:
    """As the client asks by itself, in base64."""
    answer = client.embeddings.create(model="tiny-bert", input=TEXTS)
    assert (answer.object, answer.model) == ("list", "tiny-bert")
    assert [each.index for each in answer.data] == list(range(5))
    for each, text in zip(answer.data, TEXTS, strict=True):
        assert each.embedding == pytest.approx(embedded(encoder, text), abs=1e-5)
    tokens = sum(len(text.split()) + 2 for text in TEXTS)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)


def test_floats_are_what_base64_holds(embedding_server: ServerProcess) -> None:
    body = {"model": "tiny-bert", "input": TEXTS[1]}
    path = "/v1/embeddings"
    plain = post(embedding_server, path, **body).json()["data"][0]["embedding"]
    data = post(embedding_server, path, **body, encoding_format="base64").json()["data"]
    coded = base64.b64decode(data[0]["embedding"])
    assert list(struct.unpack("<64f", coded)) == plain


def test_token_ids_are_taken_as_they_are(client: openai.OpenAI, encoder: Path) -> None:
    ids = [models.ids(TEXTS[1])[1:-1], [5]]
    answer = client.embeddings.create(model="tiny-bert", input=ids)
    for each, tokens in zip(answer.data, ids, strict=True):
        want = unit(models.hidden(encoder, tokens).mean(0).tolist())
        assert each.embedding == pytest.approx(want, abs=1e-5)
    one = client.embeddings.create(model="tiny-bert", input=ids[0])
    assert one.data[0].embedding == pytest.approx(answer.data[0].embedding, abs=1e-6)
    bare = client.embeddings.create(
        model="tiny-bert", input=TEXTS[1], extra_body={"add_special_tokens": False}
    )
    assert bare.data[0].embedding == pytest.approx(answer.data[0].embedding, abs=1e-6)


def test_dimensions_are_the_first_ones_of_length_1(client: openai.OpenAI) -> None:
    whole = client.embeddings.create(model="tiny-bert", input=TEXTS[1]).data[0].embedding
    cut = client.embeddings.create(model="tiny-bert", input=TEXTS[1], dimensions=8)
    assert cut.data[0].embedding == pytest.approx(unit(whole[:8]), abs=1e-6)
    full = client.embeddings.create(model="tiny-bert", input=TEXTS[1], dimensions=64)
    assert full.data[0].embedding == pytest.approx(whole, abs=1e-6)
    with pytest.raises(openai.BadRequestError, match="at most 64") as caught:
        client.embeddings.create(model="tiny-bert", input="w6", dimensions=65)
    assert caught.value.param == "dimensions"


def test_texts_that_are_too_long(client: openai.OpenAI, encoder: Path) -> None:
    fits, long = models.words(38), models.words(39)
    client.embeddings.create(model="tiny-bert", input=fits)
    with pytest.raises(openai.BadRequestError, match="number 1 of 'input'") as caught:
        client.embeddings.create(model="tiny-bert", input=["w6", long])
    assert caught.value.code == "context_length_exceeded"
    for limit, kept in [(-1, 38), (12, 10)]:
        answer = client.embeddings.create(
            model="tiny-bert",
            input=[long + " w5" * 50_000, "w6"],
            extra_body={"truncate_prompt_tokens": limit},
        )
        want = embedded(encoder, " ".join(long.split()[:kept]))
        assert answer.data[0].embedding == pytest.approx(want, abs=1e-5)
        assert answer.usage.prompt_tokens == kept + 2 + 3


@pytest.mark.parametrize("limit", [0, -2, 41, 3])
def test_truncation_has_bounds(embedding_server: ServerProcess, limit: int) -> None:
    body = {"model": "tiny-bert", "input": "w6", "truncate_prompt_tokens": limit}
    assert refusal(post(embedding_server, "/v1/embeddings", **body))[1] == "truncate_prompt_tokens"


def test_token_ids_are_cut_and_checked(embedding_server: ServerProcess) -> None:
    def ask(ids: list[int], **more) -> httpx.Response:
        return post(embedding_server, "/v1/embeddings", model="tiny-bert", input=ids, **more)

    assert "has 41" in refusal(ask([5] * 41))[0]
    cut = ask([5, 6, 7, 8] + [9] * 40, truncate_prompt_tokens=4).json()
    assert cut["data"] == ask([5, 6, 7, 8]).json()["data"] and cut["usage"]["prompt_tokens"] == 4
    assert "between 0 and 127" in refusal(ask([128]))[0]


def test_a_prompt_by_name(client: openai.OpenAI, embedding_server: ServerProcess) -> None:
    def ask(text: str, **more) -> list[float]:
        answer = client.embeddings.create(model="tiny-bert", input=text, extra_body=more)
        return answer.data[0].embedding

    assert ask("w6 w4", prompt_name="query") == pytest.approx(ask("w9 w6 w4"), abs=1e-6)
    body = {"model": "tiny-bert", "input": "w6", "prompt_name": "title"}
    message, param = refusal(post(embedding_server, "/v1/embeddings", **body))
    assert "it has: passage, query" in message and param == "prompt_name"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [[]]}, "input.0"),
        ({"input": ["w6"] * 2049}, "input"),
        ({"input": "w6", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "w6", "dimensions": 0}, "dimensions"),
        ({"input": "w6", "temperature": 1}, "temperature"),
        ({"input": 5}, "input"),
    ],
)
def test_what_is_refused_names_its_field(
    embedding_server: ServerProcess, body: dict, param: str
) -> None:
    found = refusal(post(embedding_server, "/v1/embeddings", model="tiny-bert", **body))
    assert found[1] == param


def test_as_many_texts_as_there_may_be(client: openai.OpenAI) -> None:
    """They are all counted, computed and given back in order, with another request between them."""
    texts = [f"w{4 + i % 100} w{4 + i // 100}" for i in range(2048)]
    found: list[openai.types.CreateEmbeddingResponse] = []

    def ask(given: list[str]) -> None:
        found.append(client.embeddings.create(model="tiny-bert", input=given))

    threads = [threading.Thread(target=ask, args=(each,)) for each in (texts, texts[:3])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    few, many = sorted(found, key=lambda answer: len(answer.data))
    assert len(many.data) == 2048 and many.usage.prompt_tokens == 4 * 2048
    for each, again in zip(few.data, many.data, strict=False):
        assert each.embedding == pytest.approx(again.embedding, abs=1e-5)
    (alone,) = client.embeddings.create(model="tiny-bert", input=texts[2000]).data
    assert many.data[2000].embedding == pytest.approx(alone.embedding, abs=1e-5)


def test_an_encoder_says_what_it_serves(embedding_server: ServerProcess) -> None:
    hello = [{"role": "user", "content": "hello"}]
    for path, body in [
        ("/v1/chat/completions", {"messages": hello}),
        ("/v1/completions", {"prompt": "hello"}),
    ]:
        message, param = refusal(post(embedding_server, path, model="tiny-bert", **body))
        assert "does not generate; it serves /v1/embeddings" in message and param == "model"
    log = embedding_server.log.read_text()
    assert "64 dimensions" in log and "40 tokens" in log and "KV" not in log


def test_a_client_that_leaves_takes_its_texts_back(embedding_server: ServerProcess) -> None:
    body = {"model": "tiny-bert", "input": [models.words(30, i) for i in range(2048)]}
    before = embedding_server.metric("nibble_http_requests_client_disconnected_total")
    headers = {"Authorization": f"Bearer {KEY}"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{embedding_server.url}/v1/embeddings", json=body, headers=headers, timeout=0.6)
    deadline = time.monotonic() + 10
    while embedding_server.metric("nibble_num_requests_waiting") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert embedding_server.metric("nibble_num_requests_waiting") == 0
    after = embedding_server.metric("nibble_http_requests_client_disconnected_total")
    assert after == before + 1


# Scores


def test_rerank_by_a_cross_encoder(score_server: ServerProcess, reranker: Path) -> None:
    query = models.words(4, 9)
    body = {"model": "tiny-reranker", "query": query, "documents": TEXTS}
    answer = post(score_server, "/v1/rerank", **body).json()
    pairs = [models.pair_ids(query, text) for text in TEXTS]
    want = [1 / (1 + math.exp(-models.logit(reranker, *pair))) for pair in pairs]
    results = answer["results"]
    scores = [result["relevance_score"] for result in results]
    assert scores == sorted(scores, reverse=True)
    assert sorted(result["index"] for result in results) == list(range(5))
    for result in results:
        assert result["relevance_score"] == pytest.approx(want[result["index"]], abs=1e-5)
        assert result["document"] == {"text": TEXTS[result["index"]]}
    assert answer["usage"]["total_tokens"] == sum(len(ids) for ids, _ in pairs)
    every = post(score_server, "/rerank", **body, top_n=0).json()["results"]
    assert [result["index"] for result in every] == [result["index"] for result in results]
    for path in ("/rerank", "/v2/rerank"):
        body |= {"top_n": 2, "return_documents": False}
        short = post(score_server, path, **body).json()["results"]
        assert [set(result) for result in short] == [{"index", "relevance_score"}] * 2
        assert [result["index"] for result in short] == [r["index"] for r in results[:2]]


def test_documents_may_be_objects(score_server: ServerProcess) -> None:
    body = {"model": "tiny-reranker", "query": "w6"}
    plain = post(score_server, "/rerank", documents=["w4", "w5"], **body).json()
    objects = post(score_server, "/rerank", documents=[{"text": "w4"}, "w5"], **body).json()
    for one, other in zip(plain["results"], objects["results"], strict=True):
        assert one["document"] == other["document"]
        assert one["relevance_score"] == pytest.approx(other["relevance_score"], abs=1e-6)


def test_score_pairs_one_with_all_or_each_with_its_own(
    score_server: ServerProcess, reranker: Path
) -> None:
    def score(*pair: str) -> float:
        return 1 / (1 + math.exp(-models.logit(reranker, *models.pair_ids(*pair))))

    def ask(path: str = "/v1/score", **body) -> list[float]:
        answer = post(score_server, path, model="tiny-reranker", **body).json()
        assert answer["object"] == "list"
        assert [each["index"] for each in answer["data"]] == list(range(len(answer["data"])))
        return [each["score"] for each in answer["data"]]

    a, b, c = TEXTS[:3]
    near = {"abs": 1e-5}
    assert ask(text_1=a, text_2=b) == pytest.approx([score(a, b)], **near)
    want = [score(a, b), score(a, c)]
    assert ask(text_1=a, text_2=[b, c]) == pytest.approx(want, **near)
    assert ask("/score", queries=[a], documents=[b, c]) == pytest.approx(want, **near)
    want = [score(a, b), score(b, c)]
    assert ask(queries=[a, b], documents=[b, c]) == pytest.approx(want, **near)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text_1": "w6"}, "text_1"),
        ({"text_1": "w6", "documents": "w4"}, "text_1"),
        ({"text_1": "w6", "text_2": "w4", "queries": "w5"}, "text_1"),
        ({}, "text_1"),
        ({"text_1": ["w6", "w4"], "text_2": ["w5"]}, "text_2"),
        ({"queries": ["w6", "w4"], "documents": ["w5"]}, "documents"),
        ({"text_1": "w6", "text_2": []}, "text_2"),
    ],
)
def test_pairs_that_are_none(score_server: ServerProcess, body: dict, param: str) -> None:
    assert refusal(post(score_server, "/v1/score", model="tiny-reranker", **body))[1] == param


def test_the_longer_text_of_a_pair_is_cut(score_server: ServerProcess, reranker: Path) -> None:
    query, document = models.words(5, 1), models.words(300, 2)
    body = {"model": "tiny-reranker", "text_1": query, "text_2": document}
    assert "more" in refusal(post(score_server, "/v1/score", **body))[0]
    answer = post(score_server, "/v1/score", **body, truncate_prompt_tokens=20).json()
    pair = models.pair_ids(query, " ".join(document.split()[:12]))
    want = 1 / (1 + math.exp(-models.logit(reranker, *pair)))
    assert answer["data"][0]["score"] == pytest.approx(want, abs=1e-5)
    assert answer["usage"]["prompt_tokens"] == 20


def test_a_cross_encoder_does_not_embed(score_server: ServerProcess) -> None:
    message, _ = refusal(post(score_server, "/v1/embeddings", model="tiny-reranker", input="w6"))
    assert "does not embed; it serves /v1/rerank, /v1/score" in message


def test_rerank_by_cosine_puts_the_models_prompts_before_texts(
    embedding_server: ServerProcess, encoder: Path
) -> None:
    query, documents = models.words(4, 9), [*TEXTS, TEXTS[0]]
    body = {"model": "tiny-bert", "query": query, "documents": documents}
    answer = post(embedding_server, "/v1/rerank", **body).json()
    of_query = embedded(encoder, f"w9 {query}")
    for result in answer["results"]:
        own = embedded(encoder, "w8 w7 " + documents[result["index"]])
        assert result["relevance_score"] == pytest.approx(dot(of_query, own), abs=1e-5)
    assert len(answer["results"]) == 6
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)


# Decoders


def test_a_decoder_embeds_and_scores(server: ServerProcess, tiny_llama: Path) -> None:
    texts = ["hello", "a longer text, which says more", "hello"]
    answer = post(server, "/v1/embeddings", model="tiny", input=texts).json()
    want = [unit(models.hidden(tiny_llama, list(text.encode()))[-1].tolist()) for text in texts]
    for each, expected in zip(answer["data"], want, strict=True):
        assert each["embedding"] == pytest.approx(expected, abs=1e-4)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, texts))
    scored = post(server, "/v1/score", model="tiny", text_1=texts[0], text_2=texts[1:]).json()
    cosines = [dot(want[0], want[1]), 1.0]
    assert [each["score"] for each in scored["data"]] == pytest.approx(cosines, abs=1e-4)


def test_an_empty_text_has_tokens_or_is_refused(
    server: ServerProcess, embedding_server: ServerProcess
) -> None:
    assert "has no tokens" in refusal(post(server, "/v1/embeddings", model="tiny", input=[""]))[0]
    body = {"model": "tiny", "query": "a", "documents": ["b", ""]}
    assert refusal(post(server, "/v1/rerank", **body))[1] == "documents"
    found = post(embedding_server, "/v1/embeddings", model="tiny-bert", input="").json()
    assert found["usage"]["prompt_tokens"] == 2


def test_another_model_is_not_there(embedding_server: ServerProcess) -> None:
    for path, body in [
        ("/v1/embeddings", {"input": "w6"}),
        ("/v1/rerank", {"query": "w6", "documents": ["w4"]}),
        ("/v1/score", {"text_1": "w6", "text_2": "w4"}),
    ]:
        assert post(embedding_server, path, model="other", **body).status_code == 404
