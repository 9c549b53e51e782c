"""Our GatedDeltaNet against megatron-core's: forward and backward, same weights, one process.

    python -m tests.bench.bench_gdn --case 35b-a3b,4096,4 --json out.jsonl

Floor: operations of the projections and the delta rule at 790 TFLOP/s, or the bytes of inputs,
outputs and intermediates each touched once at 3 TB/s, whichever is longer.
"""

from __future__ import annotations

import os
import sys
from itertools import product
from typing import Any

import torch
from megatron.core.models.backends import get_backend as mcore_backend
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_gated_delta_net_module_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module

from qwen35_mcore.config.flops import gdn_layer_flops
from qwen35_mcore.model.spec_providers import get_spec_provider
from qwen35_mcore.model.specs import gated_delta_net_spec
from tests.bench.common import (
    BANDWIDTH,
    PEAK_TFLOPS,
    RATE_TFLOPS,
    arguments,
    cut_config,
    gpu_config,
    median_ms,
    peak_gib,
    profile,
    report,
    start,
)

FLASH_QLA = "-flash-qla"
NAMES = ("native", "ours", "native" + FLASH_QLA, "ours" + FLASH_QLA)


def build_native(config: Any) -> torch.nn.Module:
    spec = get_gated_delta_net_module_spec(config, mcore_backend("transformer_engine"))
    return _build(spec, config)


def build_ours(config: Any) -> torch.nn.Module:
    return _build(gated_delta_net_spec(get_spec_provider(config)), config)


def _build(spec: Any, config: Any) -> torch.nn.Module:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return build_module(spec, config=config, layer_number=1, pg_collection=groups).cuda()


@torch.no_grad()
def copy_weights(native: Any, ours: Any) -> None:
    """Ours from native: the same numbers, as far as bf16 A_log and dt_bias hold them."""
    theirs = dict(native.named_parameters())
    for name, parameter in ours.named_parameters():
        if name == "gated_norm.weight":
            parameter.copy_(theirs["out_norm.weight"].float() + 1)
        else:
            parameter.copy_(theirs[name])


def make_step(module: Any, x: torch.Tensor, grad: torch.Tensor) -> Any:
    def step() -> tuple[torch.Tensor, torch.Tensor]:
        x.grad = None
        for p in module.parameters():
            p.grad = None
        out, _ = module(x, attention_mask=None)
        out.backward(grad)
        return out, x.grad

    return step


def floor_ms(model_config: Any, tokens: int) -> float:
    operations = 3 * gdn_layer_flops(model_config, tokens) / (RATE_TFLOPS * 1e9)
    channels = (
        2 * model_config.hidden_size
        + 2 * model_config.gdn_shape.conv_width
        + 3 * model_config.gdn_shape.value_width
    )
    return max(operations, 3 * 2 * tokens * channels / BANDWIDTH * 1e3)


def bench(flavor: str, length: int, batch: int, args: Any) -> None:
    model_config = cut_config(flavor, 1)
    config = gpu_config(model_config)
    native = build_native(config)
    torch.manual_seed(0)
    x = torch.randn(length, batch, model_config.hidden_size, device="cuda", dtype=torch.bfloat16)
    x.requires_grad_()
    grad = torch.randn_like(x)
    tokens, floor = length * batch, floor_ms(model_config, length * batch)
    model_flops = 3 * gdn_layer_flops(model_config, tokens)
    results, times, kernels = {}, {}, {}
    for name in args.which:
        # Read by FLA at every call, by us when a layer is built.
        os.environ["FLA_FLASH_QLA"] = "1" if name.endswith(FLASH_QLA) else "0"
        module = native
        if name.startswith("ours"):
            module = build_ours(config)
            copy_weights(native, module)
            kernels[name] = module.kernels.reason
            if name.endswith(FLASH_QLA) and module.kernels.gates_in_kernel:
                sys.exit(f"FlashQLA cannot run here: {module.kernels.reason}")
        step = make_step(module, x, grad)
        results[name] = [t.detach().clone() for t in step()]
        timing = median_ms(step)
        times[name] = timing["ms"]
        row = {
            "what": "gdn",
            "which": name,
            "flavor": flavor,
            "length": length,
            "batch": batch,
            **timing,
            "tflops": model_flops / timing["ms"] / 1e9,
            "mfu": model_flops / timing["ms"] / 1e9 / PEAK_TFLOPS["bf16"],
            "tokens_per_s": tokens / timing["ms"] * 1e3,
            "peak_gib": peak_gib(step),
            "floor_ms": floor,
        }
        if args.profile:
            row |= profile(step)
        report(row, args.json)
    for name, other in product(kernels, times.keys() - kernels.keys()):
        report(
            {
                "what": "gdn ratio",
                "which": name,
                "over": other,
                "flavor": flavor,
                "length": length,
                "batch": batch,
                "native_over_ours": times[other] / times[name],
                "kernel": kernels[name],
                "output_difference": _relative(results[name][0], results[other][0]),
                "gradient_difference": _relative(results[name][1], results[other][1]),
            },
            args.json,
        )


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--case",
        action="append",
        required=True,
        metavar="FLAVOR,LENGTH,BATCH",
        help="May be given several times.",
    )
    parser.add_argument(
        "--which",
        nargs="+",
        default=["native", "ours"],
        choices=NAMES,
        help="FlashQLA compiles for minutes the first time it meets a number of heads.",
    )
    args = parser.parse_args()
    start()
    for case in args.case:
        flavor, length, batch = case.split(",")
        bench(flavor, int(length), int(batch), args)


if __name__ == "__main__":
    main()
