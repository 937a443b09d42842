"""The C++ decoder against the torch one on every architecture: logits, and tokens however the work is cut up."""

from functools import partial
from pathlib import Path

import pytest
import torch

import nibble
from nibble.architectures.base import Attention
from nibble.engine import memory
from nibble.engine.backends.batch import Batch
from nibble.engine.backends.cpp.decoder import CppDecoder
from nibble.engine.backends.torch import mixers
from nibble.engine.backends.torch.attention import paged_attention
from nibble.engine.backends.torch.latent_attention import latent_attention
from nibble.engine.config import EngineConfig
from nibble.engine.request import Request
from nibble.engine.runner import Runner
from nibble.engine.sampling_params import SamplingParams
from nibble.engine.scheduling.batch import ScheduledBatch, ScheduledRequest
from nibble.errors import UserError
from nibble.kernels.cpu import library

from .. import models
from ..driving import make_request, prompt, run

convert = partial(nibble.convert, evaluate=False)

pytestmark = pytest.mark.skipif(
    library.why_missing() is not None, reason=str(library.why_missing())
)


def make_runner(folder: Path, **more) -> Runner:
    return Runner(
        EngineConfig(model=str(folder), kv_cache_memory=1 << 23, **{"dtype": "bfloat16", **more})
    )


@pytest.fixture(scope="module", params=sorted(models.CONFIGS))
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    models.build(request.param, folder)
    return folder


@pytest.fixture(scope="module", params=["auto", "int8"])
def runner(request, folder: Path) -> Runner:
    runner = make_runner(folder, num_threads=2, kv_cache_dtype=request.param)
    assert isinstance(runner.model, CppDecoder)
    return runner


@pytest.mark.parametrize("isa", library.instruction_sets())
def test_logits_err_no_more_than_torch_in_bfloat16(folder: Path, isa: str) -> None:
    """Against float32, past the sliding window (24) and over several blocks and key steps."""
    ids = prompt(150)
    exact = make_runner(folder, dtype="float32").logits(ids)
    torchs = make_runner(folder, cpu_isa="none").logits(ids) - exact
    ours = make_runner(folder, cpu_isa=isa).logits(ids) - exact
    if any(name in folder.name for name in models.MOE):  # some tokens choose another expert
        assert ours.norm(dim=1).median() <= torchs.norm(dim=1).median()
    else:
        assert ours.norm() <= torchs.norm()


@pytest.mark.parametrize("chunk", [256, 7, 1])
def test_tokens_do_not_depend_on_chunks_blocks_or_company(runner: Runner, chunk: int) -> None:
    lengths = [1, 5, 29, 40, 70]
    alone = [make_request(prompt(n, seed=n), list(range(10))) for n in lengths]
    for request in alone:
        run(runner, [request], 256, steps=12)
    together = [
        make_request(prompt(n, seed=n), list(range(20 * i + 30, 20 * i, -3)))
        for i, n in enumerate(lengths)
    ]
    run(runner, together, chunk, steps=-(-70 // chunk) + 11)
    for one, other in zip(alone, together, strict=True):
        count = min(one.num_tokens, other.num_tokens)
        assert one.token_ids[:count] == other.token_ids[:count]


def test_logits_of_decoding_are_those_of_the_prompt(runner: Runner) -> None:
    ids = prompt(60, seed=5)
    request = make_request(ids, list(range(10)))
    rows = [
        runner.model.logits(
            runner.model.forward(Batch([ScheduledRequest(request, i, 1)], 16), runner.cache)
        )
        for i in range(60)
    ]
    assert torch.equal(torch.cat(rows), runner.logits(ids))


@pytest.mark.parametrize("isa", library.instruction_sets())
def test_an_int8_cache_holds_each_key_and_value_rounded_by_token_and_head(
    folder: Path, isa: str, monkeypatch
) -> None:
    """Against torch in float32 with keys and values, or latents, rounded before they are attended to: errs no more
    than torch in bfloat16 does, over some prompts: where a code tips over is chance."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
        return (x.float() / scale).round().mul(scale).to(x.dtype)

    def attend_to_latents(
        q: torch.Tensor, latents: torch.Tensor, kv_b: torch.Tensor, bias, spec, *rest: object
    ) -> torch.Tensor:
        parts = latents.split((spec.kv_rank, spec.rope_dim), 1)
        latents = torch.cat([rounded(part) for part in parts], 1)
        return latent_attention(q, latents, kv_b, bias, spec, *rest)

    def attend(qkv: torch.Tensor, spec: Attention, *rest: object) -> torch.Tensor:
        num_heads = spec.num_heads
        kv = rounded(qkv[:, num_heads:])
        return paged_attention(torch.cat([qkv[:, :num_heads], kv], 1), spec, *rest)

    monkeypatch.setattr(mixers, "latent_attention", attend_to_latents)
    monkeypatch.setattr(mixers, "paged_attention", attend)
    options = {"dtype": "float32"}, {"cpu_isa": "none"}, {"cpu_isa": isa, "kv_cache_dtype": "int8"}
    exact, torchs, ours = (make_runner(folder, **each) for each in options)

    def errors(runner: Runner) -> list[float]:
        prompts = [prompt(150, seed) for seed in range(4)]
        return [float((runner.logits(ids) - exact.logits(ids)).norm()) for ids in prompts]

    assert sum(errors(ours)) <= sum(errors(torchs))


def test_an_int8_cache_holds_more_tokens(folder: Path) -> None:
    mixers = make_runner(folder).spec.cached.values()
    sizes = [vectors for mixer in mixers for vectors in mixer.kept]
    if not sizes:
        pytest.skip("nothing of it lies in such a cache")
    tokens = {
        kind: make_runner(folder, kv_cache_dtype=kind).num_blocks for kind in ("auto", "int8")
    }
    ratio = sum(n * 2 * dim for n, dim in sizes) / sum(n * (dim + 4) for n, dim in sizes)
    # windows take no more than requests can see, and leave the rest to the other layers
    assert tokens["int8"] / tokens["auto"] >= 0.98 * ratio


def test_the_ledger_counts_what_lies_in_memory(runner: Runner) -> None:
    """The cache is as large as was planned for its tokens, and the weights of no linear are left out."""
    spec, kind = runner.spec, "int8" if runner.model.int8_cache else "auto"
    blocks = {group.window: group.num_blocks for group in runner.kv_groups}
    planned = [
        memory.kv_bytes_per_token(spec, torch.bfloat16, kind, [layer]) * blocks[window]
        for layer, window in spec.windows.items()
    ]
    assert runner.cache.pages.nbytes == runner.block_size * sum(planned)
    assert runner.ready().ledger["kv_cache"] == runner.cache.pages.nbytes
    groups = [group for index in range(spec.num_layers) for group in spec.groups(index)]
    numbers = sum(sum(g.out_features) * g.in_features * (g.num_experts or 1) for g in groups)
    assert runner.model.weight_bytes >= 2 * (numbers + spec.vocab_size * spec.hidden_size)


def test_the_head_beside_4_bit_weights_has_8_bits_unless_told_otherwise(
    tiny_llama: Path, tmp_path: Path
) -> None:
    quantized = convert(
        tiny_llama, tmp_path / "q", "gptq", group_size=32, calib_samples=2, calib_seqlen=32
    )
    heads = {
        bits: make_runner(quantized, lm_head_bits=bits, prepared_cache=None)
        .model.head.linears[0]
        .format
        for bits in (None, 8, 16)
    }
    assert heads == {None: library.U8, 8: library.U8, 16: library.DENSE}
    assert make_runner(tiny_llama).model.head.linears[0].format == library.DENSE
    fp8 = convert(tiny_llama, tmp_path / "fp8", "fp8", calib_samples=2, calib_seqlen=32)
    assert make_runner(fp8, prepared_cache=None).model.head.linears[0].format == library.DENSE
    strict = make_runner(quantized, cpu_activations="bf16", prepared_cache=None)
    assert strict.model.head.linears[0].format == library.DENSE


def test_prompt_logprobs(runner: Runner) -> None:
    ids = prompt(20, seed=3)
    request = Request(
        "r",
        ids,
        SamplingParams(temperature=0, prompt_logprobs=2),
        frozenset(),
        seed=0,
        block_tables=[[0, 1], [1, 0]],
        state_slot=0,
    )
    got = runner.execute(ScheduledBatch([ScheduledRequest(request, 0, 20)])).prompt_logprobs["r"]
    want = torch.log_softmax(runner.logits(ids), -1)
    assert [e.token_id for e in got] == ids[1:]
    assert all(e.logprob == pytest.approx(float(want[i, ids[i + 1]])) for i, e in enumerate(got))


def test_what_cannot_be_served_is_refused_in_words(tmp_path: Path) -> None:
    models.build("llama", tmp_path)
    assert not isinstance(make_runner(tmp_path, block_size=4).model, CppDecoder)
    with pytest.raises(UserError, match="avx9"):
        make_runner(tmp_path, cpu_isa="avx9")
    with pytest.raises(UserError, match="int9"):
        make_runner(tmp_path, cpu_activations="int9")
    with pytest.raises(UserError, match="int4"):
        make_runner(tmp_path, kv_cache_dtype="int4")
    for option in ({"lm_head_bits": 8}, {"kv_cache_dtype": "int8"}):
        with pytest.raises(UserError, match="--dtype bfloat16"):
            make_runner(tmp_path, dtype="float32", **option)


def test_latents_are_added_up_by_segments_whoever_computes_them(tmp_path: Path) -> None:
    """Of 1024 positions: by one thread for many tokens, by all of them for one."""
    reference = models.build("youtu", tmp_path, max_position_embeddings=2304)
    ids = prompt(2200, seed=3)
    with torch.inference_mode():
        exact = reference(torch.tensor([ids])).logits[0]
        rounded = reference.bfloat16()(torch.tensor([ids])).logits[0].float()
    alone = make_runner(tmp_path, num_threads=1)
    together = make_runner(tmp_path, num_threads=3)
    want = alone.logits(ids)
    assert torch.equal(together.logits(ids), want)
    for end in (1024, 1025, 2048, 2049, 2200):
        request = make_request(ids[:end], list(range(144)))
        for runner in (alone, together):
            hidden = [
                runner.model.forward(
                    Batch([ScheduledRequest(request, start, count)], 16), runner.cache
                )
                for start, count in ((0, end - 1), (end - 1, 1))
            ]
            assert torch.equal(runner.model.logits(hidden[1]), want[end - 1 : end])
    late = slice(1024, None)
    assert (want - exact)[late].norm() <= (rounded - exact)[late].norm()
