"""`make bench-gpu`, products: y = x W^T of each projection, by kind of weight and number of rows.

Whatever kernel the engine would choose is measured: a new one in kernels/select.py needs no line here, a new kind of
weight one in KINDS. Peers are torch's own products, and gemlite's where it is installed.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from gpu_cells import Cell, Lab, Row
from gpu_report import DENSE, GEMLITE, INT4PACK, SCALED_MM
from torch import Tensor

from nibble.kernels.dequant_gemm.trial import Kind, random_weight
from nibble.kernels.select import choose
from nibble.kernels.spec import LinearSpec

ROWS, QUICK_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024), (1, 16, 32, 64, 256, 1024)
# (N, K) of the fused projections
SHAPES = {
    "Llama-3-8B": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    },
    "Llama-3-70B": {
        "qkv": (10240, 8192),
        "o": (8192, 8192),
        "gate_up": (57344, 8192),
        "down": (8192, 28672),
    },
    "Qwen2.5-7B": {
        "qkv": (4608, 3584),
        "o": (3584, 3584),
        "gate_up": (37888, 3584),
        "down": (3584, 18944),
    },
}
# kind of weight; zero points; what the format asks of activations
KINDS = {
    "int4 g128 asym": (Kind("int", 4, 128), "zeros", "none"),
    "fp8": (Kind("fp8", 8, 0), "mid", "none"),
    "fp8 token": (Kind("fp8", 8, 0), "mid", "token"),
    "fp8 block 128": (Kind("fp8", 8, 128), "mid", "group"),
    "int4 g128 sym": (Kind("int", 4, 128), "mid", "none"),
    "int4 g32 mins": (Kind("int", 4, 32), "mins", "none"),
    "int8 g128": (Kind("int", 8, 128), "mid", "none"),
    "int3 g128": (Kind("int", 3, 128), "zeros", "none"),
    "int2 g64": (Kind("int", 2, 64), "zeros", "none"),
}
Prepare = Callable[[int, int, Lab], tuple[Callable[[Tensor], Tensor], int, str]]


def plan(quick: bool) -> list[Cell]:
    """A cell for each projection and kind; a projection's bf16 product first, which the others are compared with."""
    kinds = [
        DENSE,
        *(list(KINDS)[:3] if quick else KINDS),
        INT4PACK,
        SCALED_MM,
        *([] if quick else [GEMLITE]),
    ]
    return [
        Cell(
            "products",
            f"{model} {layer} {kind}",
            {
                "model": model,
                "layer": layer,
                "n": n,
                "k": k,
                "kind": kind,
                "rows": QUICK_ROWS if quick else ROWS,
            },
        )
        for model, layers in SHAPES.items()
        if not quick or model == "Llama-3-8B"
        for layer, (n, k) in layers.items()
        for kind in kinds
    ]


def measure(cell: Cell, lab: Lab) -> Iterator[Row]:
    """A row for each number of activations."""
    given = dict(cell.arguments)
    n, k, rows = given["n"], given["k"], given.pop("rows")
    prepare = PEERS.get(given["kind"]) or _ours(given["kind"])
    first, nbytes, kernel = prepare(n, k, lab)
    products = [first] + [prepare(n, k, lab)[0] for _ in range(lab.copies(nbytes) - 1)]
    for m in rows:
        x = torch.randn(m, k, device=lab.device, dtype=torch.bfloat16)
        moved = nbytes + 2 * m * (n + k)
        yield Row(
            {**given, "m": m, "bytes": moved, "kernel": kernel},
            [_bound(product, x) for product in products],
        )


def _bound(product: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: product(x)


def _ours(name: str) -> Prepare:
    """The kernel that the engine would choose for this kind of weight."""
    kind, zero, act_quant = KINDS[name]

    def prepare(n: int, k: int, lab: Lab) -> tuple[Callable[[Tensor], Tensor], int, str]:
        weight = replace(random_weight(kind, n, k, lab.device, zero), act_quant=act_quant)
        spec = LinearSpec.of(weight, torch.bfloat16, lab.device)
        kernel = choose(spec).kernel
        before = torch.cuda.memory_allocated()
        prepared = kernel.prepare(weight, spec)
        held = torch.cuda.memory_allocated() - before
        return (lambda x: kernel.apply(x, prepared, None)), held, kernel.name

    return prepare


def _dense(n: int, k: int, lab: Lab) -> tuple[Callable[[Tensor], Tensor], int, str]:
    weight = torch.randn(n, k, device=lab.device, dtype=torch.bfloat16) / k**0.5
    return (lambda x: F.linear(x, weight)), weight.nbytes, "cuBLAS"


def _int4pack(n: int, k: int, lab: Lab) -> tuple[Callable[[Tensor], Tensor], int, str]:
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=lab.device)
    weight = torch._convert_weight_to_int4pack(packed, 8)
    scales = torch.rand(k // 128, n, 2, device=lab.device, dtype=torch.bfloat16) / k**0.5
    return (
        (lambda x: torch._weight_int4pack_mm(x, weight, 128, scales)),
        weight.nbytes + scales.nbytes,
        "tinygemm",
    )


def _scaled_mm(n: int, k: int, lab: Lab) -> tuple[Callable[[Tensor], Tensor], int, str]:
    """FP8 by FP8 with a scale for each row and column; the quantization of activations is not in its time."""
    weight = (torch.randn(n, k, device=lab.device) * 10).to(torch.float8_e4m3fn).t()
    columns = torch.full((1, n), 1e-3, device=lab.device)
    codes: dict[int, tuple[Tensor, Tensor]] = {}

    def product(x: Tensor) -> Tensor:
        a, rows = codes.get(len(x)) or codes.setdefault(
            len(x), (x.to(torch.float8_e4m3fn), torch.ones(len(x), 1, device=lab.device))
        )
        return torch._scaled_mm(a, weight, rows, columns, out_dtype=torch.bfloat16)

    return product, weight.nbytes, "cuBLASLt or CUTLASS"


def _gemlite(n: int, k: int, lab: Lab) -> tuple[Callable[[Tensor], Tensor], int, str]:
    if importlib.util.find_spec("gemlite") is None:
        raise ModuleNotFoundError("gemlite is not installed")
    from gemlite.core import DType, GemLiteLinearTriton

    weight = random_weight(KINDS["int4 g128 asym"][0], n, k, lab.device)
    layer = GemLiteLinearTriton(
        W_nbits=4,
        group_size=128,
        in_features=k,
        out_features=n,
        input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )
    layer.pack(
        weight.codes,
        weight.scales.bfloat16().reshape(-1, 1),
        weight.zeros.bfloat16().reshape(-1, 1),
        None,
    )
    return layer.forward, n * k // 2 + 4 * n * k // 128, "gemlite"


PEERS: dict[str, Prepare] = {
    DENSE: _dense,
    INT4PACK: _int4pack,
    SCALED_MM: _scaled_mm,
    GEMLITE: _gemlite,
}
