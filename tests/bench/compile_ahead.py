"""Compile the GDN's Triton kernels for an H100 or H200 on a machine that has no GPU.

    python -m tests.bench.compile_ahead --folder ahead 16,32,4096 4,8,256
    python -m tests.bench.compile_ahead --folder ahead-cp --context-parallel 4,8,256

A shape is KEY HEADS,VALUE HEADS,LENGTH of one rank's layer: forward and backward, with every
configuration that FLA would tune, which is what takes minutes on a rented machine. FOLDER/.triton
then goes into the home folder there (--home, since Triton notes whole paths). Needs
flash-linear-attention and the same versions of it, of Triton and of this package on both machines.
The kernels that tilelang compiles (FlashQLA, and FLA's chunk_bwd_dqkwg on Hopper) are not among
them.

How: Triton is told of a driver that names an sm_90, launches become compilations, and tensors lie
on the CPU with nothing in them that matters.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qwen35_mcore.errors import ConfigError, Qwen35Error

HEAD_SIZE, TAPS, RANKS = 128, 4, 2
NAME, MULTIPROCESSORS, SHARED_MEMORY = "NVIDIA H100 80GB HBM3", 132, 232448


class Driver:
    """What Triton and FLA ask a driver: it stands for one H100."""

    def __init__(self) -> None:
        properties = {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": MULTIPROCESSORS}
        self.utils = types.SimpleNamespace(get_device_properties=lambda device: properties)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        def compiled(call: Any, quantiles: Any = None) -> list[float]:
            call()
            return [1.0, 1.0, 1.0]

        return compiled


def pretend() -> collections.Counter[str]:
    """Replace the driver, launches and torch.cuda in this process; kernels counted as compiled."""
    import triton
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(Driver())
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_name = lambda *_: NAME
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.device = lambda *_: contextlib.nullcontext()
    counts: collections.Counter[str] = collections.Counter()
    launch, tune = JITFunction.run, Autotuner.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool = False, **more: Any) -> Any:
        counts[self.__name__] += 1
        return launch(self, *args, grid=grid, warmup=True, **more)

    def compile_all(self: Any, *args: Any, **more: Any) -> Any:
        self.cache_results = False  # nothing was measured
        self.cache.clear()  # another rank's or shape's numbers can make another kernel of each
        return tune(self, *args, **more)

    JITFunction.run, Autotuner.run = compile_only, compile_all
    return counts


def replace_what_needs_a_gpu() -> None:
    """FLA's backward by tilelang, and its question whether a tensor's GPU is new enough."""
    from fla.ops.common.backends.tilelang import CommonTileLangBackend
    from fla.ops.cp import chunk_bwd, chunk_delta_h, chunk_fwd, chunk_merge

    def products(self: Any, q: Any, k: Any, v: Any, *_: Any, w: Any = None, **__: Any) -> Any:
        db = torch.zeros(*v.shape[:3])
        return torch.zeros_like(q), torch.zeros_like(k), None if w is None else w.clone(), db

    CommonTileLangBackend.is_available = classmethod(lambda cls: True)
    CommonTileLangBackend.chunk_bwd_dqkwg = products
    for module in (chunk_bwd, chunk_delta_h, chunk_fwd, chunk_merge):
        module._check_cp_device = lambda device: None


def run_layer(
    kernels: Any, key_heads: int, value_heads: int, length: int, group: Any = None
) -> None:
    """One forward and backward of everything between the GDN's projections."""
    from qwen35_mcore.config.shapes import GdnShape
    from qwen35_mcore.kernels.base import DeltaRuleInputs

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype).requires_grad_()

    shape = GdnShape(
        key_heads=key_heads,
        value_heads=value_heads,
        key_head_dim=HEAD_SIZE,
        value_head_dim=HEAD_SIZE,
    )
    context, device = None, torch.device("cpu")
    if group is not None:
        context = kernels.cp_context(length, group, TAPS, device)
        length //= group.size()
    x_sbc, weight_cw = empty(length, 1, shape.in_proj_width), empty(shape.conv_width, TAPS)
    q, k, v, z, b, a = kernels.prologue(x_sbc, weight_cw, shape, cp_context=context)
    log, bias = (empty(value_heads, dtype=torch.float32) for _ in range(2))
    normalized = context is None and kernels.normalizes(shape)
    out, _ = kernels.gated_delta_rule(
        DeltaRuleInputs(
            q_bshk=q,
            k_bshk=k,
            v_bshv=v,
            a_bsh=a,
            b_bsh=b,
            A_log=log,
            dt_bias=bias,
            qk_normalized=normalized,
            cp_context=context,
        )
    )
    kernels.epilogue(out, z, empty(HEAD_SIZE), 1e-6).float().sum().backward()


@contextlib.contextmanager
def pretended_group(rank: int) -> Iterator[Any]:
    """A process group of ``RANKS`` whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
    try:
        yield torch.distributed.group.WORLD
    finally:
        torch.distributed.destroy_process_group()


def prepare_to_move(cache: Path, home: str) -> None:
    """Drop what only shows how a kernel was compiled, and note the paths of the GPU machine."""
    for path in list(cache.glob("*/*")):
        if path.suffix not in (".cubin", ".json"):
            path.unlink()
    for path in cache.glob("*/__grp__*.json"):
        files = json.loads(path.read_text())["child_paths"]
        there = {name: f"{home}/.triton/cache/{path.parent.name}/{name}" for name in files}
        path.write_text(json.dumps({"child_paths": there}))


def shape(word: str) -> tuple[int, int, int]:
    """KEY HEADS,VALUE HEADS,LENGTH, for argparse."""
    key_heads, value_heads, length = map(int, word.split(","))
    return key_heads, value_heads, length


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="+", type=shape, metavar="KEY_HEADS,VALUE_HEADS,LENGTH")
    parser.add_argument("--folder", type=Path, required=True, help="New; holds .triton afterwards.")
    parser.add_argument("--home", default="/root", help="Home folder on the GPU machine.")
    parser.add_argument("--context-parallel", action="store_true", help="Two ranks pass states.")
    args = parser.parse_args()
    if args.folder.exists():  # files of a cache are dropped and changed in it
        raise ConfigError("--folder must be new", got=str(args.folder))
    os.environ["TRITON_HOME"] = str(args.folder.resolve())
    counts = pretend()
    from qwen35_mcore.kernels.fla_kernels import FlaKernels

    kernels = FlaKernels("compiled ahead")
    replace_what_needs_a_gpu()
    for wanted in args.shapes:
        started = time.monotonic()
        counts.clear()
        if args.context_parallel:
            for rank in range(RANKS):
                with pretended_group(rank) as group:
                    run_layer(kernels, *wanted, group=group)
        else:
            run_layer(kernels, *wanted)
        seconds = time.monotonic() - started
        print(f"{wanted}: {counts.total()} launches of {len(counts)} kernels, {seconds:.0f} s")
    prepare_to_move(args.folder / ".triton" / "cache", args.home)


if __name__ == "__main__":
    try:
        main()
    except Qwen35Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
