"""Prompts with images against transformers: its own processor, its own forward pass, however the work is cut."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from nibble.engine.backends.cpp.decoder import CppDecoder
from nibble.engine.config import EngineConfig
from nibble.engine.core import EngineCore
from nibble.engine.messages import AddRequest
from nibble.engine.request import Request
from nibble.engine.runner import Runner
from nibble.engine.sampling_params import SamplingParams
from nibble.engine.vision.encoder import ImageEncoder
from nibble.kernels.cpu import library

from ..driving import logits, make_request
from .checkpoints import IMAGE_ID, NAMES, SIZES, build, inputs, is_whole, png

TEXT = "<|im_start|>user:what is <image> beside<image>?<|im_end|>\nassistant:"
FILES = [png(SIZES[1], seed=1), png(SIZES[0], seed=2)]


@pytest.fixture(scope="module", params=NAMES)
def seeing(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return build(request.param, folder), folder


def make_config(folder: Path, **more: object) -> EngineConfig:
    fields = {"dtype": "float32", "kv_cache_memory": 1 << 24, "prepared_cache": None, **more}
    return EngineConfig(model=str(folder), **fields)


def with_images(runner: Runner, ids: list[int], files: list[bytes]) -> Request:
    request = make_request(ids, list(range(-(-len(ids) // runner.block_size) + 4)))
    request.images = ImageEncoder(runner.vision).spans(ids, files)
    return request


@torch.inference_mode()
def reference(model: PreTrainedModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """float32 [T, vocab]"""
    return model(**given).logits[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("chunk", [1024, 7])
def test_logits_are_those_of_transformers(seeing, size: tuple[int, int], chunk: int) -> None:
    model, folder = seeing
    files = [png(size, seed=1), *FILES[1:]]
    given = inputs(folder, TEXT, files)
    runner = Runner(make_config(folder, block_size=4))
    ids = given["input_ids"][0].tolist()
    chunk = max(chunk, 19) if is_whole(folder) else chunk
    [found] = logits(runner, [with_images(runner, ids, files)], chunk)
    want = reference(model, given)
    assert torch.allclose(found, want, atol=1e-4 * want.abs().max())
    # What would be computed without the images is something else by far
    [blind] = logits(runner, [make_request(ids, list(range(400)))], 1024)
    assert (blind - want)[-1].abs().max() > 0.1 * want.abs().max()


def test_one_token_a_step(seeing) -> None:
    """Each is a step of its own, and looks like a decode."""
    model, folder = seeing
    given = inputs(folder, "a<image>b", FILES[1:])
    runner = Runner(make_config(folder, block_size=4))
    ids = given["input_ids"][0].tolist()
    chunk = 16 if is_whole(folder) else 1
    [found] = logits(runner, [with_images(runner, ids, FILES[1:])], chunk)
    want = reference(model, given)
    assert torch.allclose(found, want, atol=1e-4 * want.abs().max())


def test_placeholders_are_what_the_processor_writes(seeing) -> None:
    _, folder = seeing
    runner = Runner(make_config(folder))
    from nibble.engine.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(folder)
    for size in SIZES:
        [image] = ImageEncoder(runner.vision).encode([png(size)]).result()
        ids = inputs(folder, "a<image>b", [png(size)])["input_ids"][0].tolist()
        runs = iter(image.placeholder.runs)
        ours = [
            token
            for each in tokenizer.encode(f"a{image.placeholder.text}b")
            for token in [each] * (next(runs) if each == runner.vision.info.image_token_id else 1)
        ]
        assert ours == ids


@pytest.mark.skipif(library.why_missing() is not None, reason=str(library.why_missing()))
@pytest.mark.parametrize("chunk", [1024, 5])
def test_the_cpp_kernels_err_no_more_than_torch_in_bfloat16(seeing, chunk: int) -> None:
    _, folder = seeing
    ids = inputs(folder, TEXT, FILES)["input_ids"][0].tolist()

    def computed(**more: object) -> torch.Tensor:
        runner = Runner(make_config(folder, **more))
        assert isinstance(runner.model, CppDecoder) == (more == {"dtype": "bfloat16"})
        size = max(chunk, 19) if is_whole(folder) else chunk
        [found] = logits(runner, [with_images(runner, ids, FILES)], size)
        return found

    exact = computed()
    torchs = computed(dtype="bfloat16", cpu_isa="none") - exact
    ours = computed(dtype="bfloat16") - exact
    assert ours.square().mean() < 1.5 * torchs.square().mean()


@torch.inference_mode()
def greedy(model: PreTrainedModel, given: dict[str, torch.Tensor], count: int) -> list[int]:
    given = dict(given)
    for _ in range(count):
        token = model(**given).logits[0, -1:].argmax(-1, keepdim=True)
        given["input_ids"] = torch.cat([given["input_ids"], token], 1)
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        if "token_type_ids" in given:
            given["token_type_ids"] = (given["input_ids"] == IMAGE_ID).long()
    return given["input_ids"][0, -count:].tolist()


def answers(core: EngineCore, requests: dict[str, tuple[list[int], list[bytes]]], count: int = 8):
    """Tokens and cached tokens of each, all computed together."""
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    for name, (ids, files) in requests.items():
        core.add(AddRequest(name, ids, params, images=files))
    tokens: dict[str, list[int]] = {name: [] for name in requests}
    cached = dict.fromkeys(requests, 0)
    while core.has_work:
        for output in core.step():
            assert not output.error
            tokens[output.request_id] += output.token_ids
            cached[output.request_id] = max(cached[output.request_id], output.num_cached_tokens)
    core.check_idle()
    return tokens, cached


def test_answers_in_one_batch_in_chunks_and_after_preemption(seeing) -> None:
    """Blocks for the prompts and little more: one is set back and computed again."""
    model, folder = seeing
    prompts = {
        "images": (TEXT, FILES),
        "others": (TEXT, FILES[::-1]),
        "one": ("so <image>", [png(SIZES[2])]),
    }
    given = {name: inputs(folder, *each) for name, each in prompts.items()}
    lengths = [len(each["input_ids"][0]) for each in given.values()]
    blocks = sum(-(-length // 4) for length in lengths)
    block_bytes = (
        4 * 3 * 2 * 2 * 16 * 4
    )  # tokens, layers, keys and values, heads, their size, float32
    core = EngineCore(
        make_config(
            folder,
            block_size=4,
            max_num_batched_tokens=256,
            kv_cache_memory=(blocks + 2) * block_bytes,
            max_model_len=max(lengths) + 24,
            enable_prefix_caching=False,
        )
    )
    requests = {
        name: (each["input_ids"][0].tolist(), prompts[name][1]) for name, each in given.items()
    }
    tokens, _ = answers(core, requests, count=24)
    assert tokens == {name: greedy(model, each, 24) for name, each in given.items()}
    assert core.stats().num_preemptions > 0


def test_a_prompt_that_is_found_up_to_the_middle_of_an_image(seeing) -> None:
    model, folder = seeing
    given = inputs(folder, TEXT, FILES)
    runner = Runner(make_config(folder, block_size=4))
    ids = given["input_ids"][0].tolist()
    request = with_images(runner, ids, FILES)
    logits(runner, [request], 1024)
    middle = request.num_computed_tokens = ids.index(IMAGE_ID) // 4 * 4 + 4
    [found] = logits(runner, [request], 1024)
    want = reference(model, given)
    assert torch.allclose(found, want[middle:], atol=1e-4 * want.abs().max())


def test_only_the_same_image_shares_a_prefix(seeing) -> None:
    model, folder = seeing
    core = EngineCore(make_config(folder, block_size=4))
    same = inputs(folder, TEXT, FILES)
    other = [png(SIZES[1], seed=5), FILES[1]]  # of the same size: the same tokens
    ids = same["input_ids"][0].tolist()
    assert ids == inputs(folder, TEXT, other)["input_ids"][0].tolist()
    before_image = ids.index(IMAGE_ID) // 4 * 4

    first, cached = answers(core, {"first": (ids, FILES)})
    assert cached["first"] == 0
    again, cached = answers(core, {"again": (ids, FILES)})
    assert cached["again"] == (len(ids) - 1) // 4 * 4 and again["again"] == first["first"]
    others, cached = answers(core, {"other": (ids, other)})
    assert cached["other"] == before_image
    assert others["other"] == greedy(model, inputs(folder, TEXT, other), 8)
    second = [FILES[0], png(SIZES[0], seed=9)]
    _, cached = answers(core, {"second": (ids, second)})
    first_rows = core.images.encode(FILES).result()[0].embeddings
    begins = [place for place, token in enumerate(ids) if token == IMAGE_ID][len(first_rows)]
    assert cached["second"] == begins // 4 * 4 > before_image
    _, cached = answers(core, {"blind": (ids, [])})
    assert cached["blind"] == before_image


def test_a_prompt_whose_image_tokens_are_not_those_of_its_images(seeing) -> None:
    _, folder = seeing
    core = EngineCore(make_config(folder))
    with pytest.raises(ValueError, match="the prompt has 3 image tokens, its images need"):
        core.add(AddRequest("few", [5, *[IMAGE_ID] * 3], SamplingParams(), images=FILES))
