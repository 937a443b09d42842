"""Ten turns of one conversation, with the prefix cache and without: what each costs until its first token.

    python bench/conversation.py MODEL [--first 8192] [--turns 10] [--asked 64] [--answered 48]

The first turn's prompt has `first` random tokens; each next one has all before it, the answer too, and `asked` more.
Greedy answers of `answered` tokens must be the same both times. Saved in bench/results/.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import machine
from load import random_prompts
from rich.console import Console
from rich.table import Table

from nibble import LLM, SamplingParams


def turn(llm: LLM, prompt: list[int], answered: int) -> tuple[float, Any]:
    """Seconds to the first token, and the whole completion."""
    begin = time.perf_counter()
    first = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))[0]
    took = time.perf_counter() - begin
    params = SamplingParams(temperature=0, max_tokens=answered, ignore_eos=True)
    whole = llm.generate([prompt], params)[0]
    whole.num_cached_tokens = first.num_cached_tokens
    return took, whole


def measure(model: str, first: int, turns: int, asked: int, answered: int) -> list[dict[str, Any]]:
    length = first + turns * (asked + answered)
    cached, plain = (
        LLM(model, max_model_len=length, enable_prefix_caching=caching, max_num_seqs=4)
        for caching in (True, False)
    )
    [history] = random_prompts(1, first, 0)
    rows = []
    for number in range(1, turns + 1):
        prompt = history + (random_prompts(1, asked, number)[0] if number > 1 else [])
        seconds, answer = turn(cached, prompt, answered)
        whole, same = turn(plain, prompt, answered)
        if answer.token_ids != same.token_ids:
            raise SystemExit(f"turn {number}: another answer than without the cache")
        rows.append(
            {
                "turn": number,
                "prompt_tokens": len(prompt),
                "cached_share": round(answer.num_cached_tokens / len(prompt), 3),
                "first_token_seconds": round(seconds, 3),
                "without_cache_seconds": round(whole, 3),
                "cost": round(seconds / whole, 3),
            }
        )
        history = prompt + answer.token_ids
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--first", type=int, default=8192)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--asked", type=int, default=64)
    parser.add_argument("--answered", type=int, default=48)
    args = parser.parse_args()
    result = {"what": f"a conversation with {Path(args.model).name}", **machine.describe()}
    result["turns"] = measure(args.model, args.first, args.turns, args.asked, args.answered)
    shown = Table(*(name.replace("_", " ") for name in result["turns"][0]))
    for row in result["turns"]:
        shown.add_row(*map(str, row.values()))
    Console(width=120).print(shown)
    print(f"written to {machine.save('conversation', result).relative_to(machine.ROOT)}")


if __name__ == "__main__":
    main()
