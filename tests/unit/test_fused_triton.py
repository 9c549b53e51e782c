"""The fused kernels around the delta rule, in Triton's interpreter, against the reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.kinds import kinds

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys, torch
import torch.nn.functional as F
from qwen35_mcore.kernels import reference
from qwen35_mcore.kernels.fused_triton import epilogue, prologue
from qwen35_mcore.config.shapes import GdnShape

def in_memory(x, order):
    if order == "slice":  # of a wider tensor, whose other columns must not be touched
        return F.pad(x, (5, 3), value=float("nan"))[..., 5:-3]
    if order == "batch first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if order == "strided":
        return x.transpose(0, 2).contiguous().transpose(0, 2)
    return x

length, batch, key, value, packed, order = json.loads(sys.argv[1])
torch.manual_seed(0)
d, eps = 16, 1e-6
shape = GdnShape(key_heads=key, value_heads=value, key_head_dim=d, value_head_dim=d)
conv = (2 * key + value) * d
cu = torch.tensor([0, 3, 4, length]) if packed else None
x = torch.randn(length, batch, conv + value * d + 2 * value, dtype=torch.float32)
w, scale = torch.randn(conv, 4), torch.randn(d)

def slow(x, w, scale):
    qkv, z, b, a = x.transpose(0, 1).split((conv, value * d, value, value), dim=-1)
    qkv = reference.causal_conv1d(qkv, w, cu_seqlens=cu)
    q, k, v = (t.unflatten(-1, (-1, d)) for t in qkv.split((key * d, key * d, value * d), dim=-1))
    y = reference.gated_rms_norm(v * 3, z.unflatten(-1, (-1, d)), scale, eps)
    return reference.l2norm(q), reference.l2norm(k), v, b, a, y.flatten(2).transpose(0, 1)

def fast(x, w, scale):
    q, k, v, z, b, a = prologue(in_memory(x, order), w, shape, cu, eps)
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
for name, exact, got in zip(names, *results):
    error = ((got - exact).norm() / exact.norm()).item()
    assert error < 3e-6, (name, error)
print("equal")
"""


CASES = {
    "whole, batch": (40, 2, 1, 2, 0, "whole"),
    "whole": (33, 1, 2, 2, 0, "whole"),
    "packed": (70, 1, 1, 4, 1, "whole"),
    "short": (2, 3, 1, 1, 0, "whole"),
    "packed, whole blocks": (64, 1, 1, 3, 1, "whole"),
    "slice": (21, 2, 1, 2, 0, "slice"),
    "batch first": (21, 2, 1, 2, 0, "batch first"),
    "strided": (21, 2, 1, 2, 0, "strided"),
    "packed, slice": (140, 1, 1, 1, 1, "slice"),
}
"""Length, batch, key and value heads, whether packed, order in memory."""


@pytest.mark.parametrize("case", kinds(CASES, ("whole", "packed, slice", "strided")))
def test_outputs_and_gradients(case: str) -> None:
    """Lengths that are no multiple of a block, or more than one; packed boundaries inside the
    convolution's reach; a projection that is not dense in memory."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(CASES[case])],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
