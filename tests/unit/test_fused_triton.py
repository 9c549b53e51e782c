"""The fused kernels around the delta rule, in Triton's interpreter, against the reference."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest

from tests.helpers.kinds import kinds

SCRIPT = """
import json, sys, torch
import torch.nn.functional as F
from qwen35_mcore.kernels import reference
from qwen35_mcore.kernels.fused_triton import epilogue, prologue
from qwen35_mcore.kernels.heads import Heads

def in_memory(x, order):
    if order == "slice":  # of a wider tensor, whose other columns must not be touched
        return F.pad(x, (5, 3), value=float("nan"))[..., 5:-3]
    if order == "batch first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if order == "strided":
        return x.transpose(0, 2).contiguous().transpose(0, 2)
    return x

def errors(length, batch, key, value, packed, order):
    torch.manual_seed(0)
    heads, d, eps = Heads(key, value, 16, 16), 16, 1e-6
    mixed = heads.mixed * d
    cu = torch.tensor([0, 3, 4, length]) if packed else None
    x = torch.randn(length, batch, mixed + value * d + 2 * value, dtype=torch.float32)
    w, scale = torch.randn(mixed, 4), torch.randn(d)

    def slow(x, w, scale):
        qkv, z, b, a = x.transpose(0, 1).split((mixed, value * d, value, value), dim=-1)
        qkv = reference.causal_conv1d(qkv, w, cu_seqlens=cu)
        parts = qkv.split((key * d, key * d, value * d), dim=-1)
        q, k, v = (t.unflatten(-1, (-1, d)) for t in parts)
        y = reference.gated_rms_norm(v * 3, z.unflatten(-1, (-1, d)), scale, eps)
        return reference.l2norm(q), reference.l2norm(k), v, b, a, y.flatten(2).transpose(0, 1)

    def fast(x, w, scale):
        q, k, v, z, b, a = prologue(in_memory(x, order), w, heads, cu, eps)
        if order == "strided":
            z = in_memory(z, order)
        return q, k, v, b, a, epilogue(v * 3, z, scale[None].expand(2, -1).t()[:, 0], eps)

    results = []
    for run, dtype in ((slow, torch.float64), (fast, torch.float32)):
        inputs = [t.to(dtype).requires_grad_() for t in (x, w, scale)]
        outputs = run(*inputs)
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(o.shape, generator=generator, dtype=torch.float32) for o in outputs]
        sum((o * g.to(dtype)).sum() for o, g in zip(outputs, weights)).backward()
        results.append([*outputs, *(t.grad for t in inputs)])
    names = "q k v b a y dx dw dscale".split()
    return {
        name: ((got - exact).norm() / exact.norm()).item()
        for name, exact, got in zip(names, *results)
    }

print(json.dumps([errors(*case) for case in json.loads(sys.argv[1])]))
"""
CASES = {
    "whole": (33, 1, 2, 2, 0, "whole"),
    "whole, batch": (40, 2, 1, 2, 0, "whole"),
    "shorter than the convolution": (2, 3, 1, 1, 0, "whole"),
    "packed": (70, 1, 1, 4, 1, "whole"),
    "packed, whole blocks": (64, 1, 1, 3, 1, "whole"),
    "packed, slice": (140, 1, 1, 1, 1, "slice"),
    "slice": (21, 2, 1, 2, 0, "slice"),
    "batch first": (21, 2, 1, 2, 0, "batch first"),
    "strided": (21, 2, 1, 2, 0, "strided"),
}
"""Length, batch, key and value heads, whether packed, order in memory: lengths that are no multiple
of a block, or more than one; packed boundaries inside the convolution's reach; a projection that is
not dense in memory."""
KINDS = ("whole", "packed, slice", "strided")


@functools.cache
def errors(*names: str) -> dict[str, dict[str, float]]:
    """Relative errors of every output and gradient, by case; the interpreter is a process's own."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([CASES[name] for name in names])],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(names, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", kinds(CASES, KINDS))
def test_outputs_and_gradients(case: str) -> None:
    together = KINDS if case in KINDS else CASES.keys() - KINDS
    found = errors(*sorted(together))[case]
    assert len(found) == 9
    assert all(error < 3e-6 for error in found.values()), found
