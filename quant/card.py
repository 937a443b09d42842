"""The accuracy card: what a conversion did and what it cost, as nibble_quality.json and a model card.

The writer takes numbers; who measures them is no business of quant. Both files are written atomically into a finished
output folder.
"""

import platform
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .card_file import CARD
from .checkpoint.writer import write_json, write_text
from .conversion.report import Report

PACKAGES = ("nibble-serve", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Quality:
    """How far a quantized model is from its original on one kind of text. Divergences in nats per token."""

    domain: str
    tokens: int
    perplexity: float
    perplexity_reference: float
    kl_mean: float
    kl_median: float
    kl_p99: float
    top1_agreement: float  # fraction of positions where both would pick the same token
    kl_mean_int8: float | None = (
        None  # as a CPU serves it, activations and head rounded to int8; None: it does not
    )

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def write_card(
    folder: Path, report: Report, quality: list[Quality], base_model: str, peak_rss: int
) -> None:
    """Write nibble_quality.json and README.md into `folder`; peak_rss in bytes, quality empty if not measured."""
    record = quality_record(report, quality, base_model, peak_rss)
    write_json(folder / CARD, record)
    licence = _licence(Path(report.source), base_model)
    write_text(folder / "README.md", render(record, report, licence))


def quality_record(
    report: Report, quality: list[Quality], base_model: str, peak_rss: int
) -> dict[str, Any]:
    """The content of nibble_quality.json."""
    samples = report.samples
    return {
        "base_model": base_model,
        "source_scheme": report.source_scheme,
        "scheme": report.plan.scheme.describe(),
        "recipe": asdict(report.recipe),
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "bits_per_weight": round(report.bits_per_weight, 3),
        "minutes": round(report.seconds / 60, 2),
        "peak_rss_bytes": peak_rss,
        "calibration": None
        if samples is None
        else {
            "source": samples.source,
            "sha256": samples.sha256,
            "samples": samples.token_ids.shape[0],
            "tokens_per_sample": samples.token_ids.shape[1],
        },
        "evaluation": [q.as_dict() for q in quality],
        "layer_error": {name: round(error, 6) for name, error in report.layer_error.items()},
        "group_sizes": report.plan.group_sizes,
        "bits": report.plan.bits,
        "dense": report.plan.dense,
        "fallbacks": report.fallbacks,
        "notes": [*report.plan.warnings, *report.plan.notes, *report.notes],
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what took part. A checkout that was never installed has no version of its own."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def summary(quality: list[Quality]) -> str:
    """One line a domain, for the terminal."""
    return "\n".join(
        f"  {q.domain:<6} perplexity {q.perplexity_reference:.2f} -> {q.perplexity:.2f}   KL {q.kl_mean:.3f} "
        f"(median {q.kl_median:.3f}, p99 {q.kl_p99:.2f})   same top token {q.top1_agreement:.1%}"
        + (f"   as a CPU serves it KL {q.kl_mean_int8:.3f}" if q.kl_mean_int8 is not None else "")
        for q in quality
    )


def render(record: dict[str, Any], report: Report, licence: str | None) -> str:
    """The model card. Its front matter names the original only where the Hub would find it."""
    name, source_scheme = record["base_model"], record["source_scheme"]
    front = [
        "---",
        *([f"base_model: {name}", "base_model_relation: quantized"] if "/" in name else []),
        *([f"license: {licence}"] if licence else []),
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        f"- {report.recipe.method}",
        "- nibble",
        "---",
    ]
    lines = [
        f"# {name}, {record['scheme']}",
        "",
        f"Quantized with Nibble: {record['bytes_before'] / 1e6:.0f} MB -> {record['bytes_after'] / 1e6:.0f} MB, "
        f"{record['bits_per_weight']:.2f} bits per weight in the decoder blocks, scales and zero points included.",
        "",
        *_uses(report),
        "## What it cost",
        "",
    ]
    if source_scheme:
        lines += [
            f"Measured against {name} as it was converted: already quantized ({source_scheme}). What that had cost "
            "before is not in these figures.",
            "",
        ]
    lines += _quality_table(record["evaluation"]) or [
        "Not measured (`nibble evaluate` does it).",
        "",
    ]
    lines += _layer_table(record["layer_error"], calibrated=report.samples is not None)
    lines += ["## Recipe", "", f"- Method: {record['scheme']}"]
    if record["calibration"]:
        c = record["calibration"]
        lines.append(
            f"- Calibration: {c['samples']} windows of {c['tokens_per_sample']} tokens from the {c['source']} "
            f"(sha256 {c['sha256'][:16]})"
        )
    lines += [f"- {note}" for note in record["notes"]]
    lines += [
        f"- Round to nearest in {module}: {why}" for module, why in record["fallbacks"].items()
    ]
    lines += [
        f"- {record['minutes']} minutes, peak memory {record['peak_rss_bytes'] / 1e9:.1f} GB",
        "- " + ", ".join(f"{package} {v}" for package, v in record["versions"].items()),
        "",
    ]
    return "\n".join([*front, *lines])


def _uses(report: Report) -> list[str]:
    """What reads the result, and the packages that it needs for that."""
    recipe, plan = report.recipe, report.plan
    fewest = min(plan.bits.values(), default=recipe.bits)
    if recipe.target in ("gptq", "gptq_v2") and (not recipe.symmetric or fewest < 4):
        vllm = "not vLLM, which reads symmetric GPTQ of 4 and 8 bits alone"
    else:
        vllm = "vLLM: `vllm serve .`"
    readers = ("Nibble: `nibble serve .`", vllm, _in_transformers(report))
    return ["## Use", "", "In this folder:", "", *(f"- {reader}" for reader in readers), ""]


def _in_transformers(report: Report) -> str:
    recipe, scheme = report.recipe, report.plan.scheme
    if report.plan.routers and (why := _why_no_experts(report)):
        return f"not transformers, which {why}"
    if recipe.target == "fp8" and recipe.fp8_scheme == "tensor":
        return "not transformers, which reads FP8 in blocks alone under this `quant_method`"
    if recipe.target in ("gptq", "gptq_v2") and (scheme.overrides or report.plan.dense):
        return (
            'GPTQModel: `pip install gptqmodel`, then `GPTQModel.load(".")`; not transformers, which does not apply '
            "the exceptions that some layers need"
        )
    packages = {
        "awq": "transformers gptqmodel",
        "gptq": "transformers optimum gptqmodel",
        "gptq_v2": "transformers optimum gptqmodel",
        "compressed-tensors": "transformers compressed-tensors",
        "fp8": "transformers accelerate",
    }[recipe.target]
    return (
        f'transformers: `pip install {packages}`, then `AutoModelForCausalLM.from_pretrained(".")`'
    )


def _why_no_experts(report: Report) -> str | None:
    """What keeps transformers from reading quantized experts; None: nothing does."""
    recipe = report.recipe
    if recipe.target in ("awq", "gptq", "gptq_v2"):
        return f"keeps experts in tensors that {recipe.method.upper()} has no names for (--to compressed-tensors has)"
    if not report.plan.single_experts:
        return "does not read experts of this architecture one by one"
    if recipe.method != "fp8" and not recipe.symmetric:
        return "reads experts in integers only without zero points (--sym)"
    return None


def _quality_table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    table = [
        "| text | tokens | perplexity of the original | perplexity | mean KL | median | p99 | same top token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    table += [
        f"| {r['domain']} | {r['tokens']} | {r['perplexity_reference']:.3f} | {r['perplexity']:.3f} "
        f"| {r['kl_mean']:.4f} | {r['kl_median']:.4f} | {r['kl_p99']:.3f} | {r['top1_agreement']:.1%} |"
        for r in rows
    ]
    table += [
        "",
        "KL divergence from the original in nats per token, on text held out from calibration.",
    ]
    if all(r["kl_mean_int8"] is not None for r in rows):
        table[-1] += (
            " Served on a CPU, which rounds activations and the output head to int8 (not with "
            "`--cpu-activations bf16`), its mean is "
            + ", ".join(f"{r['kl_mean_int8']:.4f}" for r in rows)
            + "."
        )
    return [*table, ""]


def _layer_table(errors: dict[str, float], calibrated: bool) -> list[str]:
    """By kind of layer, over the blocks."""
    if not errors:
        return []
    kinds: dict[str, dict[str, float]] = defaultdict(dict)
    for name, error in errors.items():
        kinds[name.rpartition(".")[2]][name] = error
    rows = []
    for kind, blocks in kinds.items():
        worst = max(blocks, key=blocks.__getitem__)
        rows.append(
            f"| {kind} | {sum(blocks.values()) / len(blocks):.3%} | {blocks[worst]:.3%} | {worst} |"
        )
    inputs = (
        "calibration inputs"
        if calibrated
        else "inputs of no preferred direction (nothing was calibrated)"
    )
    return [
        "| layer | mean output error | worst | where |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Output error: squared, relative to the output's square, on {inputs}.",
        "",
    ]


def _licence(source: Path, base_model: str) -> str | None:
    """The licence named in the model card of the original, if there is one beside it."""
    readme = (source if source.is_dir() else source.parent) / "README.md"
    if not readme.is_file():
        return None
    match = re.search(
        r"^license:\s*(\S+)\s*$", readme.read_text(encoding="utf-8", errors="replace"), re.MULTILINE
    )
    return match[1] if match else None
