"""Where an accuracy card is, and reading it; no torch."""

import json
from pathlib import Path
from typing import Any

CARD = "nibble_quality.json"


def read_card(model: Path) -> dict[str, Any] | None:
    """What the card beside a model's weights says; None where there is none, or none that can be read. model: a folder,
    or the file of its weights."""
    folder = model if model.is_dir() else model.parent
    try:
        card = json.loads((folder / CARD).read_text())
    except (OSError, ValueError):
        return None
    return card if isinstance(card, dict) else None
