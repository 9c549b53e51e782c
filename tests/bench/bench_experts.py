"""The routed experts' products on one GPU, forward, input gradient and weight gradient apart.

    python -m tests.bench.bench_experts --rows 32768

35b-a3b widths in bfloat16, even routing. The weight gradient goes to a float32 main gradient, by
grouped_mm and an addition and by one kernel of ours; the floor is what 790 TFLOP/s or 3 TB/s allow,
whichever takes longer. Then their activation, and the shared expert's gate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from qwen35_mcore.kernels.expert_gradient_triton import add_weight_gradient
from qwen35_mcore.kernels.sigmoid_gate import sigmoid_gate
from qwen35_mcore.kernels.weighted_swiglu import weighted_swiglu
from tests.bench.common import BANDWIDTH, RATE_TFLOPS, arguments, median_ms, report

HIDDEN, WIDTH = 2048, 512


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 32, 64, 256])
    parser.add_argument("--tokens", type=int, default=4096, help="Of the shared expert.")
    parser.add_argument("--unused", type=float, default=1.0, help="Unused rows, per used one.")
    args = parser.parse_args()
    for experts in args.experts:
        for name, out, into in (("gate and up", 2 * WIDTH, HIDDEN), ("down", HIDDEN, WIDTH)):
            products(name, experts, args.rows, int(args.rows * (1 + args.unused)), out, into, args)
        activation(args.rows, int(args.rows * (1 + args.unused)), args)
    gate(args.tokens, args)


def products(name: str, experts: int, used: int, rows: int, out: int, into: int, args: Any) -> None:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x, dy, weight = random(rows, into), random(rows, out), random(experts, out, into)
    main_grad = torch.zeros(experts, out, into, device="cuda")
    counts = torch.full((experts,), used // experts, device="cuda")
    ends = counts.cumsum(0, dtype=torch.int32)

    def by_two() -> None:
        main_grad.add_(F.grouped_mm(dy.t(), x, offs=ends))

    flops = 2.0 * used * out * into
    read_and_written, weights = 2.0 * used * (out + into), float(experts * out * into)
    pieces: dict[str, tuple[Callable[[], Any], float]] = {
        "forward": (
            lambda: F.grouped_mm(x, weight.transpose(1, 2), offs=ends),
            read_and_written + 2 * weights,
        ),
        "input gradient": (
            lambda: F.grouped_mm(dy, weight, offs=ends),
            read_and_written + 2 * weights,
        ),
        "weight gradient, grouped_mm and addition": (by_two, read_and_written + 8 * weights),
        "weight gradient, one kernel": (
            lambda: add_weight_gradient(dy, x, ends, main_grad),
            read_and_written + 8 * weights,
        ),
    }
    for piece, (work, moved) in pieces.items():
        floor = max(flops / RATE_TFLOPS / 1e12, moved / BANDWIDTH) * 1e3
        row = {"layer": name, "experts": experts, "rows": used, "what": piece, "floor_ms": floor}
        report(row | median_ms(work), args.json)


def activation(used: int, rows: int, args: Any) -> None:
    x = torch.randn(rows, 2 * WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    probs = torch.rand(rows, device="cuda", requires_grad=True)
    dy = torch.randn(rows, WIDTH, device="cuda", dtype=torch.bfloat16)
    end = torch.tensor([used], device="cuda", dtype=torch.int32)

    def both() -> None:
        torch.autograd.grad(weighted_swiglu(x, probs, end), (x, probs), dy)

    moved = 2.0 * used * WIDTH * (2 + 1 + 2 + 1 + 2)
    row = {"layer": "activation, both ways", "rows": used, "of": rows}
    report(row | {"floor_ms": moved / BANDWIDTH * 1e3} | median_ms(both), args.json)


def gate(tokens: int, args: Any) -> None:
    def random(width: int) -> torch.Tensor:
        return torch.randn(tokens, 1, width, device="cuda", dtype=torch.bfloat16)

    x, logits, dy = random(HIDDEN).requires_grad_(), random(1).requires_grad_(), random(HIDDEN)
    by = {"one kernel each way": sigmoid_gate, "torch": lambda x, logits: x * logits.sigmoid()}
    for name, formula in by.items():

        def both(formula: Callable[..., Any] = formula) -> None:
            torch.autograd.grad(formula(x, logits), (x, logits), dy)

        row = {"layer": "shared expert's gate, both ways", "rows": tokens, "what": name}
        floor = 2.0 * tokens * HIDDEN * (2 + 3) / BANDWIDTH * 1e3
        report(row | {"floor_ms": floor} | median_ms(both), args.json)


if __name__ == "__main__":
    main()
