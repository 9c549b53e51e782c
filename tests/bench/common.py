"""What the GPU benchmarks share: one rank on one card, configs, weights, timing, output."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.model.transformer_config import Qwen35TransformerConfig, transformer_config
from tests.helpers.ports import free_port

PEAK_TFLOPS = {"bf16": 989.0, "fp8": 1979.0}  # H100/H200 SXM datasheet, dense
FP8_RECIPES = ("delayed", "tensorwise", "blockwise")


RATE_TFLOPS, BANDWIDTH = 790.0, 3.0e12  # what a large matrix product and a large copy reach


def start(*, graphs: bool = False) -> None:
    """Parallel state of a single rank, once. Ends the process with a message where no GPU is.

    Args:
        graphs: draw random numbers so that a CUDA graph may be captured.
    """
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    if torch.distributed.is_initialized():
        return
    from megatron.core import parallel_state, tensor_parallel

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    _fix_l2norm_configuration()
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1, te_rng_tracker=graphs)


def _fix_l2norm_configuration() -> None:
    """One launch configuration for FLA's l2 norm, which only the native module calls.

    FLA tunes it anew for every number of rows, a minute each time; it is 2 % of the native module.
    """
    from fla.modules.norm import l2norm

    for kernel in (l2norm.l2norm_fwd_kernel, l2norm.l2norm_bwd_kernel):
        kernel.configs = [c for c in kernel.configs if c.kwargs["BT"] == 32 and c.num_warps == 4]


def cut_config(
    flavor: str, layers: int, experts: int | None = None, *, mtp: bool = False
) -> Qwen35Config:
    """A flavor's widths with the first ``layers`` layers of its pattern and fewer experts."""
    config = get_flavor(flavor)
    return replace(
        config,
        num_hidden_layers=layers,
        layer_types=config.layer_types[:layers],
        num_experts=config.num_experts if experts is None else experts,
        mtp_num_hidden_layers=config.mtp_num_hidden_layers if mtp else 0,
    )


def gpu_config(
    model_config: Qwen35Config, fp8: str | None = None, **run: Any
) -> Qwen35TransformerConfig:
    """bf16 on Transformer Engine; ``fp8`` is a recipe of megatron's ``--fp8-recipe``."""
    settings = fast_settings() | {
        "params_dtype": torch.bfloat16,
        "pipeline_dtype": torch.bfloat16,
        "bf16": True,
        "moe_grouped_gemm": True,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "fp8": "hybrid" if fp8 else None,
    }
    if fp8:
        settings["fp8_recipe"] = fp8
    return transformer_config(model_config, **settings | run)


def fast_settings() -> dict[str, Any]:
    """Transformer Engine, and every fused kernel that a training run uses."""
    return {
        "transformer_impl": "transformer_engine",
        "moe_permute_fusion": True,
        "moe_router_fusion": True,
        "apply_rope_fusion": True,
        "bias_activation_fusion": True,
        "bias_dropout_fusion": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": True,
        "cross_entropy_loss_fusion": True,
        "cross_entropy_fusion_impl": "native",
        "attention_backend": attention_backend(),
    }


def attention_backend() -> Any:
    """cuDNN's fused attention, the only fast one here at head dimension 256."""
    from megatron.core.transformer.enums import AttnBackend

    return AttnBackend.fused


def median_ms(step: Callable[[], Any], repeats: int = 20, warmup: int = 5) -> dict[str, float]:
    """Milliseconds of ``step``: median, minimum, maximum; by CUDA events where there is a GPU."""
    if not torch.cuda.is_available():
        return _summary([_host_ms(step) for _ in range(warmup + repeats)][warmup:])
    for _ in range(warmup):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return _summary(times)


def _host_ms(step: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    step()
    return (time.perf_counter() - begin) * 1e3


def _summary(times: list[float]) -> dict[str, float]:
    return {"ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)}


def peak_gib(step: Callable[[], Any]) -> float:
    """Most memory in use during one ``step``."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def profile(step: Callable[[], Any]) -> dict[str, Any]:
    """Launches, host synchronisations and GPU time of one ``step``, and its longest kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    step()
    torch.cuda.synchronize()
    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    events = trace.key_averages()
    launches = sum(e.count for e in events if "LaunchKernel" in e.key)
    waits = sum(
        e.count
        for e in events
        if e.key in ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
    )
    spans = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in trace.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    )
    kernels = sorted(
        ((e.self_device_time_total / 1e3, e.count, e.key) for e in events if _is_kernel(e)),
        reverse=True,
    )
    return {
        "launches": launches,
        "host_waits": waits - 1,  # the one that ends the measurement
        "gpu_ms": sum(k[0] for k in kernels),
        "idle": idle_gaps(spans),
        "kernels": [(round(ms, 3), count, name[:90]) for ms, count, name in kernels[:25]],
    }


def idle_gaps(spans: list[tuple[float, float, str]], longest: int = 8) -> dict[str, Any]:
    """When no kernel ran, between the first and the last: milliseconds in all, and the longest.

    Args:
        spans: begin, end (microseconds) and name of every kernel and copy, sorted by begin.
    """
    gaps, reached = [], spans[0][1] if spans else 0.0
    for begin, end, name in spans[1:]:
        if begin > reached:
            gaps.append((begin - reached, name))
        reached = max(reached, end)
    gaps.sort(reverse=True)
    return {
        "ms": sum(g[0] for g in gaps) / 1e3,
        "span_ms": (reached - spans[0][0]) / 1e3 if spans else 0.0,
        "before": [(round(us / 1e3, 3), name[:60]) for us, name in gaps[:longest]],
    }


def _is_kernel(event: Any) -> bool:
    return event.device_type == torch.autograd.DeviceType.CUDA and event.self_device_time_total > 0


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="Append one JSON line per row to this file.")
    parser.add_argument("--profile", action="store_true", help="Also profile one step of each.")
    return parser


def report(row: dict[str, Any], path: Path | None) -> None:
    """Print a row at once, and append it to the JSON file."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    row = {"card": card, **row}
    shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
    kernels = shown.pop("kernels", [])
    print("  ".join(f"{k}={v}" for k, v in shown.items()), flush=True)
    for kernel in kernels:
        print("   ", *kernel, flush=True)
    if path:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
