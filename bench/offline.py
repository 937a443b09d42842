"""The engine alone, without a server: tokens per second of prefill and of decode, as JSON on the last line.

    python bench/offline.py MODEL [--batches 1 8 32] [--prompt 512] [--tokens 96] [--engine cpu_isa=avx2 ...]

    prefill   tokens of one random prompt / seconds to its first token, best of 3
    decode    batch x (tokens - 1) / (seconds for all tokens - seconds for the first ones), best of 3, behind prompts
              of 64 tokens

Best of 3, because what disturbs a measurement only ever makes it slower.
"""

import argparse
import json
import time
from typing import Any

from load import random_prompts

from nibble import LLM, SamplingParams
from nibble.architectures.base import ModelSpec

REPEATS, DECODE_PROMPT = 3, 64


def seconds(llm: LLM, prompts: list[list[int]], tokens: int) -> float:
    """What generating exactly `tokens` tokens for each prompt takes."""
    begin = time.perf_counter()
    done = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    took = time.perf_counter() - begin
    if any(len(completion.token_ids) != tokens for completion in done):
        raise SystemExit("the engine generated another number of tokens than asked for")
    return took


def prefill_rate(llm: LLM, length: int) -> float:
    """Prompt tokens per second of one prompt."""
    return length / min(seconds(llm, random_prompts(1, length, seed), 1) for seed in range(REPEATS))


def decode_rate(llm: LLM, batch: int, tokens: int) -> float:
    """Tokens per second of a batch, its prompts' time taken off."""
    rates = []
    for repeat in range(REPEATS):
        first, whole = (
            random_prompts(batch, DECODE_PROMPT, seed) for seed in (1000 + repeat, 2000 + repeat)
        )
        rates.append(batch * (tokens - 1) / (seconds(llm, whole, tokens) - seconds(llm, first, 1)))
    return max(rates)


def products_per_token(model: ModelSpec) -> int:
    """Multiplications by weights that one decoded token needs: what bounds large batches."""
    groups = [group for index in range(model.num_layers) for group in model.groups(index)]
    layers = sum(sum(group.out_features) * group.in_features for group in groups)
    return layers + model.vocab_size * model.hidden_size


def measure(
    model: str, batches: list[int], prompt: int, tokens: int, flags: dict[str, Any]
) -> dict[str, Any]:
    llm = LLM(
        model,
        max_model_len=max(prompt, DECODE_PROMPT + tokens) + 1,
        enable_prefix_caching=False,
        **flags,
    )
    seconds(llm, random_prompts(1, DECODE_PROMPT, 0), 8)  # warm-up: threads, allocator, caches
    return {
        "prefill_tokens_per_second": round(prefill_rate(llm, prompt), 1),
        "products_per_token": products_per_token(llm.core.runner.spec),
        "decode_tokens_per_second": {
            batch: round(decode_rate(llm, batch, tokens), 1) for batch in batches
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument(
        "--engine", nargs="*", default=[], metavar="NAME=VALUE", help="fields of EngineConfig"
    )
    args = parser.parse_args()
    pairs = (pair.partition("=") for pair in args.engine)
    flags = {name: int(value) if value.isdecimal() else value for name, _, value in pairs}
    print(json.dumps(measure(args.model, args.batches, args.prompt, args.tokens, flags)))


if __name__ == "__main__":
    main()
