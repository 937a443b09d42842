"""What keeping half of the requests to a JSON schema costs the others: tokens per second, beside the same batch free.

    python bench/structured.py MODEL [--requests 32] [--tokens 96] [--repeats 3]

Both batches are run in turn, and the best of each counts. Every second request of the one is kept to a schema that
does not end within `tokens`, so both generate the same number of tokens. Saved in bench/results/.
"""

import argparse
import time
from typing import Any

import machine
from load import random_prompts

from nibble import LLM, SamplingParams
from nibble.engine.grammar.structured_outputs import StructuredOutputs

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "pattern": "^[a-z]{2,12}@[a-z]{2,12}[.](com|org)$"},
        "interests": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 4},
    },
    "required": ["name", "age", "email", "interests"],
    "additionalProperties": False,
}
PEOPLE = StructuredOutputs(json={"type": "array", "items": PERSON, "minItems": 1000})


def rate(llm: LLM, requests: int, tokens: int, every: int | None) -> float:
    """Tokens per second; `every` second, third, ... request is kept to the schema."""
    params = [
        SamplingParams(
            max_tokens=tokens,
            temperature=1.0,
            seed=index,
            ignore_eos=True,
            structured_outputs=PEOPLE if every and index % every == 0 else None,
        )
        for index in range(requests)
    ]
    prompts = random_prompts(requests, 64, 0)
    begin = time.perf_counter()
    done = llm.generate(prompts, params)
    took = time.perf_counter() - begin
    return sum(len(completion.token_ids) for completion in done) / took


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    llm = LLM(args.model, max_num_seqs=args.requests)
    best: dict[str, float] = {}
    for repeat in range(args.repeats + 1):
        for name, every in (("free", None), ("half", 2)):
            found = rate(llm, args.requests, args.tokens, every)
            if repeat:  # the first compiles, and fills the prefix cache
                best[name] = max(best.get(name, 0.0), found)
    row: dict[str, Any] = {
        "what": "half of the requests kept to a JSON schema",
        "requests": args.requests,
        "tokens_per_second": {name: round(value, 1) for name, value in best.items()},
        "ratio": round(best["half"] / best["free"], 3),
    }
    print(row)
    print(f"written to {machine.save('structured', row).relative_to(machine.ROOT)}")


if __name__ == "__main__":
    main()
