"""GET /v1/models and /v1/models/{id}: the one model served, under each of its names."""

import time

from fastapi import Response

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
    }
