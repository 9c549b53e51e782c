"""Decoder layers against megatron-core's own spec: forward and backward, one process, one card.

    python -m tests.bench.bench_stack --case 35b-a3b,4,32,4096,4 --json out.jsonl

A case is FLAVOR,LAYERS,EXPERTS,LENGTH,BATCH. EXPERTS are the local ones: 32 is one rank of EP8 at
35b widths. Routing is forced to balance, so that both sides do the same work.

Floor: model operations at 790 TFLOP/s of matrix work.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.transformer.transformer_block import TransformerBlock

from qwen35_mcore.config.flops import forward_flops
from qwen35_mcore.model.spec_providers import get_spec_provider
from qwen35_mcore.model.specs import decoder_block_spec
from tests.bench import graphs
from tests.bench.common import (
    FP8_RECIPES,
    PEAK_TFLOPS,
    RATE_TFLOPS,
    arguments,
    cut_config,
    gpu_config,
    median_ms,
    profile,
    report,
    start,
)


def build(which: str, model_config: Any, config: Any) -> torch.nn.Module:
    if which == "native":
        spec = get_transformer_block_with_experimental_attention_variant_spec(config)
    else:
        spec = decoder_block_spec(model_config, config, get_spec_provider(config))
    return TransformerBlock(config=config, spec=spec, pre_process=True, post_process=True).cuda()


def gdn_kernel(block: Any) -> str | None:
    """What computes the delta rule of our first layer, and why; None for the native one."""
    kernel = getattr(block.layers[0].self_attention, "kernel", None)
    return None if kernel is None else kernel.reason


def layer_flops(model_config: Any, tokens: int, length: int) -> int:
    """Model operations of forward and backward, without embedding and output layer."""
    flops = forward_flops(model_config, tokens, seq_length=length)
    return 3 * (flops.gdn + flops.attention + flops.feed_forward)


def make_step(block: Any, x: torch.Tensor, rotary: torch.Tensor, grad: torch.Tensor) -> Any:
    def step() -> torch.Tensor:
        x.grad = None
        for p in block.parameters():
            p.grad = None
        out = block(x, attention_mask=None, rotary_pos_emb=rotary)
        out.backward(grad)
        return out

    return step


def bench(case: str, which: str, fp8: str | None, args: Any) -> float:
    flavor, layers, experts, length, batch = case.split(",")
    length, batch = int(length), int(batch)
    model_config = cut_config(flavor, int(layers), int(experts))
    run = graphs.PARTS if args.graph == "parts" else {}
    config = gpu_config(
        model_config, fp8, moe_router_force_load_balancing=True, moe_experts=args.experts, **run
    )
    torch.manual_seed(0)
    block = build(which, model_config, config)
    x = torch.randn(length, batch, model_config.hidden_size, device="cuda", dtype=torch.bfloat16)
    x.requires_grad_()
    rotary = RotaryEmbedding(
        model_config.head_dim,
        model_config.rope_parameters.partial_rotary_factor,
        rotary_base=model_config.rope_theta,
    )
    step = make_step(block, x, rotary(length), torch.randn_like(x))
    stream, peak = graphs.first_steps(step)
    if args.graph == "whole":
        step = graphs.whole(step, stream)
    elif args.graph == "parts":
        graphs.parts(block, rotary, length, batch)
    timing = median_ms(step, repeats=args.repeats)
    tokens, flops = length * batch, layer_flops(model_config, length * batch, length)
    tflops = flops / timing["ms"] / 1e9
    row = {
        "what": "stack",
        "which": which,
        "case": case,
        "precision": fp8 or "bf16",
        "experts": args.experts,
        "graph": args.graph,
        "kernel": gdn_kernel(block),
        **timing,
        "tflops": tflops,
        "mfu": tflops / PEAK_TFLOPS["fp8" if fp8 else "bf16"],
        "tokens_per_s": tokens / timing["ms"] * 1e3,
        "floor_ms": flops / RATE_TFLOPS / 1e9,
        "peak_gib": peak,  # of an eager step
        "reserved_gib": torch.cuda.memory_reserved() / 2**30,  # with what graphs hold
    }
    if args.profile:
        row |= profile(step)
    report(row, args.json)
    del block, step
    torch.cuda.empty_cache()
    return timing["ms"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--case", action="append", required=True)
    parser.add_argument("--which", nargs="+", default=["native", "ours"])
    parser.add_argument("--fp8", nargs="*", default=[], choices=FP8_RECIPES)
    parser.add_argument("--experts", default="auto", choices=("auto", "grouped_mm", "te"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--graph",
        choices=("none", "parts", "whole"),
        default="none",
        help="CUDA graphs of attention, GDN and router (Megatron's own), or of the whole step.",
    )
    args = parser.parse_args()
    start(graphs=args.graph != "none")
    for case in args.case:
        for fp8 in [None, *args.fp8]:
            times = {which: bench(case, which, fp8, args) for which in args.which}
            if len(times) == 2:
                ratio = times["native"] / times["ours"]
                report({"what": "stack ratio", "case": case, "native_over_ours": ratio}, args.json)


if __name__ == "__main__":
    main()
