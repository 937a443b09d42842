"""Run by another tool's Python: greedy tokens of some checkpoints, by transformers or by vLLM.

    PYTHON greedy.py transformers|vllm PROMPTS.json OUT.json MODEL...

PROMPTS.json holds lists of token ids. OUT.json maps each model to its continuations, or to the error that it gave.
"""

import json
import sys
from pathlib import Path

TOKENS = 24


def by_transformers(model: str, prompts: list[list[int]]) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, device_map="cpu"
    ).eval()
    loaded.generation_config.eos_token_id = (
        None  # go on for all tokens, and let every token be chosen
    )
    with torch.inference_mode():
        return [
            loaded.generate(
                torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0
            )[0, len(ids) :].tolist()
            for ids in prompts
        ]


def by_vllm(model: str, prompts: list[list[int]]) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=4,
        skip_tokenizer_init=True,
        enforce_eager=True,
    )
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    return [list(output.outputs[0].token_ids) for output in outputs]


def main(backend: str, prompts_file: str, out_file: str, *models: str) -> None:
    prompts, results = json.loads(Path(prompts_file).read_text()), {}
    run = {"transformers": by_transformers, "vllm": by_vllm}[backend]
    for model in models:
        try:
            results[model] = run(model, prompts)
        except Exception as error:  # the other tool's business: the test shows it
            results[model] = f"{type(error).__name__}: {error}"
        Path(out_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
