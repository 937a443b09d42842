"""What Nibble writes, loaded by others: transformers (with GPTQModel, with compressed-tensors) and vLLM's CPU build
give the same greedy tokens. `make interop` builds their environments and runs this; without one its tests are skipped.

    NIBBLE_PEERS   folder with gptqmodel/ and llmcompressor/ (bench/quantizers.py install) and vllm/ (bench/peers.py)
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nibble import LLM, SamplingParams, convert
from nibble.quant import data_free
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.formats import gptq
from nibble.quant.reformat import reformat
from nibble.quant.scheme import LayerScheme, QuantScheme
from nibble.quant.writer import ShardWriter, write_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PEERS = Path(os.environ.get("NIBBLE_PEERS", Path(__file__).resolve().parents[2] / ".cache" / "peers"))
PROMPTS = [list(range(40, 60)), list(range(97, 121)), [72, 101, 108, 108, 111, 44, 32, 119], list(range(200, 232))]
READS = {  # tool -> (environment, what it reads on a CPU)
    "transformers with GPTQModel": ("gptqmodel", "transformers", ("awq", "gptq-sym", "gptq-asym", "gptq-act-order",
                                                                  "gptq-8bit")),
    "transformers with compressed-tensors": ("llmcompressor", "transformers", ("fp8", "ct-int4", "ct-int4-sym",
                                                                               "ct-int8")),
    "vLLM": ("vllm", "vllm", ("awq", "gptq-sym", "ct-int4", "ct-int4-sym")),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tiny_llama, tmp_path_factory):
    """One small Llama in every format, by name."""
    folder = tmp_path_factory.mktemp("interop")
    shutil.copytree(tiny_llama, folder / "dense")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=264, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=256, eos_token_id=257,
        tie_word_embeddings=False))
    for name, weight in model.named_parameters():
        if weight.dim() == 2:  # wide enough that the likeliest token is far ahead
            weight.data.normal_(0, 1.0 if "embed" in name or "lm_head" in name else 0.08)
    model.half().save_pretrained(folder / "dense")
    fast = {"group_size": 32, "calib_samples": 4, "calib_seqlen": 64}
    convert(folder / "dense", folder / "awq", "awq", **fast)
    convert(folder / "dense", folder / "gptq-sym", "gptq", **fast)
    convert(folder / "dense", folder / "gptq-asym", "gptq", symmetric=False, **fast)
    convert(folder / "dense", folder / "gptq-8bit", "gptq", bits=8, **fast)
    convert(folder / "dense", folder / "fp8", "fp8")
    reformat(folder / "awq", folder / "ct-int4", "compressed-tensors")
    reformat(folder / "gptq-sym", folder / "ct-int4-sym", "compressed-tensors")
    reformat(folder / "gptq-8bit", folder / "ct-int8", "compressed-tensors")
    with_act_order(folder / "dense", folder / "gptq-act-order")
    return folder


def with_act_order(source: Path, out: Path) -> None:
    """A GPTQ checkpoint whose groups hold columns from all over: q, k, v and gate, up in the same order."""
    checkpoint, writer = open_checkpoint(source), ShardWriter(out)
    tensors = {}
    for name in sorted(checkpoint.names()):
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            tensors[name] = checkpoint.tensor(name)
            continue
        weight = checkpoint.dense(module, torch.float32)
        perm = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(weight.shape[1]))
        quantized = data_free.quantize(weight[:, perm], 4, 32, True)
        quantized.perm = perm
        tensors |= {f"{module}.{suffix}": t for suffix, t in gptq.write(quantized).items()}
    writer.add(tensors)
    writer.finish()
    writer.clean()
    scheme = QuantScheme("gptq", "gptq", LayerScheme("int", 4, 32, True, desc_act=True))
    for file in source.glob("*.json"):
        shutil.copy(file, out)
    write_json(out / "config.json", checkpoint.config | {"quantization_config": scheme.to_config()})


@pytest.mark.parametrize("tool", READS)
def test_others_generate_what_nibble_does(checkpoints, tmp_path, tool):
    environment, backend, names = READS[tool]
    python = PEERS / environment / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no {python} (make interop builds it)")
    prompts, out = tmp_path / "prompts.json", tmp_path / "out.json"
    prompts.write_text(json.dumps(PROMPTS))
    models = [str(checkpoints / name) for name in names]
    done = subprocess.run([python, Path(__file__).with_name("greedy.py"), backend, prompts, out, *models], check=False,
                          capture_output=True, text=True, timeout=1500,
                          env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"})
    assert out.exists(), done.stderr[-3000:]
    theirs = json.loads(out.read_text())
    dtype = "bfloat16" if backend == "vllm" else "float32"
    wrong = {}
    for name, model in zip(names, models, strict=True):
        llm = LLM(model, dtype=dtype, kv_cache_memory=1 << 24)
        ours = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
        if [list(o.token_ids) for o in ours] != theirs.get(model):
            wrong[name] = (theirs.get(model, "not run"), [list(o.token_ids) for o in ours])
    assert not wrong, wrong
