"""`nibble evaluate REF QUANT`: its options, and what it prints. The work is in evaluate.py.

Nothing that needs torch is imported before there is work for it: `nibble evaluate --help` is answered at once.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from nibble.errors import UserError
from nibble.tools.progress import Display


def evaluate_command(
    reference: Annotated[
        str, typer.Argument(metavar="REF", help="The original: folder, .gguf file or Hub id")
    ],
    quantized: Annotated[str, typer.Argument(metavar="QUANT", help="The quantized checkpoint")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text to measure on; repeatable",
            show_default="bundled prose, docs and code",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print JSON")] = False,
) -> None:
    """Measure what quantization cost: perplexity, KL divergence and top-1 agreement against the original."""
    from nibble.quant.card import summary
    from nibble.tools.evaluate import evaluate, telling

    try:
        texts = {file.name: file.read_text(encoding="utf-8") for file in text} if text else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text: {error}") from None
    with Display() as show:
        quality = evaluate(reference, quantized, texts, progress=telling(show))
    print(json.dumps([q.as_dict() for q in quality], indent=2) if as_json else summary(quality))
