"""How well texts fit each other: a cross-encoder reads each pair, any other model embeds each text once, and the score
is the cosine of the two. /v1/rerank and /v1/score ask here."""

import asyncio
from collections.abc import Sequence
from operator import mul

from fastapi import Request

from ..engine.pooling import Pooling
from .pooled import Encoder, check_size, floats, prompt_of, run, with_prompts
from .serving import Serving

Scores = tuple[list[float], list[list[int]]]  # one a pair; the token ids of all that was computed


async def scores(
    request: Request,
    serving: Serving,
    pairs: Sequence[tuple[str, str]],
    truncate_to: int | None,
    param: str,
    arrival: float,
) -> Scores:
    """Of (query, document) pairs. param: the field that errors name."""
    serving.check_task("score", "embed")
    encoder = Encoder(serving, truncate_to, param)
    if "score" in serving.engine.ready.tasks:
        encoded = await encoder.pairs(list(pairs))
        prompts = [token_ids for token_ids, _ in encoded]
        check_size(prompts, param)
        asked = [Pooling(task="score", second_part=second) for _, second in encoded]
        found = await run(request, serving, prompts, asked, arrival)
        return [floats(score)[0] for score in found], prompts
    return await _cosines(request, serving, pairs, encoder, arrival)


async def _cosines(
    request: Request,
    serving: Serving,
    pairs: Sequence[tuple[str, str]],
    encoder: Encoder,
    arrival: float,
) -> Scores:
    queries = list(dict.fromkeys(query for query, _ in pairs))
    documents = list(dict.fromkeys(document for _, document in pairs))
    as_query = with_prompts(serving, queries, prompt_of(serving, "query"))
    names = ("document", "passage", "corpus")
    as_document = with_prompts(serving, documents, prompt_of(serving, *names))
    prompts = await encoder.texts(as_query + as_document)
    check_size(prompts, encoder.param)
    asked = [Pooling(unit=True)] * len(prompts)
    vectors = await run(request, serving, prompts, asked, arrival)

    def cosines() -> list[float]:
        units = [floats(vector) for vector in vectors]
        of_query = dict(zip(queries, units, strict=False))
        of_document = dict(zip(documents, units[len(queries) :], strict=True))
        return [sum(map(mul, of_query[q], of_document[d])) for q, d in pairs]

    return await asyncio.to_thread(cosines), prompts
