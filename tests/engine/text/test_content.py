"""Content of messages in the form that a template goes through: texts, parts, or either."""

from typing import Any

import pytest

from nibble.engine.text.chat_template import render
from nibble.engine.text.content import ContentForm
from nibble.engine.text.plain_tools import told_in_words

TEXTS = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
PARTS = (
    "{% for message in messages %}[{% if message['content'][0]['type'] == 'image' %}:{% endif %}"
    "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}]"
    "{% endfor %}"
)
EITHER = (
    "{% for message in messages %}[{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}{% endif %}]"
    "{% endfor %}"
)
SEEN: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": None},
]


@pytest.mark.parametrize(
    ("template", "want"),
    [(PARTS, "[be brief][:<image>hi][]"), (EITHER, "[be brief][<image>hi][]")],
)
def test_images_and_texts_are_told_apart_by_any_template(template: str, want: str) -> None:
    messages = ContentForm(template).of([{**m, "content": m["content"] or ""} for m in SEEN])
    assert render(template, messages, add_generation_prompt=False) == want


@pytest.mark.parametrize(("template", "want"), [(TEXTS, "[hi]"), (PARTS, "[hi]"), (EITHER, "[hi]")])
def test_a_text_reaches_every_template(template: str, want: str) -> None:
    messages = ContentForm(template).of([{"role": "user", "content": "hi"}])
    assert render(template, messages, add_generation_prompt=False) == want


def test_a_template_of_texts_has_no_place_for_images() -> None:
    with pytest.raises(ValueError, match="no place for images"):
        ContentForm(TEXTS).of(SEEN)


@pytest.mark.parametrize("takes_system", [True, False])
def test_tools_are_told_in_words_beside_images(takes_system: bool) -> None:
    tool = {"type": "function", "function": {"name": "find"}}
    told = told_in_words(SEEN[1:2], [tool], takes_system)
    assert told[-1]["content"][-2:] == SEEN[1]["content"]
    first = told[0]["content"] if takes_system else told[0]["content"][0]["text"]
    assert '"name": "find"' in first and len(told) == 1 + takes_system
