"""Recorded answers of every format: the same calls, content and reasoning however their text is cut."""

import pytest

from nibble.engine.text.parsers import TOOL_PARSERS

from .corpus import CASES, TOOLS, Case
from .said import Said, output_format, said, values


def _name(case: Case) -> str:
    return f"{case.tool or case.reasoning}-{case.name}".replace(" ", "_")


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_recorded_answers(case: Case) -> None:
    found = _parsed(case, [case.text])
    assert values(found) == list(case.calls)
    assert (found.content, found.reasoning) == (case.content, case.thought)
    for at in range(1, len(case.text)):
        assert _parsed(case, [case.text[:at], case.text[at:]]) == found, case.text[:at]
    assert _parsed(case, list(case.text)) == found


def _parsed(case: Case, pieces: list[str]) -> Said:
    return said(output_format(case.tool, case.reasoning).parser(TOOLS, case.tail), pieces)


def test_every_format_is_recorded() -> None:
    assert {tool_format.name for tool_format in TOOL_PARSERS.values()} == {
        case.tool for case in CASES if case.tool
    }


@pytest.mark.parametrize("case", [case for case in CASES if case.calls], ids=_name)
def test_half_a_call_is_not_made_whole(case: Case) -> None:
    """Wherever an answer breaks off: no name is cut, and arguments that have an end are all that the model wrote."""
    whole = _parsed(case, [case.text]).calls
    for at in range(len(case.text)):
        cut = _parsed(case, [case.text[:at]]).calls
        assert [name for name, _ in cut] == [name for name, _ in whole[: len(cut)]]
        for (_, part), (_, arguments) in zip(cut, whole, strict=False):
            assert part == arguments or not part.endswith("}") or part.count("{") > part.count("}")


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_half_an_answer_loses_no_words(case: Case) -> None:
    """Every letter that an answer has when it breaks off is said, but for those of marks and of complete calls."""
    for at in range(0, len(case.text), 5):
        cut = _parsed(case, [case.text[:at]])
        if not cut.calls and not case.reasoning and not case.content:
            assert cut.content.strip() == case.text[:at].strip()
