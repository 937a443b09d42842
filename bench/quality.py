"""What quantizing costs, Nibble's way and others': one table (`make bench-quality`).

    python bench/quality.py --peers .cache/peers --work .cache/quality MODEL:GROUP_SIZE [MODEL:GROUP_SIZE...]

Every tool quantizes the same 16-bit model to 4 bits with the same group size on the same token windows, and each result
is judged on the same held-out text: its weights, dequantized, in transformers' own model in float32, so no engine and
no kernel has a part in the figures. Prose is the last chapters of Moby-Dick, docs the Python Language Reference, code
the standard library (none of it calibrated on), readmes the descriptions of packages installed here, a kind of text
that nobody calibrated on. Checkpoints are kept in --work and not made twice.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import machine
import torch
from torch import Tensor, nn

from nibble.quant.algorithms import rtn
from nibble.quant.card import Quality
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.conversion.calibration import (
    DATA,
    EVALUATION,
    bundled_samples,
    evaluation_windows,
)
from nibble.quant.scheme import fitting_group

QUANTIZERS = Path(__file__).with_name("quantizers.py")
CALIBRATION = 32, 512  # windows, tokens a window
LENGTH = 512
CHUNK = 128  # positions whose logits are compared at a time
README_PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "safetensors",
    "fastapi",
    "httpx",
    "rich",
    "typer",
    "gguf",
)
# (what the table calls it, environment and method or None for Nibble's own, symmetric)
ENTRIES = (
    ("RTN", "rtn", False),
    ("AutoAWQ", "autoawq", False),
    ("GPTQModel", "gptqmodel", False),
    ("llm-compressor AWQ", "llmcompressor-awq", False),
    ("llm-compressor GPTQ", "llmcompressor-gptq", False),
    ("Nibble AWQ", "nibble-awq", False),
    ("Nibble GPTQ", "nibble-gptq", False),
    ("RTN", "rtn", True),
    ("GPTQModel", "gptqmodel", True),
    ("llm-compressor AWQ", "llmcompressor-awq", True),
    ("llm-compressor GPTQ", "llmcompressor-gptq", True),
    ("Nibble GPTQ", "nibble-gptq", True),
)


class Judge:
    """The original model and what it says of the held-out windows."""

    def __init__(self, model: Path, windows: int):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model, model_max_length=1 << 40)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.original = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.head = self.model.lm_head.weight.detach().clone()
        self.windows = {
            name: torch.tensor(evaluation_windows(tokenizer, text, windows, LENGTH))
            for name, text in texts().items()
        }
        self.hidden = {name: self._hidden(ids) for name, ids in self.windows.items()}

    def linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """The linears of the decoder blocks."""
        return (
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        )

    @torch.no_grad()
    def judge(self, weights: dict[str, Tensor]) -> list[Quality]:
        """weights: full name -> dense tensor, of whatever differs from the original."""
        self.model.load_state_dict({**self.original, **weights})
        quality = []
        for domain, windows in self.windows.items():
            parts = [
                self._compare(ids, hidden)
                for ids, hidden in zip(windows, self.hidden[domain], strict=True)
            ]
            nll_p, nll_q, kl, same = (
                torch.cat(column).double() for column in zip(*parts, strict=True)
            )
            quality.append(
                Quality(
                    domain,
                    len(kl),
                    nll_q.mean().exp().item(),
                    nll_p.mean().exp().item(),
                    kl.mean().item(),
                    kl.median().item(),
                    kl.quantile(0.99).item(),
                    same.mean().item(),
                )
            )
        return quality

    @torch.no_grad()
    def _hidden(self, windows: Tensor) -> list[Tensor]:
        decoder = self.model.model
        return [
            decoder(input_ids=ids.unsqueeze(0), use_cache=False).last_hidden_state[0, :-1]
            for ids in windows
        ]

    def _compare(self, ids: Tensor, reference: Tensor) -> tuple[Tensor, ...]:
        """Per position: both negative log-likelihoods, KL(original || quantized) in nats, whether the tops agree."""
        hidden = self._hidden(ids.unsqueeze(0))[0]
        columns = []
        for p, q, following in zip(
            reference.split(CHUNK), hidden.split(CHUNK), ids[1:].split(CHUNK), strict=True
        ):
            p, q = (
                torch.log_softmax(p @ self.head.t(), -1),
                torch.log_softmax(self.model.lm_head(q), -1),
            )
            nll_p, nll_q = (-x.gather(1, following.unsqueeze(1)).squeeze(1) for x in (p, q))
            columns.append(
                (nll_p, nll_q, (p.exp() * (p - q)).sum(-1), (p.argmax(-1) == q.argmax(-1)).float())
            )
        return tuple(torch.cat(column) for column in zip(*columns, strict=True))


def texts() -> dict[str, str]:
    """Held-out text by kind."""
    held_out = {
        name: (DATA / f"eval_{name}.txt").read_text(encoding="utf-8") for name in EVALUATION
    }
    readmes = [importlib.metadata.metadata(name).get_payload() for name in README_PACKAGES]
    return held_out | {"readmes": "\n\n".join(text for text in readmes if text)}


def checkpoint_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint, dequantized, float32."""
    checkpoint = open_checkpoint(folder)
    weights = {f"{module}.weight": checkpoint.dense(module) for module in checkpoint.modules()}
    weights |= {name: checkpoint.tensor(name, torch.float32) for name in checkpoint.loose_names()}
    return {name: weight.float() for name, weight in weights.items()}


def round_to_nearest(judge: Judge, group_size: int, symmetric: bool) -> dict[str, Tensor]:
    rounded = {}
    for name, module in judge.linears():
        size = fitting_group(group_size, module.in_features)
        if size is not None:  # else it stays dense, as every tool leaves it
            weight = judge.original[f"{name}.weight"]
            rounded[f"{name}.weight"] = rtn.round_trip(weight, 4, size, symmetric)
    return rounded


def command(
    tool: str,
    model: Path,
    output: Path,
    tokens: Path,
    group_size: int,
    symmetric: bool,
    peers: Path,
) -> list[str]:
    """How to run a tool on a model."""
    if tool.startswith("nibble-"):
        method = tool.removeprefix("nibble-")
        return [
            sys.executable,
            "-m",
            "nibble",
            "convert",
            str(model),
            f"--{method}",
            "-o",
            str(output),
            "--no-eval",
            "--overwrite",
            "--group-size",
            str(group_size),
            "--sym" if symmetric else "--asym",
            "--calib-samples",
            str(CALIBRATION[0]),
            "--calib-seqlen",
            str(CALIBRATION[1]),
        ]
    python = peers / tool.partition("-")[0] / "bin" / "python"
    return [
        "env",
        "GPTQMODEL_CPU_WORKERS=2",
        str(python.absolute()),
        str(QUANTIZERS),
        "run",
        tool,
        str(model),
        str(output),
        "--tokens",
        str(tokens),
        "--group-size",
        str(group_size),
        *(["--sym"] if symmetric else []),
    ]


def quantize(arguments: list[str], output: Path) -> dict[str, Any] | None:
    """Run a tool unless its result is there; what that took, or None if the tool failed."""
    record = output.with_name(output.name + ".json")
    if record.exists() and output.exists():
        return json.loads(record.read_text())
    start = time.monotonic()
    with output.with_name(output.name + ".log").open("w") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT)
        peak = _watch(process)
        _, status, usage = os.wait4(process.pid, 0)
    if status or not output.exists():  # llm-compressor exits with 0 whatever happened
        print(f"{output.name}: failed, see {log.name}", file=sys.stderr, flush=True)
        return None
    took = {
        "seconds": time.monotonic() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss": peak,
    }
    record.write_text(json.dumps(took))
    return took


def _watch(process: subprocess.Popen[bytes]) -> int:
    """Wait until a process has ended, without reaping it; its peak memory in bytes. The usage that wait4 tells of
    begins with what this process held when it started the other one."""
    peak = 0
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        peak = max(peak, machine.peak_memory(process.pid))
        time.sleep(0.1)
    return peak


def measure_model(
    model: Path, group_size: int, args: argparse.Namespace, tell: Callable[[dict[str, Any]], None]
) -> None:
    """Measure every entry on one model."""
    judge = Judge(model, args.windows)
    tokens = args.work / f"tokens-{model.name}.json"
    tokens.write_text(json.dumps(calibration_tokens(model)))
    for label, tool, symmetric in ENTRIES:
        row = {"model": model.name, "group_size": group_size, "symmetric": symmetric, "tool": label}
        if args.only and tool not in args.only:
            continue
        if tool == "rtn":
            tell(row | {"quality": judge.judge(round_to_nearest(judge, group_size, symmetric))})
            continue
        output = (
            args.work / f"{tool}-{model.name}-g{group_size}{'-sym' if symmetric else ''}"
        ).absolute()
        took = quantize(
            command(
                tool, model.absolute(), output, tokens.absolute(), group_size, symmetric, args.peers
            ),
            output,
        )
        if took is not None:
            tell(row | took | {"quality": judge.judge(checkpoint_weights(output))})


def calibration_tokens(model: Path) -> list[list[int]]:
    """The windows that `nibble convert` draws with its default seed."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, model_max_length=1 << 40)
    return bundled_samples(tokenizer, *CALIBRATION, seed=0).token_ids.tolist()


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one table per model, KL and perplexity per kind of text."""
    out = []
    for model in dict.fromkeys(row["model"] for row in rows):
        chosen = [row for row in rows if row["model"] == model]
        domains = [quality["domain"] for quality in chosen[0]["quality"]]
        reference = ", ".join(
            f"{q['domain']} {q['perplexity_reference']:.2f}" for q in chosen[0]["quality"]
        )
        out += [
            f"## {model}, 4 bits, group {chosen[0]['group_size']}",
            "",
            f"Perplexity of the original: {reference}.",
            "",
            "| | zero points | "
            + " | ".join(f"KL {d} (median, p99)" for d in domains)
            + " | perplexity | same top token | minutes | peak GB |",
            "|---" * (6 + len(domains)) + "|",
        ]
        out += [_line(row) for row in chosen] + [""]
    return "\n".join(out)


def _line(row: dict[str, Any]) -> str:
    cells = [row["tool"], "sym" if row["symmetric"] else "asym"]
    cells += [
        f"{q['kl_mean']:.3f} ({q['kl_median']:.3f}, {q['kl_p99']:.2f})" for q in row["quality"]
    ]
    cells.append(" / ".join(f"{q['perplexity']:.2f}" for q in row["quality"]))
    cells.append(" / ".join(f"{q['top1_agreement']:.1%}" for q in row["quality"]))
    cells += (
        [f"{row['seconds'] / 60:.1f}", f"{row['peak_rss'] / 1e9:.1f}"]
        if "seconds" in row
        else ["", ""]
    )
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="FOLDER:GROUP_SIZE")
    parser.add_argument("--peers", type=Path, default=machine.ROOT / ".cache" / "peers")
    parser.add_argument("--work", type=Path, default=machine.ROOT / ".cache" / "quality")
    parser.add_argument("--windows", type=int, default=8, help="held-out windows per kind of text")
    parser.add_argument(
        "--only", nargs="*", help="of: " + ", ".join(dict.fromkeys(tool for _, tool, _ in ENTRIES))
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    about = machine.describe()
    rows: list[dict[str, Any]] = []

    def tell(row: dict[str, Any]) -> None:
        rows.append(row | {"quality": [asdict(quality) for quality in row["quality"]]})
        print(_line(rows[-1]), flush=True)

    for model, _, group_size in (text.rpartition(":") for text in args.models):
        measure_model(Path(model), int(group_size), args, tell)
    print("\n" + table(rows))
    if not args.only:
        print(
            machine.save(
                "quality",
                about | {"windows": args.windows, "calibration": CALIBRATION, "rows": rows},
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
