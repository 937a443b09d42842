"""What an attack came to, and the table of docs/RELIABILITY.md.

Invariant: the table stands between two markers; what is around them is left as it is, and a page without them is an
error, so that no run replaces what somebody wrote.
"""

from dataclasses import dataclass
from pathlib import Path

BEGIN = "<!-- attacks: written by `make test-server` -->"
END = "<!-- end of attacks -->"


@dataclass(frozen=True, slots=True)
class Result:
    """One attack, the figure that was measured, the limit it is held to, and whether it kept to it."""

    attack: str
    figure: str
    limit: str
    holds: bool

    @property
    def verdict(self) -> str:
        return "holds" if self.holds else "**fails**"


def table(results: dict[str, list[Result]], run: str) -> str:
    """Families of attacks in the order given, a row an attack, in Markdown. run: how and where they were measured."""
    count = sum(map(len, results.values()))
    held = sum(result.holds for rows in results.values() for result in rows)
    lines = [f"{run}: {held} of {count} hold.", ""]
    lines += ["| Family | Attack | Figure | Limit | Verdict |", "|---|---|---|---|---|"]
    for family, rows in results.items():
        for result in rows:
            cells = (family, result.attack, result.figure, result.limit, result.verdict)
            lines.append(row(*cells))
    return "\n".join(lines)


def row(*cells: str) -> str:
    """Of a table in Markdown."""
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def write(page: Path, text: str, first: str = BEGIN, last: str = END) -> None:
    """Replace what stands between the page's markers. ValueError without them."""
    before, begin, rest = page.read_text().partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"{page} has no table between {first!r} and {last!r}")
    page.write_text(f"{before}{first}\n\n{text}\n\n{last}{after}")
