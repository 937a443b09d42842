"""Images whose tokens see each other, as the scheduler cuts prompts: never within one, and all come to an end."""

import random
from collections.abc import Iterator

import pytest

from nibble.engine.request import ImageSpan, Request
from nibble.engine.sampling_params import SamplingParams
from nibble.engine.scheduling.batch import ScheduledBatch, StepResult
from nibble.engine.scheduling.kv_cache_manager import KVCacheManager, KVGroup
from nibble.engine.scheduling.scheduler import Scheduler


def make_request(name: str, generator: random.Random) -> Request:
    """Text and images of 1 to 12 tokens, in turn; some images have several runs."""
    tokens: list[int] = []
    images = []
    for index in range(generator.randint(1, 4)):
        tokens += [5] * generator.randint(0, 6)
        runs = []
        for _ in range(generator.randint(1, 2)):
            tokens.append(6)
            runs.append(range(len(tokens), len(tokens) + generator.randint(1, 12)))
            tokens += [9] * len(runs[-1])
        positions = [position for run in runs for position in run]
        images.append(
            ImageSpan(positions, bytes([generator.randint(0, 2), index]), None, tuple(runs))
        )
    tokens += [5] * generator.randint(1, 4)
    params = SamplingParams(max_tokens=generator.randint(1, 9), ignore_eos=True)
    return Request(name, tokens, params, frozenset(), seed=0, images=tuple(images))


def steps(scheduler: Scheduler) -> Iterator[ScheduledBatch]:
    while scheduler.has_work:
        batch = scheduler.schedule()
        assert batch is not None
        yield batch
        scheduler.launched(batch)
        sampled = {i.request.request_id: [7] for i in batch.items if i.samples}
        scheduler.update(batch, StepResult(tokens=sampled))
        scheduler.check_integrity()


@pytest.mark.parametrize("seed", range(40))
def test_no_step_ends_within_an_image(seed: int) -> None:
    generator = random.Random(seed)
    budget = generator.randint(16, 40)
    scheduler = Scheduler(
        KVCacheManager([KVGroup(40), KVGroup(24, 20)], 4),
        max_num_seqs=4,
        max_num_batched_tokens=budget,
        max_model_len=120,
    )
    requests = [make_request(str(index), generator) for index in range(8)]
    for request in requests:
        scheduler.add(request)
    for batch in steps(scheduler):
        assert 0 < batch.num_tokens <= budget
        for item in batch.items:
            assert item.num_tokens > 0
            runs = [run for image in item.request.images for run in image.whole]
            assert not any(run.start < item.end < run.stop for run in runs)
    assert all(r.num_output_tokens == r.params.max_tokens for r in requests)


def test_what_no_step_has_room_for_is_refused() -> None:
    scheduler = Scheduler(
        KVCacheManager([KVGroup(40)], 4),
        max_num_seqs=4,
        max_num_batched_tokens=15,
        max_model_len=120,
    )
    for length in (11, 12):
        span = ImageSpan(list(range(length)), b"", None, (range(length),))
        request = Request(
            str(length), [9] * (length + 1), SamplingParams(), frozenset(), seed=0, images=(span,)
        )
        if length == 11:
            scheduler.add(request)
        else:
            with pytest.raises(ValueError, match="12 tokens that one step computes; 11 fit"):
                scheduler.add(request)
