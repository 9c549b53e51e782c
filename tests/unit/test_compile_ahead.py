"""Our Triton kernels compile for an H100 where there is no GPU, and what comes out can move."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, sys
from pathlib import Path
os.environ["TRITON_HOME"] = sys.argv[1]
from tests.bench.compile_ahead import prepare_to_move, pretend
counts = pretend()
import torch
from qwen35_mcore.kernels.fused_triton import epilogue, prologue
from qwen35_mcore.kernels import sigmoid_gate_triton, swiglu_triton
from qwen35_mcore.kernels.expert_gradient_triton import add_weight_gradient
from qwen35_mcore.config.shapes import GdnShape

length, batch = 256, 2
shape = GdnShape(key_heads=4, value_heads=8, key_head_dim=128, value_head_dim=128)
def empty(*shape):
    return torch.zeros(*shape, dtype=torch.bfloat16, requires_grad=True)
for cu_seqlens in (None, torch.tensor([0, 200, 256], dtype=torch.int32)):
    x = empty(length, 1 if cu_seqlens is not None else batch, shape.in_proj_width)
    q, k, v, z, b, a = prologue(x, empty(shape.conv_width, 4), shape, cu_seqlens)
    y = epilogue(v, z, empty(128), 1e-6)
    (q.sum() + k.sum() + y.sum() + a.sum() + b.sum()).backward()
ends = torch.tensor([100, 256], dtype=torch.int32)
swiglu_triton.weighted_swiglu(empty(256, 1024), torch.zeros(256), ends[-1:]).sum().backward()
sigmoid_gate_triton.sigmoid_gate(empty(256, 1, 2048), empty(256, 1, 1)).sum().backward()
add_weight_gradient(empty(256, 1024), empty(256, 2048), ends, torch.zeros(2, 1024, 2048))
print(*sorted(counts))
prepare_to_move(Path(sys.argv[1]) / ".triton" / "cache", "/home/there")
"""
KERNELS = {
    "_prologue_forward",
    "_before_silu",
    "_convolution_backward",
    "_epilogue_forward",
    "_epilogue_backward",
    "_swiglu_forward",
    "_swiglu_backward",
    "_gate_forward",
    "_gate_backward",
    "_add_products",
}


def test_kernels_compile_for_sm_90_and_note_the_paths_of_the_other_machine(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split()) == KERNELS
    cache = tmp_path / ".triton" / "cache"
    binaries = {path.stem for path in cache.glob("*/*.cubin")}
    assert binaries == KERNELS
    assert {path.suffix for path in cache.glob("*/*")} == {".cubin", ".json"}
    groups = list(cache.glob("*/__grp__*.json"))
    assert len(groups) >= len(KERNELS)
    for group in groups:
        for name, path in json.loads(group.read_text())["child_paths"].items():
            assert path == f"/home/there/.triton/cache/{group.parent.name}/{name}"
    targets = {
        json.loads(path.read_text())["arch"]
        for kernel in KERNELS
        for path in cache.glob(f"*/{kernel}.json")
    }
    assert targets == {"sm90"}
