"""What the Triton kernels compile to, on a machine without a GPU: `make kernels-report`.

    python bench/kernels_report.py [--package gptq] [--cc 80 90] [--match 'gemm 16'] [--save bench/results/FILE.txt]
    python bench/kernels_report.py --first     one configuration of each kernel of each package: what CI has time for

Each configuration that `cases.py` of a package lists is compiled for each compute capability, disassembled, and held to
the gate: it compiles, spills nothing, fits the card's shared memory, multiplies on tensor cores where it has a tl.dot
(FP8 by FP8 on those for FP8; on cc 75 Triton knows none), and its products read weights 128 bits at a time. The last
column counts integer instructions (logic, shifts, byte permutes) of the longest loop per weight it decodes;
INT_OPS_LIMIT says how many a memory-bound product has room for.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

CARDS = (75, 80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may have
TENSOR = re.compile(r"(HMMA|HGMMA|QGMMA|QMMA|UTCHMMA|UTCQMMA|UTC\w*MMA|IMMA)")
FP8_TENSOR = re.compile(r"(QGMMA|QMMA|UTCQMMA)")
INTEGER = re.compile(r"(LOP3|SHF|PRMT)")
# Integer operations that fit in the time in which the capability's weakest card reads 0.53 bytes, a weight of 4 bits in
# groups of 128: multiprocessors x 64 lanes x clock / (bandwidth / 0.53). H100 for those that are not listed.
INT_OPS_LIMIT = {75: 5.8, 86: 5.0, 89: 7.4, 120: 6.1}  # RTX 2080 Ti, 3090, 4060, 5070
H100_INT_OPS = 2.3
KIND = re.compile(r"[a-z]\w*(-[a-z]+)?")  # of a name: gemm, attention-prefill, fused-norm


@dataclass(frozen=True)
class Compiled:
    registers: int
    stack: int
    shared: int  # bytes
    opcodes: Counter  # "LDG.E.128" -> how often
    loop: Counter  # those of the longest loop
    has_dot: bool


def compile_case(case, cc: int) -> Compiled:
    """Compile for `cc` without a device. Needs a process without TRITON_INTERPRET."""
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.signature)
    source = ASTSource(
        fn=case.kernel,
        signature=case.signature,
        constexprs=case.constexprs,
        attrs={(names.index(a),): [["tt.divisibility", 16]] for a in case.aligned},
    )
    built = triton.compile(
        source,
        target=GPUTarget("cuda", cc, 32),
        options={
            "num_warps": case.num_warps,
            "num_stages": case.num_stages,
            "enable_fp_fusion": True,
        },
    )
    folder = Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.check_output(
            [folder / "cuobjdump", "-res-usage", file.name], text=True, stderr=subprocess.STDOUT
        )
        sass = subprocess.run(
            [folder / "cuobjdump", "-sass", file.name], text=True, capture_output=True, check=True
        ).stdout
    opcodes, loop = count_opcodes(sass)
    return Compiled(
        _usage(usage, "REG"),
        _usage(usage, "STACK"),
        built.metadata.shared,
        opcodes,
        loop,
        "tt.dot" in built.asm["ttir"],
    )


def _usage(text: str, field: str) -> int:
    return int(re.search(rf"{field}:(\d+)", text).group(1))


def count_opcodes(sass: str) -> tuple[Counter, Counter]:
    """Opcodes of a whole kernel, and of its longest loop. What stands after the last EXIT are waits moved out of the
    way, whose jumps back are no loops."""
    code = [
        (int(at, 16), op, target)
        for at, op, target in re.findall(
            r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)[^;]*?(?:(0x[0-9a-f]+)\s*)?;",
            sass,
        )
    ]
    end = max((at for at, op, _ in code if op == "EXIT"), default=0)
    loops = [
        (int(target, 16), at)
        for at, op, target in code
        if op.startswith("BRA") and target and int(target, 16) < at < end
    ]
    first, last = max(loops, key=lambda span: span[1] - span[0], default=(0, -1))
    return Counter(op for _, op, _ in code), Counter(
        op for at, op, _ in code if first <= at <= last
    )


def total(opcodes: Counter, pattern: re.Pattern | str) -> int:
    """How many opcodes match from their first letter."""
    return sum(count for op, count in opcodes.items() if re.match(pattern, op))


def integer_ops_per_weight(case, done: Compiled) -> float | None:
    """Integer instructions that a thread of the loop spends on a weight."""
    if not case.weights_per_program or not done.loop:
        return None
    return total(done.loop, INTEGER) * 32 * case.num_warps / case.weights_per_program


def wide_loads(done: Compiled) -> int:
    """Loads of global memory, direct or asynchronous, of 128 bits."""
    return sum(
        count
        for op, count in done.opcodes.items()
        if op.startswith(("LDG", "LDGSTS")) and ".128" in op
    )


def failures(case, done: Compiled, cc: int) -> list[str]:
    """What of the gate this configuration misses."""
    missed = []
    spilled = total(done.opcodes, r"(STL|LDL)")
    if spilled:
        missed.append(f"spills ({spilled} accesses)")
    if done.shared > SHARED_LIMIT[cc] * 1024:
        missed.append(f"shared memory {done.shared} B above {SHARED_LIMIT[cc]} KiB")
    if done.has_dot and cc >= 80 and not total(done.opcodes, TENSOR):
        missed.append("no tensor-core instruction")
    if case.fp8_dot and not total(done.opcodes, FP8_TENSOR):
        missed.append("no FP8 tensor-core instruction")
    if case.weights_per_program:
        if not wide_loads(done):
            missed.append("no 128-bit load")
        ops = integer_ops_per_weight(case, done)
        limit = INT_OPS_LIMIT.get(cc, H100_INT_OPS)
        if ops is not None and ops > limit:
            missed.append(f"{ops:.2f} integer operations a weight, more than {limit}")
    return missed


def line(case, cc: int, done: Compiled) -> str:
    """One row of the table."""
    ops = integer_ops_per_weight(case, done)
    return (
        f"{cc:>4} {case.name:<58} {done.registers:>4} {done.stack:>5} {done.shared:>7} "
        f"{total(done.opcodes, TENSOR):>4} {wide_loads(done):>4}  {'' if ops is None else format(ops, '.2f')}"
    )


def chosen(packages: list[list], cc: int, first: bool) -> list:
    """Of the packages' configurations those for this card; first: only the first of each kind in a package."""
    fitting = [[case for case in cases if case.min_cc <= cc <= case.max_cc] for cases in packages]
    if first:
        fitting = [
            list({KIND.match(case.name)[0]: case for case in reversed(cases)}.values())
            for cases in fitting
        ]
    return [case for cases in fitting for case in cases]


def report(packages: list[list], cards: tuple[int, ...], first: bool, write=print) -> int:
    """Print the table; the number of configurations that miss the gate."""
    import triton

    write(
        f"Triton {triton.__version__}; registers a thread, stack and shared memory in bytes, tensor-core "
        "instructions, 128-bit global loads, integer instructions per weight"
    )
    write(
        f"{'cc':>4} {'kernel':<58} {'regs':>4} {'stack':>5} {'shared':>7} {'mma':>4} {'wide':>4}  int/w"
    )
    bad = built = 0
    for cc in cards:
        for case in chosen(packages, cc, first):
            built += 1
            try:
                done = compile_case(case, cc)
            except (
                Exception
            ) as error:  # a compiler reports in many ways, and each is a failure of the gate
                lines = [text for text in str(error).splitlines() if text.strip()]
                write(
                    f"{cc:>4} {case.name:<58} does not compile: {type(error).__name__}: {' '.join(lines[-2:])[:200]}"
                )
                bad += 1
                continue
            missed = failures(case, done, cc)
            bad += bool(missed)
            write(line(case, cc, done) + "".join(f"  MISSED: {text}" for text in missed))
    write(f"{built} configurations compiled, {bad} miss the gate")
    return bad


def main() -> int:
    """Compile what the arguments choose; exit status 1 if anything misses the gate."""
    from nibble.kernels.measure.compile_cases import PACKAGES, compile_cases

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", nargs="+", default=PACKAGES, choices=PACKAGES)
    parser.add_argument("--cc", nargs="+", type=int, default=CARDS, choices=CARDS)
    parser.add_argument("--match", default="", help="only kernels whose name contains this")
    parser.add_argument(
        "--first", action="store_true", help="only the first configuration of each kernel"
    )
    parser.add_argument("--save", type=Path, help="write the table here too")
    args = parser.parse_args()
    rows: list[str] = []

    def write(text: str) -> None:
        print(text, flush=True)
        rows.append(text)

    matching = [
        [case for case in compile_cases((package,)) if args.match in case.name]
        for package in args.package
    ]
    bad = report(matching, tuple(args.cc), args.first, write)
    if args.save:
        args.save.write_text("\n".join(rows) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
