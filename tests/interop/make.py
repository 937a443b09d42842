"""Run by another quantizer's Python: one checkpoint in each way that it offers, for Nibble to read.

    PYTHON make.py autoawq|gptqmodel|llmcompressor MODEL OUT PROMPTS.json     makes OUT/NAME for each name below

MODEL is a small dense Llama with a tokenizer; PROMPTS.json holds lists of token ids to calibrate on.
"""

import json
import sys
from pathlib import Path

GROUP = 32


def by_autoawq(model: str, out: Path, windows: list[list[int]]) -> None:
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    quantizer = AutoAWQForCausalLM.from_pretrained(model, device_map="cpu", safetensors=True)
    quantizer.quantize(
        tokenizer,
        {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"},
        calib_data=windows,
        max_calib_samples=len(windows),
        max_calib_seq_len=len(windows[0]),
    )
    quantizer.save_quantized(str(out / "autoawq"))
    tokenizer.save_pretrained(str(out / "autoawq"))


def by_gptqmodel(model: str, out: Path, windows: list[list[int]]) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    batch = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows]
    for name, options in {
        "gptqmodel-sym": {},
        "gptqmodel-asym": {"sym": False},
        "gptqmodel-act-order": {"desc_act": True, "act_group_aware": False},
        "gptqmodel-8bit-v2": {"bits": 8, "format": "gptq_v2"},
    }.items():
        quantizer = GPTQModel.load(
            model, QuantizeConfig(**{"bits": 4, "group_size": GROUP} | options)
        )
        quantizer.quantize(batch, batch_size=1)
        quantizer.save(str(out / name))


def by_llmcompressor(model: str, out: Path, windows: list[list[int]]) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    dataset = Dataset.from_dict(
        {"input_ids": windows, "attention_mask": [[1] * len(ids) for ids in windows]}
    )
    for name, modifier, scheme in (
        ("llmcompressor-w4a16", GPTQModifier, "W4A16"),
        ("llmcompressor-w4a16-asym", QuantizationModifier, "W4A16_ASYM"),
        ("llmcompressor-fp8-block", QuantizationModifier, "FP8_BLOCK"),
        ("llmcompressor-fp8", QuantizationModifier, "FP8_DYNAMIC"),
    ):
        oneshot(
            model=model,
            dataset=dataset,
            recipe=modifier(targets="Linear", scheme=scheme, ignore=["lm_head"]),
            output_dir=str(out / name),
            max_seq_length=len(windows[0]),
            num_calibration_samples=len(windows),
        )


if __name__ == "__main__":
    {"autoawq": by_autoawq, "gptqmodel": by_gptqmodel, "llmcompressor": by_llmcompressor}[
        sys.argv[1]
    ](sys.argv[2], Path(sys.argv[3]), json.loads(Path(sys.argv[4]).read_text()))
