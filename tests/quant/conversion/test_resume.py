"""A conversion that dies: at every step it makes durable, from a full disk, from damage. It ends in the same bytes."""

import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nibble.errors import CheckpointError, UserError
from nibble.quant.checkpoint import open_checkpoint, output, writer
from nibble.quant.checkpoint.journal import begun, lock
from nibble.quant.checkpoint.output import check_disk
from nibble.quant.checkpoint.writer import dequantize_checkpoint
from nibble.quant.conversion import block_quantizer, calibration, pipeline
from nibble.quant.conversion.blocks import BlockSource
from nibble.quant.conversion.pipeline import dry_run, quantize_checkpoint
from nibble.quant.conversion.recipe import Recipe

FAST = {"calib_samples": 4, "calib_seqlen": 32}


@pytest.fixture
def dense(make_gguf, tmp_path):
    dequantize_checkpoint(open_checkpoint(make_gguf("llama")), tmp_path / "dense")
    return tmp_path / "dense"


def convert(model, out, method, bits=None, **run):
    """The quantizing half: the card that follows tells of minutes, which differ."""
    quantize_checkpoint(model, out, Recipe.of(method, bits), **run)
    return out


def in_child(work) -> int:
    """The wait status of a forked process that does `work`: only a process of its own can be killed."""
    if pid := os.fork():
        return os.waitpid(pid, 0)[1]
    code = 1
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    finally:
        os._exit(code)


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def die_at(step: int, how: signal.Signals, after: bool) -> None:
    """From now on, the step-th file that becomes durable is the last thing this process does, or just not."""
    commit, count = writer._commit, [0]

    def dying(temporary, path):
        count[0] += 1
        if after:
            commit(temporary, path)
        if count[0] == step:
            os.kill(os.getpid(), how)
        if not after:
            commit(temporary, path)

    writer._commit = dying


@pytest.mark.parametrize(
    ("method", "after"),
    [
        pytest.param("gptq", False, id="gptq-before", marks=pytest.mark.slow),
        pytest.param("gptq", True, id="gptq-after"),
        pytest.param("fp8", False, id="fp8-before"),
        pytest.param("fp8", True, id="fp8-after"),
    ],
)
def test_killed_at_any_step_and_resumed_it_ends_in_the_same_bytes(dense, tmp_path, method, after):
    assert in_child(lambda: convert(dense, tmp_path / "whole", method, **FAST)) == 0
    want, step, died = contents(tmp_path / "whole"), 1, True
    while died:
        out = tmp_path / f"out{step}"

        def killed(out=out, step=step):
            die_at(step, signal.SIGKILL, after)
            convert(dense, out, method, **FAST)

        died = in_child(killed) == signal.SIGKILL
        assert died or step > 5
        if died:
            assert not out.exists()
            assert in_child(lambda out=out: convert(dense, out, method, resume=True, **FAST)) == 0
        assert contents(out) == want
        assert not output.partial_of(out).exists()
        step += 1


def test_interrupted_from_the_keyboard(dense, tmp_path, monkeypatch):
    def interrupt(*_args):
        raise KeyboardInterrupt

    whole = contents(convert(dense, tmp_path / "whole", "awq", **FAST))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline.Report, "add", interrupt)
        convert(dense, tmp_path / "out", "awq", **FAST)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="--resume to go on, --overwrite to start again"):
        convert(dense, tmp_path / "out", "awq", **FAST)
    assert contents(convert(dense, tmp_path / "out", "awq", resume=True, **FAST)) == whole


def test_killed_between_the_rename_and_the_cleaning(dense, tmp_path, monkeypatch):
    whole = contents(convert(dense, tmp_path / "whole", "fp8"))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(output, "sync_folder", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        convert(dense, tmp_path / "out", "fp8")
    assert (tmp_path / "out" / ".work").exists()
    assert contents(convert(dense, tmp_path / "out", "fp8", resume=True)) == whole


def interrupted(dense, out, monkeypatch):
    def fail(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline.Report, "add", fail)
        convert(dense, out, "gptq", **FAST)
    return output.partial_of(out)


def test_another_recipe_or_model_does_not_go_on(dense, tmp_path, monkeypatch):
    partial = interrupted(dense, tmp_path / "out", monkeypatch)
    with pytest.raises(CheckpointError, match="another recipe"):
        convert(dense, tmp_path / "out", "gptq", 8, resume=True, **FAST)
    with pytest.raises(CheckpointError, match="another recipe"):
        convert(dense, tmp_path / "out", "gptq", resume=True, calib_samples=5, calib_seqlen=32)
    os.utime(dense / "model.safetensors", (1, 1))
    with pytest.raises(CheckpointError, match="another model"):
        convert(dense, tmp_path / "out", "gptq", resume=True, **FAST)
    assert begun(partial)
    convert(dense, tmp_path / "out", "gptq", overwrite=True, **FAST)
    assert not partial.exists()


@pytest.mark.parametrize("name", ["part-00000", "state-00003"])
def test_damage_to_what_was_done_is_noticed(dense, tmp_path, monkeypatch, name):
    partial = interrupted(dense, tmp_path / "out", monkeypatch)
    file = next((partial / ".work").glob(name.split("-")[0] + "-*"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        convert(dense, tmp_path / "out", "gptq", resume=True, **FAST)


def test_a_journal_that_has_changed_is_not_believed(dense, tmp_path, monkeypatch):
    """One digit of what the report says of a part: no part is wrong, but the card would be."""
    partial = interrupted(dense, tmp_path / "out", monkeypatch)
    journal = partial / ".work" / "journal.json"
    text = journal.read_text()
    place = text.index('"seconds": ') + len('"seconds": ')
    journal.write_text(text[:place] + ("1" if text[place] != "1" else "2") + text[place + 1 :])
    for damage in (journal.read_text(), text[: len(text) // 2], "{}"):
        journal.write_text(damage)
        with pytest.raises(CheckpointError, match="journal.json"):
            convert(dense, tmp_path / "out", "gptq", resume=True, **FAST)
        assert (partial / ".work" / "part-00000.safetensors").exists(), "nothing is thrown away"
    convert(dense, tmp_path / "out", "gptq", overwrite=True, **FAST)


def test_a_plan_of_the_shards_that_has_changed_is_not_followed(dense, tmp_path):
    """Killed while its parts are joined: where each byte goes is in layout.json."""

    def killed():
        convert_dies_joining(dense, tmp_path / "out")

    assert in_child(killed) == signal.SIGKILL
    layout = output.partial_of(tmp_path / "out") / ".work" / "layout.json"
    text = layout.read_text()
    layout.write_text(text.replace('"start": ', '"start": 1', 1))
    with pytest.raises(CheckpointError, match=r"layout\.json: is damaged"):
        convert(dense, tmp_path / "out", "fp8", resume=True)


def convert_dies_joining(dense, out):
    writer._join = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    convert(dense, out, "fp8")


def test_a_full_disk_leaves_no_output_and_says_how_much_is_needed(dense, tmp_path, monkeypatch):
    """RLIMIT_FSIZE stands for the disk: no file may grow beyond it, so the final shard cannot be written."""
    whole = contents(convert(dense, tmp_path / "whole", "gptq", **FAST))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, old[1]))
    try:
        with pytest.raises(
            UserError, match=r"disk is full: the conversion needs .* bytes\) in all, .* are free"
        ):
            convert(dense, tmp_path / "out", "gptq", **FAST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not (tmp_path / "out").exists()
    assert contents(convert(dense, tmp_path / "out", "gptq", resume=True, **FAST)) == whole


def test_too_little_disk_is_refused_before_anything_is_written(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "free_bytes", lambda _: 1000)
    with pytest.raises(UserError, match=r"needs .* of disk, .*1000 bytes\) are free"):
        convert(dense, tmp_path / "out", "gptq", **FAST)
    assert not list(tmp_path.glob("out*"))
    check_disk(tmp_path / "out", 1000)


def test_failure_before_any_part_leaves_nothing(dense, tmp_path, monkeypatch):
    def fail(*_args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pipeline, "_convert_outside", fail)
    with pytest.raises(OSError, match="Input/output"):
        convert(dense, tmp_path / "out", "gptq", **FAST)
    assert not list(tmp_path.glob("out*"))


def test_two_conversions_do_not_write_to_one_folder(dense, tmp_path):
    with lock(tmp_path / "out.partial"), pytest.raises(CheckpointError, match="another conversion"):
        convert(dense, tmp_path / "out", "fp8")


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8"])
def test_a_dry_run_knows_the_size_and_writes_nothing(dense, tmp_path, method):
    plan, needs = dry_run(
        dense, tmp_path / "out", Recipe.of(method), calib_samples=4, calib_seqlen=32
    )
    assert not list(tmp_path.glob("out*")) and len(plan.group_sizes) == 14
    assert needs.disk > needs.output and needs.seconds > 0
    size = (convert(dense, tmp_path / "out", method, **FAST) / "model.safetensors").stat().st_size
    assert 0 <= size - needs.output < 20_000  # the header


def convert_in_little_memory(dense, out, **options):
    quantize_checkpoint(
        dense,
        out,
        Recipe.of("gptq", None, 32),
        activation_memory=20_000,
        calib_samples=6,
        calib_seqlen=32,
        **options,
    )
    return out


def test_activations_beyond_the_bound_go_to_disk(dense, tmp_path, monkeypatch):
    mapped = []
    on_disk = block_quantizer._on_disk
    monkeypatch.setattr(block_quantizer, "_on_disk", lambda *a: mapped.append(a) or on_disk(*a))
    convert(dense, tmp_path / "roomy", "gptq", **FAST)
    assert not mapped
    convert_in_little_memory(dense, tmp_path / "tight")
    assert mapped and not list((tmp_path / "tight").glob("*.tmp*"))


@torch.no_grad()
def test_a_block_run_in_parts_sees_and_gives_what_it_does_at_once(dense):
    source = BlockSource(open_checkpoint(dense), torch.device("cpu"))
    sites = [group[0] for group in source.groups(0)]
    results = []
    for at_once in (None, 3):
        hidden, block, met = source.embed(torch.arange(3, 83).reshape(5, 16)), source.load(0), {}

        def damage(site, hessian, block=block, met=met):
            """Stands in for quantization: any change of the weights that the sites after it must see."""
            met[site] = hessian
            block.get_submodule(site).weight.mul_(0.7)

        calibration.run_quantizing(
            block,
            hidden,
            source.keyword_arguments(hidden[:1])[0],
            [[site] for site in sites],
            damage,
            at_once,
        )
        results.append((hidden, met))
    (whole, want), (parts, got) = results
    torch.testing.assert_close(parts, whole)
    assert list(got) == sites
    for site in sites:
        torch.testing.assert_close(got[site], want[site])


def test_what_was_on_disk_is_resumed_too(dense, tmp_path, monkeypatch):
    whole = contents(convert_in_little_memory(dense, tmp_path / "whole"))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(block_quantizer.BlockResult, "__init__", raise_on_second_call())
        convert_in_little_memory(dense, tmp_path / "out")
    assert contents(convert_in_little_memory(dense, tmp_path / "out", resume=True)) == whole


def raise_on_second_call():
    count, original = [0], block_quantizer.BlockResult.__init__

    def init(self, *args, **kwargs):
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        original(self, *args, **kwargs)

    return init


def peak_memory(arguments, log) -> int:
    """Bytes that `nibble` with these arguments had resident at most."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "nibble", *map(str, arguments)],
            stdout=out,
            stderr=out,
            env=environment,
            cwd=log.parent,
        )
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, log.read_text()
    return usage.ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_peak_memory_is_one_block_and_the_activations_whatever_the_depth(make_gguf, tmp_path):
    """Blocks as wide as those of a 1B Llama (2048 x 8192), two of them and six: 0.24 GB of float32 a block."""
    dequantize_checkpoint(open_checkpoint(make_gguf("llama")), tmp_path / "tiny")
    peaks = {}
    for layers in (2, 6):
        folder = tmp_path / f"wide{layers}"
        shutil.copytree(tmp_path / "tiny", folder)
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=layers,
            vocab_size=272,
            num_attention_heads=32,
            num_key_value_heads=8,
            bos_token_id=1,
            eos_token_id=2,
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config).bfloat16()
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.02)
        model.save_pretrained(folder)
        del model
        _, needs = dry_run(
            folder, tmp_path / "x", Recipe.of("gptq"), calib_samples=8, calib_seqlen=128
        )
        peaks[layers] = peak_memory(
            [
                "convert",
                folder,
                "--gptq",
                "-o",
                tmp_path / f"out{layers}",
                "--no-eval",
                "--calib-samples",
                8,
                "--calib-seqlen",
                128,
            ],
            tmp_path / "log",
        )
        print(
            f"{layers} blocks: peak {peaks[layers] / 1e9:.2f} GB, planned {needs.memory / 1e9:.2f} GB"
        )
        assert 0.4 * needs.memory < peaks[layers] < 1.1 * needs.memory
        shutil.rmtree(folder)
    block = 4 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192)
    assert peaks[6] - peaks[2] < 0.5 * block  # the 16-bit model alone grew by 2 blocks of float32
