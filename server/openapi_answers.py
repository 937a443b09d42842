"""What every endpoint answers, as JSON schemas: the components of the OpenAPI document."""

from typing import Any

from .serving import Phase

JsonSchema = dict[str, Any]
_TEXT: JsonSchema = {"type": "string"}
_NUMBER: JsonSchema = {"type": "number"}
_COUNT: JsonSchema = {"type": "integer", "minimum": 0}
_NULL: JsonSchema = {"type": "null"}
_RANKED: JsonSchema = {
    "type": "object",
    "properties": {"logprob": _NUMBER, "rank": _COUNT, "decoded_token": _TEXT},
    "required": ["logprob", "rank", "decoded_token"],
}


def answers() -> JsonSchema:
    return (
        _generated()
        | _pooled()
        | _conversations()
        | _generations()
        | _lines()
        | {
            "Error": _object(
                error=_object(
                    message=_TEXT | {"minLength": 1},
                    type={"enum": ["invalid_request_error", "server_error"]},
                    param=_or_null(_TEXT),
                    code=_or_null(_TEXT),
                )
            ),
            "Status": _object(status={"enum": [phase.value for phase in Phase]}),
            "Version": _object(version=_TEXT),
            "Model": _object(
                id=_TEXT,
                object={"const": "model"},
                created=_COUNT,
                owned_by={"const": "nibble"},
                root=_TEXT,
                parent=_NULL,
                max_model_len=_COUNT,
                quantization=_TEXT,
                input_modalities=_list({"enum": ["text", "image"]}),
            ),
            "Card": _open(base_model=_TEXT, scheme=_TEXT, bits_per_weight=_NUMBER),
            "ModelList": _object(object={"const": "list"}, data=_list(ref("Model"))),
            "Tokens": _object(
                count=_COUNT,
                max_model_len=_COUNT,
                tokens=_list(_COUNT),
                token_strs=_or_null(_list(_TEXT)),
            ),
            "Text": _object(prompt=_TEXT),
            "TokenizerInfo": _object(
                bos_token=_or_null(_TEXT),
                eos_token=_or_null(_TEXT),
                unk_token=_or_null(_TEXT),
                pad_token=_or_null(_TEXT),
                additional_special_tokens=_list(_TEXT),
                chat_template=_or_null(_TEXT),
                model_max_length=_COUNT,
                vocab_size=_COUNT,
            ),
        }
    )


def _conversations() -> JsonSchema:
    """What the Responses and the Messages API answer."""
    return {
        "Response": _open(
            id=_TEXT | {"pattern": "^resp_"},
            object={"const": "response"},
            status={"enum": ["in_progress", "completed", "incomplete", "failed", "cancelled"]},
            output=_list(_open(id=_TEXT, type=_TEXT, status=_TEXT)),
        ),
        "Deleted": _object(id=_TEXT, object={"const": "response"}, deleted={"const": True}),
        "ItemList": _open(object={"const": "list"}, data=_list(_open(id=_TEXT))),
        "Message": _open(
            id=_TEXT | {"pattern": "^msg_"},
            type={"const": "message"},
            role={"const": "assistant"},
            content=_list(_open(type={"enum": ["text", "thinking", "tool_use"]})),
            stop_reason={"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
        ),
        "MessageError": _object(
            type={"const": "error"}, error=_object(type=_TEXT, message=_TEXT | {"minLength": 1})
        ),
        "TokenCount": _object(input_tokens=_COUNT),
    }


def _lines() -> JsonSchema:
    """What Ollama's endpoints answer."""
    line = _open(model=_TEXT, created_at=_TEXT, done={"type": "boolean"})
    line["properties"] |= {
        "message": _open(role={"const": "assistant"}, content=_TEXT),
        "response": _TEXT,
    }
    return {
        "Line": line,
        "LineError": _object(error=_TEXT | {"minLength": 1}),
        "ModelDetails": _open(capabilities=_list(_TEXT), details=_open(quantization_level=_TEXT)),
        "Tags": _object(models=_list(_open(name=_TEXT, model=_TEXT, size=_COUNT))),
    }


def _generations() -> JsonSchema:
    """What TGI's endpoints answer."""
    generation = _open(generated_text=_TEXT)
    token = _object(id=_COUNT, text=_TEXT, start=_COUNT, stop=_COUNT)
    return {
        "Generation": generation,
        "GenerationList": _list(ref("Generation")),
        "GenerationError": _object(
            error=_TEXT | {"minLength": 1},
            error_type={"enum": ["validation", "generation", "overloaded"]},
        ),
        "ChatTokens": _object(tokenize_response=_list(token), templated_text=_TEXT),
        "Info": _open(model_id=_TEXT, max_input_tokens=_COUNT, max_total_tokens=_COUNT),
    }


def _generated() -> JsonSchema:
    """What the two generating endpoints answer when they do not stream."""
    token = {"token": _TEXT, "logprob": _NUMBER, "bytes": _list(_COUNT)}
    message = _object(role={"const": "assistant"}, content=_or_null(_TEXT), refusal=_NULL)
    function = _object(name=_TEXT, arguments=_TEXT)
    call = _object(id=_TEXT, type={"const": "function"}, function=function)
    message["properties"] |= {
        "reasoning_content": _TEXT,
        "reasoning": _TEXT,
        "tool_calls": _list(call),
    }
    chat_logprobs = _object(
        content=_list(_object(**token, top_logprobs=_list(_object(**token)))), refusal=_NULL
    )
    logprobs = _object(
        text_offset=_list(_COUNT),
        token_logprobs=_list(_or_null(_NUMBER)),
        tokens=_list(_TEXT),
        top_logprobs=_list(_or_null({"type": "object", "additionalProperties": _NUMBER})),
    )
    return {
        "Usage": _object(
            prompt_tokens=_COUNT,
            completion_tokens=_COUNT,
            total_tokens=_COUNT,
            prompt_tokens_details=_object(cached_tokens=_COUNT),
        ),
        "ChatCompletion": _completion(
            "chatcmpl-", "chat.completion", chat_logprobs, message=message
        ),
        "Completion": _completion("cmpl-", "text_completion", logprobs, text=_TEXT),
    }


def _pooled() -> JsonSchema:
    """What is answered of texts that nothing is generated of."""
    embedding = {"anyOf": [_list(_NUMBER), _TEXT]}
    ranked = {"index": _COUNT, "relevance_score": _NUMBER}
    documented = _object(**ranked, document=_object(text=_TEXT))
    one = _object(object={"const": "embedding"}, index=_COUNT, embedding=embedding)
    score = _object(index=_COUNT, object={"const": "score"}, score=_NUMBER)
    every = {"model": _TEXT, "usage": _object(prompt_tokens=_COUNT, total_tokens=_COUNT)}
    return {
        "Embeddings": _object(object={"const": "list"}, data=_list(one), **every),
        "Ranking": _object(
            id=_TEXT, results=_list({"anyOf": [_object(**ranked), documented]}), **every
        ),
        "Scores": _object(
            id=_TEXT, object={"const": "list"}, created=_COUNT, data=_list(score), **every
        ),
    }


def _completion(prefix: str, kind: str, logprobs: JsonSchema, **content: JsonSchema) -> JsonSchema:
    choice = _object(
        index=_COUNT,
        **content,
        logprobs=_or_null(logprobs),
        finish_reason={"enum": ["stop", "length", "tool_calls"]},
    )
    prompt_logprobs = _list(_or_null({"type": "object", "additionalProperties": _RANKED}))
    choice["properties"]["prompt_logprobs"] = prompt_logprobs
    completion = _object(
        id=_TEXT | {"pattern": f"^{prefix}"},
        object={"const": kind},
        model=_TEXT,
        system_fingerprint=_TEXT,
        created=_COUNT,
        choices=_list(choice),
        usage=ref("Usage"),
    )
    completion["properties"]["prompt_logprobs"] = prompt_logprobs
    return completion


def _object(**properties: JsonSchema) -> JsonSchema:
    """An object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _open(**properties: JsonSchema) -> JsonSchema:
    """An object with these properties, and others."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: JsonSchema) -> JsonSchema:
    return {"type": "array", "items": items}


def _or_null(schema: JsonSchema) -> JsonSchema:
    return {"anyOf": [schema, {"type": "null"}]}


def ref(name: str) -> JsonSchema:
    return {"$ref": f"#/components/schemas/{name}"}
