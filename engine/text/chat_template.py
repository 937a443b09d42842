"""Chat templates: Jinja programs that came with a checkpoint, so strangers' code, run in a sandbox.

The environment is the one that template authors test against (transformers, utils/chat_template_utils.py): immutable
sandbox, trim_blocks, lstrip_blocks, loop controls, a `tojson` that does not escape HTML, `raise_exception`,
`strftime_now`, and a `generation` block that marks assistant text for training and means nothing here. What a template
sees is made of plain JSON types only, and it cannot store an underscore-prefixed name on a namespace: two known ways
out of the sandbox.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .control_tokens import Marker

MAX_RENDERED_CHARS = 32 * 2**20  # of one prompt; a request's body has 10 MiB
_MAX_ERROR_CHARS = 500  # a template words its own
_CONTINUE_HERE = "CONTINUE_FINAL_MESSAGE_TAG "


class GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` renders its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _check_public(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


class _Dict:
    """`dict` as a template may use it, without the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class ChatFormat(msgspec.Struct, frozen=True):
    """How a checkpoint writes conversations."""

    templates: dict[str, str]  # name -> Jinja source: "default", perhaps "tool_use"
    special_tokens: dict[str, str]  # role -> content: variables of the templates
    # What messages must not turn into (control_tokens.py); none: what users write is not marked
    control_tokens: list[str] = []


class Conversation(msgspec.Struct, frozen=True):
    """What a template is asked to render. With continue_final_message the text ends within the last message."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: dict[str, Any] = {}  # further names that the template may use


class ChatRenderer:
    """Renders conversations by a checkpoint's templates."""

    def __init__(self, chat_format: ChatFormat):
        self._format = chat_format
        self._marker = Marker(chat_format.control_tokens)

    def problems(self) -> list[str]:
        """What is wrong with the templates themselves, whatever the messages."""
        found = ((name, problem_of(source)) for name, source in self._format.templates.items())
        return [_broken(name, problem) for name, problem in found if problem]

    def render(self, conversation: Conversation) -> str:
        """The prompt text, with marks in the control tokens that are the messages' own. ValueError, fit for the client
        to read, if there is no template, or it refuses the messages or fails."""
        template = self._choose(bool(conversation.tools))
        mark = self._marker.mark
        return render(
            template,
            [  # a role is one of a few words that templates compare
                {k: v if k == "role" else mark(v) for k, v in message.items()}
                for message in conversation.messages
            ],
            tools=mark(conversation.tools),
            add_generation_prompt=conversation.add_generation_prompt,
            continue_final_message=conversation.continue_final_message,
            variables={**self._format.special_tokens, **mark(conversation.variables)},
        )

    def _choose(self, with_tools: bool) -> str:
        problem = (
            "this model has no chat template; use text completions, or serve its instruct version"
        )
        for name in ("tool_use", "default") if with_tools else ("default",):
            template = self._format.templates.get(name)
            if template is None:
                continue
            if (found := problem_of(template)) is None:
                return template
            problem = _broken(name, found)
        raise ValueError(problem)


def _broken(name: str, problem: str) -> str:
    return f"the chat template {name!r} is no valid Jinja: {problem}"


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt text of one conversation. `variables` are further names that the template may use.

    With continue_final_message the text ends within the last message, for the model to go on with. ValueError, fit
    for the client to read, if the template refuses the conversation or fails.
    """
    if continue_final_message and add_generation_prompt:
        raise ValueError("continue_final_message and add_generation_prompt exclude each other")
    chat = [dict(_plain(message)) for message in messages]
    if continue_final_message:
        _mark_end(chat)
    seen = {
        **_plain(variables or {}),
        "messages": chat,
        "tools": _plain(tools),
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        text = _joined(_compile(template).generate(seen))
    except MemoryError:
        raise
    except Exception as error:  # whatever a stranger's program runs into
        said = str(error)[:_MAX_ERROR_CHARS]
        raise ValueError(f"the chat template cannot render these messages: {said}") from error
    return _cut_at_mark(text) if continue_final_message else text


def _joined(pieces: Iterable[str]) -> str:
    found, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_RENDERED_CHARS:
            raise ValueError(
                f"the chat template makes more than {MAX_RENDERED_CHARS} characters of these messages"
            )
        found.append(piece)
    return "".join(found)


@lru_cache(maxsize=8)
def problem_of(template: str) -> str | None:
    """What is wrong with the template itself, whatever the messages; None if it is well-formed."""
    try:
        _compile(template)
    except jinja2.TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except (jinja2.TemplateError, RecursionError) as error:
        return str(error).splitlines()[0]
    return None


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        dict=_Dict(),
        namespace=_Namespace,
    )
    return environment.from_string(template)


def _plain(value: Any) -> Any:
    """Rebuilt out of plain JSON types: methods of richer objects are beyond what the sandbox can judge."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise ValueError(f"a chat template takes JSON values, got {type(value).__name__}")


def _mark_end(chat: list[dict[str, Any]]) -> None:
    content = chat[-1].get("content") if chat else None
    if isinstance(content, list):
        texts = [
            part for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        ]
        if texts:
            texts[-1]["text"] += _CONTINUE_HERE
            return
    if not isinstance(content, str):
        raise ValueError("continue_final_message: the last message has no text to continue")
    chat[-1]["content"] = content + _CONTINUE_HERE


def _cut_at_mark(text: str) -> str:
    at = text.rfind(_CONTINUE_HERE.strip())
    if at < 0:
        raise ValueError("continue_final_message: the chat template leaves out the last message")
    kept = text[
        :at
    ]  # a template that trims the message has eaten the mark's space, and then trims the message too
    return kept if text.startswith(_CONTINUE_HERE, at) else kept.rstrip()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format_string: str) -> str:
    return datetime.now().strftime(format_string)


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a chat template may not store {name!r} on a namespace"
        )
