"""`make test-neon`: the ARM kernels without an ARM machine, against this x86 machine's on the same bytes.

    python tests/kernels/neon.py

Cross-compiles the library (every compiler that is found: `zig`, which pip installs as ziglang, and
aarch64-linux-gnu-g++), runs products of every format and tiny decoders under qemu's emulation of an ARM core, and
compares. Products must equal AVX2's bit for bit: weights and activations are prepared alike, integers are exact, and
floats are multiplied and added in the same order. Decoders contain cosines and sums that compilers may contract: they
agree to LIMIT of the results' norm.

Without a compiler or qemu it says what is missing and does nothing. What it cannot show is speed.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from call_image import Image, Result
from torch import Tensor

from nibble.engine.backends.cpp.layers import CppExperts
from nibble.engine.config import EngineConfig
from nibble.engine.runner import Runner
from nibble.kernels.cpu import library
from nibble.kernels.cpu.build import HERE, compile_objects, run
from nibble.kernels.cpu.library import NbBatch, Pool
from nibble.kernels.cpu.prepared import PreparedGroup, prepare
from nibble.quant.weight import QuantizedWeight

TESTS = Path(__file__).resolve().parents[1]
ROWS = (1, 3, 8, 17, 33)
INTEGERS = [(bits, zero) for bits in (2, 3, 4, 6, 8) for zero in ("mid", "zeros", "mins")]
SHAPES = [
    (48, 64, 8),
    (33, 72, 24),
    (64, 96, 16),
    (100, 160, 32),
    (20, 576, 64),
    (36, 200, 128),
    (17, 576, 576),
]
FP8_BLOCKS = [(1, 640), (640, 640), (32, 128), (1, 64), (128, 256)]
DECODERS = [
    ("llama", None, "auto"),
    ("gemma3", None, "int8"),
    ("mistral-window", "int4", "int8"),
    ("qwen3", "int4", "auto"),
    ("qwen2", "fp8", "auto"),
    ("qwen2-moe", "int4", "auto"),
]
LIMIT = 2e-3
CORE, OLD_CORE = "neoverse-n1", "cortex-a53"  # with and without the dot product instructions


def load(file: str):
    """A test module by its path below tests/."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, TESTS / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compilers() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name -> command, further flags, for programs that need no libraries at run time."""
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    zig = shutil.which("zig") or (
        f"{sys.executable} -m ziglang" if importlib.util.find_spec("ziglang") else None
    )
    if zig:  # which has names of its own for what -march says
        found["zig c++"] = (
            f"{zig} c++",
            ("-target", "aarch64-linux-musl", "-mcpu=generic+dotprod"),
        )
    if gcc := shutil.which("aarch64-linux-gnu-g++"):
        found["aarch64-linux-gnu-g++"] = (gcc, ())
    return found


def add_products(image: Image) -> None:
    native = load("kernels/test_cpu_native.py")
    for n, k, group in SHAPES:
        for bits, zero in INTEGERS:
            weight = prepare(native.make_integer(n, k, group, bits, zero), torch.randn(n))
            for rows in ROWS:
                for mode, int8 in (("int8", True), ("bf16", False)):
                    image.linear(
                        mode,
                        f"{bits} bits, {zero}, {n}x{k}, group {group}, {rows} rows",
                        PreparedGroup([weight], int8),
                        torch.randn(rows, k),
                    )
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = codes[codes.float().isfinite()]
    for n, k in ((33, 200), (48, 576)):
        weights = {"dense": prepare(torch.randn(n, k).bfloat16())}
        for block in FP8_BLOCKS:
            scales = torch.rand(-(-n // block[0]), -(-k // block[1]))
            weights[f"fp8 {block}"] = prepare(
                QuantizedWeight(
                    finite[torch.randint(0, len(finite), (n, k))],
                    scales,
                    kind="fp8",
                    bits=8,
                    block=block,
                )
            )
        for name, weight in weights.items():
            for rows in ROWS:
                image.linear(
                    "bf16",
                    f"{name}, {n}x{k}, {rows} rows",
                    PreparedGroup([weight], True),
                    torch.randn(rows, k),
                )
    for code, zero in ((255, 0), (0, 255)):  # the largest sums there are
        largest = QuantizedWeight(
            torch.full((16, 256), code, dtype=torch.uint8),
            torch.ones(16, 2).half(),
            zeros=torch.full((16, 2), zero, dtype=torch.uint8),
            bits=8,
            block=(1, 128),
        )
        image.linear(
            "int8",
            f"codes of {code} less {zero}",
            PreparedGroup([prepare(largest)], True),
            torch.ones(5, 256),
        )
    broken = torch.ones(3, 128)
    broken[1, 7] = float("nan")
    image.linear(
        "int8",
        "not a number",
        PreparedGroup([prepare(native.make_integer(48, 128, 32, 4, "zeros"))], True),
        broken,
    )


def add_decoder(
    image: Image, name: str, quantize: str | None, cache_dtype: str, folder: Path
) -> None:
    """Two requests' prompts, then a token of each, then logits; blocks in no order."""
    group = f"{name}, {quantize or 'bf16'} weights, cache {cache_dtype}"
    load("engine/models.py").build(name, folder)
    config = EngineConfig(
        model=str(folder),
        dtype="bfloat16",
        quantize=quantize,
        kv_cache_dtype=cache_dtype,
        kv_cache_memory=1 << 22,
        prepared_cache=None,
        num_threads=2,
    )
    decoder = Runner(config).model
    image.add(decoder)
    for linears in decoder.groups:
        image.arrays(linears)
    for layer in decoder.layers:
        image.structure(layer.mixer.struct)
        if isinstance(layer.mlp, CppExperts):
            image.structure(layer.mlp.array)
            if layer.mlp.shared is not None:
                image.structure(layer.mlp.shared.struct)
        image.structure(layer.mlp.struct)
    for pointed_to in (decoder.ropes.struct, decoder.layer_structs):
        image.structure(pointed_to)
    model = image.structure(decoder._struct)
    cache = decoder.new_cache([10])
    image.add(cache.pages)
    tables = torch.tensor([7, 3, 9, 5, 2], dtype=torch.int32)
    starts = torch.tensor([0, 4], dtype=torch.int32)
    groups = torch.zeros(len(decoder.layers), dtype=torch.int32)
    offsets = torch.tensor(list(cache.offsets))
    for what, items in (
        ("prompts", [(60, 0, 0), (5, 0, 0)]),
        ("decoding", [(1, 60, 0), (1, 5, 0)]),
    ):
        flat = torch.tensor(items, dtype=torch.int32)
        tokens = torch.randint(
            3, decoder.model.vocab_size, (int(flat[:, 0].sum()),), dtype=torch.int32
        )
        image.add([flat, tokens, tables, starts, groups, offsets])
        batch = NbBatch(
            len(tokens),
            len(items),
            tokens.data_ptr(),
            flat.data_ptr(),
            tables.data_ptr(),
            starts.data_ptr(),
            groups.data_ptr(),
            cache.pages.data_ptr(),
            offsets.data_ptr(),
            cache.int8,
        )
        image.forward(group, what, model, batch, decoder.model.hidden_size)
    image.logits(
        group,
        "logits",
        model,
        torch.randn(3, decoder.model.hidden_size),
        decoder.model.vocab_size,
    )
    mixer = decoder.layers[0].mixer.spec  # here all layers have one shape
    blocks = cache.pages.view(len(cache.layers), len(cache.layers[0]), mixer.num_kv_heads, -1)
    if cache.int8:  # the codes; scales follow them
        codes = 2 * config.block_size * mixer.head_dim
        image.watch(group, "cache", blocks.view(torch.int8), codes)
    else:
        image.watch(group, "cache", blocks.view(torch.bfloat16))


def emulate(qemu: str, core: str, program: Path, *arguments: object) -> str:
    done = subprocess.run(
        [qemu, "-cpu", core, str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(
            f"{program.name} failed under {core}: {done.stderr.strip() or done.returncode}"
        )
    return done.stdout.strip()


def cross_compile(command: str, flags: tuple[str, ...], folder: Path) -> Path:
    """The driver with the library in it; that the objects also make a shared library is tried."""
    objects = compile_objects(folder, command, "aarch64", flags)
    compiler = shlex.split(command)
    run(
        [
            *compiler,
            *flags,
            "-shared",
            *objects,
            "-o",
            str(folder / library.LIBRARY.name),
            "-pthread",
        ]
    )
    program = folder / "neon_driver"
    run(
        [
            *compiler,
            "-std=c++17",
            "-O2",
            *flags,
            f"-I{HERE}",
            str(Path(__file__).with_name("neon_driver.cpp")),
            *objects,
            "-static",
            "-o",
            str(program),
            "-pthread",
        ]
    )
    return program


def difference(result: Result, got: Tensor, want: Tensor) -> float:
    """0 where every bit that matters is the same, else the difference's share of the norm."""
    a, b = result.read(got).double(), result.read(want).double()
    if torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()):
        return 0.0
    return float((a - b).norm() / b.norm())


def compare(image: Image, got: Tensor, want: Tensor, isa: str) -> bool:
    """Prints how far results lie apart, by group; whether all are as they should be."""
    apart: dict[str, list[float]] = {}
    good = True
    for result in image.results:
        error = difference(result, got, want)
        apart.setdefault(result.group, []).append(error)
        exact = result.group == "int8" or (result.group == "bf16" and isa == "avx2")
        limit = 0.0 if exact else 1e-6 if result.group == "bf16" else LIMIT
        if not error <= limit:
            print(
                f"  {result.group}: {result.name}: {error:.1e} of the norm, not at most {limit:.0e}"
            )
            good = False
    for group, errors in apart.items():
        print(
            f"  {isa}: {group}: {errors.count(0.0)} of {len(errors)} equal, others within {max(errors):.1e}"
        )
    return good


def main() -> int:
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    known, found = library.instruction_sets(), compilers()
    missing = [
        what
        for what, has in (
            ("qemu-aarch64 (apt-get install qemu-user-static)", qemu),
            (
                "a cross compiler (pip install ziglang, or apt-get install g++-aarch64-linux-gnu)",
                found,
            ),
            ("this machine's own C++ kernels with avx2 to compare with", "avx2" in known),
        )
        if not has
    ]
    if missing:
        print("skipped, there is no " + "; no ".join(missing))
        return 0
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    image, good = Image(), True
    add_products(image)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i, (model, quantize, cache) in enumerate(DECODERS):
            add_decoder(image, model, quantize, cache, folder / f"model{i}")
        data = image.finish()
        (folder / "image").write_bytes(data)
        wanted = {isa: image.run(data, Pool(2, isa)) for isa in known}
        for compiler, (command, flags) in found.items():
            program = cross_compile(command, flags, folder)
            isas = {core: emulate(qemu, core, program) for core in (CORE, OLD_CORE)}
            print(f"{compiler}: {len(image.results)} results, instruction sets {isas}", flush=True)
            good &= isas == {CORE: "neon", OLD_CORE: ""}
            emulate(qemu, CORE, program, folder / "image", folder / "out", "neon", 2)
            got = torch.frombuffer(
                bytearray((folder / "out").read_bytes()), dtype=torch.uint8
            ).clone()
            for isa, want in wanted.items():
                good &= compare(image, got, want, isa)
    print("passed" if good else "FAILED")
    return int(not good)


if __name__ == "__main__":
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    raise SystemExit(main())
