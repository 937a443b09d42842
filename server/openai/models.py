"""GET /v1/models and /v1/models/{id}: the one model served, under each of its names."""

import time

from fastapi import Response

from .. import errors
from ..serving import Serving
from .answer import json_response

_STARTED = int(time.time())


def list_models(serving: Serving) -> Response:
    return json_response(
        {"object": "list", "data": [_card(name, serving) for name in serving.model_names]}
    )


def retrieve(model: str, serving: Serving) -> Response:
    serving.check_model(model)
    return json_response(_card(model, serving))


def card(model: str, serving: Serving) -> Response:
    """The accuracy card that a conversion wrote beside the weights. ApiError 404 where there is none."""
    serving.check_ready()
    serving.check_model(model)
    found = serving.engine.ready.card
    if found is None:
        raise errors.ApiError(
            404,
            f"The model `{model}` has no accuracy card: `nibble convert` writes one beside what it quantizes.",
            param="model",
            code="card_not_found",
        )
    return json_response(found)


def _card(name: str, serving: Serving) -> dict[str, object]:
    """OpenAI's model object, with vLLM's `max_model_len` and `root`, and what the weights are."""
    serving.check_ready()
    ready = serving.engine.ready
    return {
        "id": name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "nibble",
        "root": serving.model_names[0],
        "parent": None,
        "max_model_len": ready.max_model_len,
        "quantization": ready.quantization,
        "input_modalities": ["text"] if ready.vision is None else ["text", "image"],
    }
