"""Milliseconds and bytes by kind of layer, and peaks of whole training steps, for the planner.

    python -m tests.bench.bench_calibration --output qwen35_mcore/planner/calibration/h100-80g.json

Layers are timed alone, forward and backward, launched by the host and replayed as CUDA graphs, with
what autograd keeps between the two. Launches are what the host needs for a layer in a run. Runs are
training steps of cut models through megatron's schedule, DDP and distributed optimizer on one GPU;
their peaks are what the planner's memory model is compared with.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from qwen35_mcore.config.layer_pattern import LayerKind
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.kernels import main_gradient
from qwen35_mcore.mcore.patches import accumulating_products
from qwen35_mcore.model.build import build_model
from qwen35_mcore.model.spec_providers import get_spec_provider
from qwen35_mcore.model.specs import (
    feed_forward_modules,
    gated_attention_spec,
    gated_delta_net_spec,
    layer_spec,
    mixer_modules,
)
from tests.bench import graphs
from tests.bench.common import cut_config, gpu_config, median_ms, start
from tests.helpers.batches import Batch
from tests.helpers.toys import random_tokens
from tests.helpers.training import Layout, Result, forward_backward, wrap

FP8 = {"bf16": None, "fp8-tensorwise": "tensorwise", "fp8-blockwise": "blockwise"}
LAYERS = [
    # part, flavor, local experts, microbatch, precision, tokens of a sequence unless 4,096
    ("gdn", "35b-a3b", None, 4, "bf16"),
    ("gdn", "35b-a3b", None, 1, "bf16"),
    ("gdn", "35b-a3b", None, 1, "bf16", 32768),
    ("gdn", "122b-a10b", None, 1, "bf16"),
    ("gdn", "35b-a3b", None, 4, "fp8-tensorwise"),
    ("gdn", "35b-a3b", None, 1, "fp8-tensorwise"),
    ("attention", "35b-a3b", None, 4, "bf16"),
    ("attention", "35b-a3b", None, 1, "bf16"),
    ("attention", "35b-a3b", None, 1, "bf16", 32768),
    ("attention", "122b-a10b", None, 1, "bf16"),
    ("attention", "35b-a3b", None, 4, "fp8-tensorwise"),
    ("attention", "35b-a3b", None, 1, "fp8-tensorwise"),
    ("moe", "35b-a3b", 32, 4, "bf16"),
    ("moe", "35b-a3b", 32, 1, "bf16"),
    ("moe", "35b-a3b", 64, 1, "bf16"),
    ("moe", "35b-a3b", 128, 1, "bf16"),
    ("moe", "35b-a3b", 128, 4, "bf16"),
    ("moe", "35b-a3b", 256, 1, "bf16"),
    ("moe", "122b-a10b", 32, 1, "bf16"),
    ("moe", "35b-a3b", 32, 4, "fp8-tensorwise"),
    ("moe", "35b-a3b", 32, 1, "fp8-tensorwise"),
    ("mlp", "4b", None, 4, "bf16"),
    ("mlp", "27b", None, 1, "bf16"),
    ("output", "35b-a3b", None, 1, "bf16"),
]
LAUNCHES = [
    # part, flavor, local experts, precision
    (part, flavor, experts, precision)
    for precision in ("bf16", "fp8-tensorwise")
    for part, flavor, experts in (
        ("gdn", "35b-a3b", 32),
        ("moe", "35b-a3b", 32),
        ("attention", "35b-a3b", 32),
        ("mlp", "4b", None),
    )
]
STACKED, SHORT = 4, 256
"""Layers whose launches are timed together, and tokens that leave the GPU waiting for them."""
RUNS = [
    # flavor, layers, experts, microbatch, microbatches, recompute, precision
    ("35b-a3b", 4, 64, 1, 2, "none", "bf16"),
    ("35b-a3b", 12, 32, 1, 2, "none", "bf16"),
    ("35b-a3b", 12, 32, 1, 2, "full", "bf16"),
    ("4b", 8, None, 1, 2, "none", "bf16"),
    ("122b-a10b", 4, 16, 1, 2, "none", "bf16"),
    ("4b", 8, None, 1, 2, "full", "bf16"),
    ("35b-a3b", 4, 64, 1, 2, "none", "fp8-tensorwise"),
    ("35b-a3b", 4, 64, 1, 2, "selective", "bf16"),
]
CROSS_ENTROPY = "te"
"""What training takes on a GPU; the file of the H100 was measured with megatron's (native)."""
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {
        "recompute_granularity": "selective",
        "recompute_modules": ["moe_act", "gdn_norm_out"],
    },
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
LENGTH = 4096


def time_layer(
    part: str,
    flavor: str,
    experts: int | None,
    batch: int,
    precision: str,
    length: int = LENGTH,
) -> Any:
    """A row of the file's "layers"."""
    model_config = cut_config(flavor, 4, experts)
    config = _config(model_config, precision, cross_entropy_fusion_impl=CROSS_ENTROPY)
    forward, module = _part(part, model_config, config, batch, length)
    x = _hidden_states(model_config, batch, length)

    def run() -> torch.Tensor:
        x.grad = None
        for p in module.parameters():
            p.grad = None
        with get_fp8_context(config):
            return forward(x)

    with torch.no_grad():
        gradient = torch.randn_like(run())

    def both() -> None:
        run().backward(gradient)

    stream, _ = graphs.first_steps(both)
    with torch.cuda.stream(stream):
        x.grad = None
        for p in module.parameters():
            p.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = run()
        saved = torch.cuda.memory_allocated() - before
        del y
        eager = _milliseconds(run, both)
    graphed = _milliseconds(graphs.whole(run, stream), graphs.whole(both, stream))
    return {
        "part": part,
        "hidden": model_config.hidden_size,
        "flavor": flavor,
        "overrides": {} if experts is None else {"num_experts": experts},
        "local_experts": experts,
        "seq_length": length,
        "micro_batch_size": batch,
        "precision": precision,
        "cross_entropy": CROSS_ENTROPY,
        **eager,
        **{f"graphed_{name}": ms for name, ms in graphed.items()},
        "saved_bytes": saved,
    }


def _config(model_config: Qwen35Config, precision: str, **run: Any) -> Any:
    experts = "grouped_mm" if precision == "bf16" else "auto"
    balanced = {"moe_router_force_load_balancing": True, "moe_experts": experts}
    return gpu_config(model_config, FP8[precision], **balanced, **run)


def _hidden_states(model_config: Qwen35Config, batch: int, length: int) -> torch.Tensor:
    x = torch.randn(length, batch, model_config.hidden_size, device="cuda", dtype=torch.bfloat16)
    return x.requires_grad_()


def _milliseconds(forward: Callable[[], Any], both: Callable[[], Any]) -> dict[str, float]:
    forward_ms, both_ms = (median_ms(work, repeats=15)["ms"] for work in (forward, both))
    return {"forward_ms": forward_ms, "backward_ms": both_ms - forward_ms}


class _Stack(torch.nn.Module):
    """Layers one behind the other."""

    def __init__(self, layers: list[torch.nn.Module], rotary: torch.Tensor) -> None:
        super().__init__()
        self.layers, self.rotary = torch.nn.ModuleList(layers), rotary

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, attention_mask=None, rotary_pos_emb=self.rotary)[0]
        return x


def time_launches(part: str, flavor: str, experts: int | None, precision: str) -> Any:
    """A row of the file's "launches": of layers that have this part alone, with norm, residual
    addition and DDP, which the rows of "layers" lack."""
    model_config = cut_config(flavor, STACKED, experts)
    config = _config(model_config, precision, gradient_accumulation_fusion=True)
    accumulating_products.PATCH.apply()  # as a model's builder does
    spec_provider = get_spec_provider(config)
    if part in ("gdn", "attention"):
        kind = LayerKind.GDN if part == "gdn" else LayerKind.ATTENTION
        modules = mixer_modules(kind, spec_provider)
    else:
        modules = feed_forward_modules(config, spec_provider)
    spec = ModuleSpec(TransformerLayer, submodules=TransformerLayerSubmodules(**modules))
    layers = [build_module(spec, config=config, layer_number=n) for n in range(1, STACKED + 1)]
    stack = _Stack(layers, _rotary(model_config, SHORT)).cuda()
    wrapped, optimizer = wrap([stack], config, Layout(dtype=torch.bfloat16), 1e-4)
    x = _hidden_states(model_config, 1, SHORT)

    def run() -> torch.Tensor:
        with get_fp8_context(config):
            return wrapped[0](x)

    with torch.no_grad():
        gradient = torch.randn_like(run())
    launched = _milliseconds(run, lambda: run().backward(gradient))
    release(wrapped[0], optimizer)
    each = {name: ms / STACKED for name, ms in launched.items()}
    return {"part": part, "flavor": flavor, "precision": precision, **each}


def _rotary(model_config: Qwen35Config, length: int) -> torch.Tensor:
    share = model_config.rope_parameters.partial_rotary_factor
    base = model_config.rope_theta
    return RotaryEmbedding(model_config.head_dim, share, rotary_base=base)(length)


def _part(
    part: str, model_config: Qwen35Config, config: Any, batch: int, length: int
) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.nn.Module]:
    spec_provider = get_spec_provider(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if part in ("gdn", "attention"):
        spec = gated_delta_net_spec if part == "gdn" else gated_attention_spec
        module = build_module(
            spec(spec_provider), config=config, layer_number=1, pg_collection=groups
        ).cuda()
        rotary = _rotary(model_config, length)
        return lambda x: module(x, attention_mask=None, rotary_pos_emb=rotary)[0], module
    if part in ("moe", "mlp"):
        spec = layer_spec(model_config.layer_types[0], config, spec_provider)
        layer = build_module(spec, config=config, layer_number=1, pg_collection=groups).cuda()
        layer.self_attention = None
        if part == "mlp":
            return lambda x: layer.mlp(x)[0], layer
        return lambda x: layer.mlp(layer.pre_mlp_layernorm(x))[0], layer
    # the output layer and the loss, as GPTModel runs them on the last stage
    model = build_model(model_config, config, pre_process=False).cuda()
    labels = random_tokens(model_config, batch, length, seed=1)[:, :length].cuda()

    def loss(x: torch.Tensor) -> torch.Tensor:
        logits, _ = model.output_layer(x)
        return model.compute_language_model_loss(labels, logits)

    model.decoder = None
    return loss, model


def measure_run(
    flavor: str,
    layers: int,
    experts: int | None,
    batch: int,
    microbatches: int,
    recompute: str,
    precision: str,
) -> Any:
    """A row of the file's "runs": peak and median of eleven training steps, after three."""
    model_config = cut_config(flavor, layers, experts, mtp=True)
    config = gpu_config(
        model_config,
        FP8[precision],
        moe_router_force_load_balancing=True,
        gradient_accumulation_fusion=True,
        calculate_per_token_loss=True,
        cross_entropy_fusion_impl=CROSS_ENTROPY,
        **RECOMPUTE[recompute],
    )
    left_over = torch.cuda.memory_allocated()  # what autograd still holds of the run before
    layout = Layout(dtype=torch.bfloat16)
    wrapped, optimizer = wrap([build_model(model_config, config).cuda()], config, layout, 1e-4)
    tokens = random_tokens(model_config, batch * microbatches, LENGTH, seed=1).cuda()
    mask = torch.ones(tokens.shape[0], LENGTH, device="cuda")
    data, result = Batch(tokens, mask), Result()

    def step() -> None:
        wrapped[0].zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward(data, wrapped, config, batch, result, 1)
        optimizer.step()

    step()
    torch.cuda.synchronize()
    model_bytes = torch.cuda.memory_allocated() - left_over
    step()
    torch.cuda.reset_peak_memory_stats()
    timing = median_ms(step, repeats=11, warmup=1)
    peak_bytes = torch.cuda.max_memory_allocated() - left_over
    release(wrapped[0], optimizer)
    overrides = {"num_hidden_layers": layers}
    return {
        "flavor": flavor,
        "overrides": overrides | ({} if experts is None else {"num_experts": experts}),
        "seq_length": LENGTH,
        "micro_batch_size": batch,
        "global_batch_size": batch * microbatches,
        "recompute": recompute,
        "precision": precision,
        "cross_entropy": CROSS_ENTROPY,
        "peak_bytes": peak_bytes,
        "model_bytes": model_bytes,
        "step_ms": timing["ms"],
    }


def release(model: Any, optimizer: Any) -> None:
    """Free what a run holds: hooks inside autograd keep DDP, and so all of it, out of the garbage
    collector's sight. The placeholders of gradients go, too, which the next run would find."""
    from transformer_engine.pytorch.module import base

    main_gradient._placeholder.cache_clear()
    base._dummy_wgrads.clear()
    tensors = []
    for buffer in model.buffers + model.expert_parallel_buffers:
        tensors += [buffer.param_data, buffer.grad_data]
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            tensors += group["params"]
        for state in part.optimizer.state.values():
            tensors += [value for value in state.values() if torch.is_tensor(value)]
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("torch", "triton", "transformer-engine", "fla-core", "tilelang", "megatron-core"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="The calibration file to write.")
    parser.add_argument("--gpu", default="h100-80g", help="The planner's name of this GPU.")
    parser.add_argument(
        "--append", action="store_true", help="Keep the rows of an existing file of the same card."
    )
    parser.add_argument(
        "--match", default="", help="Only cases whose description matches this regular expression."
    )
    args = parser.parse_args()
    start(graphs=True)
    content: dict[str, Any] = {
        "schema": 1,
        "gpu": args.gpu,
        "card": torch.cuda.get_device_name(),
        "versions": _versions(),
        "layers": [],
        "launches": [],
        "runs": [],
    }
    if args.append and args.output.exists():
        old = json.loads(args.output.read_text())
        if old["card"] != content["card"]:
            sys.exit(f"{args.output} holds rows of {old['card']}, this is {content['card']}")
        content = old
    failed = False
    for kind, cases, measure in (
        ("layers", LAYERS, time_layer),
        ("launches", LAUNCHES, time_launches),
        ("runs", RUNS, measure_run),
    ):
        for case in cases:
            if not re.search(args.match, " ".join(map(str, (kind, *case)))):
                continue
            gc.collect()
            torch.cuda.empty_cache()
            print(f"before: {torch.cuda.memory_allocated() / 2**30:.2f} GiB", flush=True)
            try:
                row = measure(*case)
            except Exception:  # one row that does not fit must not cost the others
                failed = True
                print(kind, *case, "FAILED", flush=True)
                traceback.print_exc(limit=-5, file=sys.stdout)
                continue
            content.setdefault(kind, []).append(row)
            print(kind, *case, *(f"{k}={v}" for k, v in row.items() if k[-2:] in ("ms", "es")))
            partial = args.output.with_suffix(".partial")
            partial.write_text(json.dumps(content, indent=1) + "\n")
            partial.replace(args.output)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
