"""python -m nibble.engine.text.convert_tokenizer FOLDER OUT: tokenizer files of any kind as OUT/tokenizer.json.

A process of its own: transformers loads torch, which the HTTP server's process must not. What goes wrong is the last
line on stderr.
"""

import sys


def main(folder: str, out: str) -> int:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    except Exception as error:  # whatever a library makes of a stranger's files
        reason = (str(error).strip().splitlines() or [""])[0]
        print(f"{type(error).__name__}: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
