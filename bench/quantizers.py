"""The quantizers that Nibble's is measured against, each in a virtual environment of its own.

    python bench/quantizers.py install DIR [TOOL...]     make DIR/autoawq, DIR/gptqmodel, DIR/llmcompressor
    DIR/TOOL/bin/python bench/quantizers.py run TOOL-METHOD MODEL OUT --tokens FILE --group-size 64 [--sym]

`run` is executed by the tool's own Python, so this file imports nothing but the standard library at its top. Every tool
gets the same token windows, from a JSON list of lists, and its own defaults in all else.

AutoAWQ 0.2.9 is broken on a CPU: its scale search keeps the weights with `.cpu()`, which aliases them there, so that
every candidate scales what the one before left behind. `install` makes it copy them, or there would be nothing to
compare with.
"""

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

# The torch that Nibble runs on, in its CPU build where pip finds one; then what each tool needs beside it.
TORCH = "torch==2.13.0"
PACKAGES = {
    "autoawq": [
        ["transformers==4.51.3", "accelerate", "datasets", "zstandard"],
        ["--no-deps", "autoawq==0.2.9"],
    ],
    "gptqmodel": [["setuptools", "wheel", "numpy"], ["gptqmodel==7.7.0", "optimum==2.3.0"]],
    "llmcompressor": [["llmcompressor==0.14.0.1"]],
}
ALIASED, COPIED = (
    "k: v.cpu() for k, v in module2inspect.state_dict()",
    "k: v.cpu().clone() for k, v in module2inspect.state_dict()",
)


def install(folder: Path, tools: list[str]) -> None:
    """Make the environments that are not there yet."""
    for tool in tools:
        home = folder / tool
        if (home / ".complete").exists():
            continue
        venv.create(home, with_pip=True)
        for packages in [[TORCH], *PACKAGES[tool]]:
            subprocess.run([str(home / "bin" / "pip"), "install", "-q", *packages], check=True)
        if tool == "autoawq":
            _repair_autoawq(home)
        (home / ".complete").touch()


def _repair_autoawq(home: Path) -> None:
    file = next(home.glob("lib/python*/site-packages/awq/quantize/quantizer.py"))
    text = file.read_text()
    if ALIASED not in text and COPIED not in text:
        raise SystemExit(f"{file}: is not AutoAWQ 0.2.9")
    file.write_text(text.replace(ALIASED, COPIED))


def run_autoawq(
    model: str, output: str, windows: list[list[int]], group_size: int, symmetric: bool
) -> None:
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    if symmetric:
        raise SystemExit("AutoAWQ's GEMM layout needs zero points")
    quantizer = AutoAWQForCausalLM.from_pretrained(model, device_map="cpu", safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    quantizer.quantize(
        tokenizer,
        {"zero_point": True, "q_group_size": group_size, "w_bit": 4, "version": "GEMM"},
        calib_data=windows,
        max_calib_samples=len(windows),
        max_calib_seq_len=len(windows[0]),
    )
    quantizer.save_quantized(output)


def run_gptqmodel(
    model: str, output: str, windows: list[list[int]], group_size: int, symmetric: bool
) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    quantizer = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=group_size, sym=symmetric))
    quantizer.quantize(
        [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows], batch_size=4
    )
    quantizer.save(output)


def run_llmcompressor(
    method: str, model: str, output: str, windows: list[list[int]], group_size: int, symmetric: bool
) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import GPTQModifier

    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group_size,
    }
    modifier = {"awq": AWQModifier, "gptq": GPTQModifier}[method]
    recipe = modifier(
        ignore=["lm_head"], config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}
    )
    dataset = Dataset.from_dict(
        {"input_ids": windows, "attention_mask": [[1] * len(ids) for ids in windows]}
    )
    oneshot(
        model=model,
        dataset=dataset,
        recipe=recipe,
        output_dir=output,
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
    )


RUNS: dict[str, Any] = {
    "autoawq": run_autoawq,
    "gptqmodel": run_gptqmodel,
    "llmcompressor-awq": lambda *args: run_llmcompressor("awq", *args),
    "llmcompressor-gptq": lambda *args: run_llmcompressor("gptq", *args),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    installing = verbs.add_parser("install")
    installing.add_argument("dir", type=Path)
    installing.add_argument("tools", nargs="*", default=list(PACKAGES))
    running = verbs.add_parser("run")
    running.add_argument("tool", choices=RUNS)
    running.add_argument("model")
    running.add_argument("output")
    running.add_argument("--tokens", type=Path, required=True)
    running.add_argument("--group-size", type=int, required=True)
    running.add_argument("--sym", action="store_true")
    args = parser.parse_args()
    if args.verb == "install":
        install(args.dir, args.tools)
    else:
        windows = json.loads(args.tokens.read_text())
        RUNS[args.tool](args.model, args.output, windows, args.group_size, args.sym)
    return 0


if __name__ == "__main__":
    sys.exit(main())
