"""A step of Muon beside one of Adam, on the matrices of one rank: time and memory.

    python -m tests.bench.bench_muon --case 35b-a3b,4,32

The first layers of a flavor and so many experts, float32 main parameters as in a bf16 run. Both
optimizers take the same parameters; the scalar ones, Adam's in any run, are left out.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch

from qwen35_mcore.config.matrices import Weight, matrix_weights
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.mcore.muon import MatrixMuon, mark
from tests.bench.common import PEAK_TFLOPS, arguments, cut_config, median_ms, peak_gib, report

PRECISIONS = ("medium", "high")
ALONE = SimpleNamespace(size=lambda: 1)


def parameters(model_config: Qwen35Config, device: str) -> list[torch.nn.Parameter]:
    """Every parameter of matrices, with a gradient; experts stacked, layer by layer."""
    made = []
    for weight in matrix_weights(model_config):
        stacked = weight.place.startswith("expert")
        layers = weight.count // model_config.num_experts if stacked else weight.count
        made += [_parameter(weight, model_config, stacked, device) for _ in range(layers)]
    return made


def _parameter(
    weight: Weight, model_config: Qwen35Config, stacked: bool, device: str
) -> torch.nn.Parameter:
    rows = list(weight.rows.values())
    stack = [model_config.num_experts] if stacked else []
    parameter = torch.nn.Parameter(
        0.02 * torch.randn(*stack, sum(rows), weight.columns, device=device)
    )
    parameter.grad = torch.randn_like(parameter)
    mark(parameter, [count // (weight.groups or 1) for count in rows])
    return parameter


def muon(params: list[torch.nn.Parameter], precision: str) -> torch.optim.Optimizer:
    groups: Any = SimpleNamespace(tp=ALONE, expt_tp=ALONE)
    return MatrixMuon(params, pg_collection=groups, fp32_matmul_prec=precision)


def adam(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """What megatron-core takes: Transformer Engine's, or plain torch without a GPU."""
    if not torch.cuda.is_available():
        return torch.optim.AdamW(params, lr=1e-3)
    from transformer_engine.pytorch.optimizers import FusedAdam

    optimizer: torch.optim.Optimizer = FusedAdam(params, lr=1e-3)
    return optimizer


def bench(flavor: str, layers: int, experts: int, args: Any) -> None:
    model_config = cut_config(flavor, layers, experts or None)
    weights = matrix_weights(model_config)
    flops = sum(weight.newton_schulz_flops() for weight in weights)
    params = parameters(model_config, "cpu" if args.cpu else "cuda")
    for which in ("adam", *(f"muon {precision}" for precision in PRECISIONS)):
        optimizer = adam(params) if which == "adam" else muon(params, which.partition(" ")[2])
        timing = median_ms(optimizer.step, repeats=args.repeats, warmup=2)
        state = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
        row = {
            "what": "optimizer step",
            "which": which,
            "flavor": flavor,
            "layers": layers,
            "experts": experts,
            "parameters": sum(p.numel() for p in params),
            **timing,
            "state_gib": sum(t.numel() * t.element_size() for t in state) / 2**30,
        }
        if which != "adam":
            row |= {"tflop": flops / 1e12, "tflops": flops / timing["ms"] / 1e9}
        if not args.cpu:
            row["peak_gib"] = peak_gib(optimizer.step)
        if which == "muon medium" and not args.cpu:
            row["mfu"] = row["tflops"] / PEAK_TFLOPS["bf16"]
        report(row, args.json)
        del optimizer


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--case",
        action="append",
        required=True,
        metavar="FLAVOR,LAYERS,EXPERTS",
        help="Experts of one rank; may be given several times.",
    )
    parser.add_argument("--cpu", action="store_true", help="Run here; for a tiny flavor.")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device, or --cpu")
    for case in args.case:
        flavor, layers, experts = case.split(",")
        bench(flavor, int(layers), int(experts), args)


if __name__ == "__main__":
    main()
