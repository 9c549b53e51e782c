"""The experts' kernels in Triton's interpreter, and the grouped linear layer's loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen35_mcore.kernels import expert_gradient_triton
from qwen35_mcore.kernels import grouped_linear as layer
from qwen35_mcore.kernels.grouped_linear import grouped_linear
from qwen35_mcore.kernels.sigmoid_gate import sigmoid_gate
from qwen35_mcore.kernels.weighted_swiglu import weighted_swiglu

ROOT = Path(__file__).parents[2]
INTERPRETER = """
import triton.runtime.interpreter as interpreter
patch = interpreter._patch_lang_tensor
def with_index(tensor, scope):  # NumPy 2.5 makes no number of an array of one, as a range needs
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
interpreter._patch_lang_tensor = with_index
"""

ACTIVATION = """
import json, sys, torch
from qwen35_mcore.kernels import swiglu_triton
from qwen35_mcore.kernels.weighted_swiglu import weighted_swiglu
rows, width, end = json.loads(sys.argv[1])
torch.manual_seed(0)
x, weight, dy = torch.randn(rows, 2 * width), torch.rand(rows), torch.randn(rows, width)
results = []
fused = swiglu_triton.weighted_swiglu
for run, dtype in ((weighted_swiglu, torch.float64), (fused, torch.float32)):
    a, w = (t.to(dtype).requires_grad_() for t in (x, weight))
    y = run(a, w, torch.tensor([end], dtype=torch.int32))
    y.backward(dy.to(dtype))
    results.append([t.detach()[:end] for t in (y, a.grad, w.grad)])
for exact, got in zip(*results):
    assert ((got - exact).norm() <= 1e-6 * exact.norm()).item(), (got - exact).norm()
print("equal")
"""

GRADIENT = """
import json, sys, torch
from qwen35_mcore.kernels.expert_gradient_triton import add_weight_gradient
counts, unused, out, width = json.loads(sys.argv[1])
torch.manual_seed(0)
used = sum(counts)
dy, x = torch.randn(used + unused, out), torch.randn(used + unused, width)
dy[used:], x[used:] = torch.nan, torch.nan
main = torch.randn(len(counts), out, width)
parts = zip(dy[:used].double().split(counts), x[:used].double().split(counts))
products = [a.t() @ b for a, b in parts]
exact = main.double() + torch.stack(products)
add_weight_gradient(dy, x, torch.tensor(counts).cumsum(0).int(), main)
assert (main - exact).norm() <= 1e-6 * exact.norm(), (main - exact).norm()
print("equal")
"""


GATE = """
import json, sys, torch
from qwen35_mcore.kernels import sigmoid_gate_triton
from qwen35_mcore.kernels.sigmoid_gate import sigmoid_gate
def in_memory(t, order):
    return t.transpose(0, 1).contiguous().transpose(0, 1) if order == "batch first" else t
def run(gate, dtype, order, x, logits, dy):
    x, logits = (in_memory(t.to(dtype), order).requires_grad_() for t in (x, logits))
    y = gate(x, logits)
    dy = dy[..., :1].expand_as(y) if order == "expanded" else dy
    y.backward(in_memory(dy.to(dtype), order))
    return y.detach(), x.grad, logits.grad
for length, batch, hidden, order in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    tensors = [torch.randn(length, batch, width) for width in (hidden, 1, hidden)]
    exact = run(sigmoid_gate, torch.float64, order, *tensors)
    got = run(sigmoid_gate_triton.sigmoid_gate, torch.float32, order, *tensors)
    for a, b in zip(got, exact):
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert ((a - b).norm() <= 1e-6 * b.norm()).item(), (order, (a - b).norm())
print("equal")
"""


def interpret(script: str, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETER + script, json.dumps(arguments)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


@pytest.mark.parametrize(("rows", "width", "end"), [(9, 512, 9), (13, 40, 6), (5, 700, 0)])
def test_activation(rows: int, width: int, end: int) -> None:
    """Of all rows, of some, and of none; widths that are no multiple of a block."""
    interpret(ACTIVATION, rows, width, end)


def test_gate_of_the_shared_expert() -> None:
    """Tokens and widths that are no multiple of a block; tensors that are not dense in memory."""
    cases = [(3, 3, 40, "batch first"), (1, 1, 1500, "whole"), (4, 2, 1024, "expanded")]
    interpret(GATE, *cases)


@pytest.mark.parametrize("tokens", [0, 5])
def test_gate_without_a_gpu(tokens: int) -> None:
    """The formula, in x's dtype, and every gradient by finite differences."""
    torch.manual_seed(0)
    x = torch.randn(tokens, 2, 6, dtype=torch.float64, requires_grad=True)
    logits = (3 * torch.randn(tokens, 2, 1, dtype=torch.float64)).requires_grad_()
    gated = sigmoid_gate(x, logits)
    assert torch.allclose(gated, x / (1 + (-logits).exp()), rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(sigmoid_gate, (x, logits))
    rounded = sigmoid_gate(x.bfloat16(), logits.bfloat16())
    exact = sigmoid_gate(x.bfloat16().double(), logits.bfloat16().double())
    assert rounded.dtype == torch.bfloat16
    assert torch.allclose(rounded.double(), exact, rtol=2**-8, atol=0)  # one rounding


@pytest.mark.parametrize(
    ("counts", "unused", "out", "width"),
    [([70, 0, 3, 130], 0, 128, 128), ([0, 5, 0], 7, 136, 200), ([0, 0], 4, 128, 128)],
)
def test_weight_gradient(counts: list[int], unused: int, out: int, width: int) -> None:
    """Experts without rows keep what they had, and no unused row is read."""
    interpret(GRADIENT, counts, unused, out, width)


@pytest.mark.parametrize("fused", [False, True])
def test_unused_rows_reach_nothing(fused: bool) -> None:
    """NaN in unused rows leaves outputs, weight gradients and gradients of used rows as they are
    without those rows."""
    torch.manual_seed(0)
    counts, width, hidden = torch.tensor([3, 0, 4]), 6, 8
    ends, used = counts.cumsum(0, dtype=torch.int32), 7
    x, probs, dy = torch.randn(used, hidden), torch.rand(used), torch.randn(used, hidden)
    weights = torch.randn(3, 2 * width, hidden), torch.randn(3, hidden, width)

    def run(unused: int) -> list[torch.Tensor]:
        def with_unused(t: torch.Tensor) -> torch.Tensor:
            return torch.cat([t, t.new_full((unused, *t.shape[1:]), torch.nan)])

        inputs = [with_unused(t).requires_grad_() for t in (x, probs)]
        w1, w2 = (torch.nn.Parameter(w.clone()) for w in weights)
        if fused:
            for w in (w1, w2):
                w.main_grad = torch.ones_like(w)  # type: ignore[attr-defined]
        gate_up = grouped_linear(inputs[0], w1, ends, fuse_accumulation=fused)
        activated = weighted_swiglu(gate_up, inputs[1], ends[-1:])
        y = grouped_linear(activated, w2, ends, fuse_accumulation=fused)
        y.backward(with_unused(dy))
        gradients = [getattr(w, "main_grad" if fused else "grad") for w in (w1, w2)]
        return [y[:used].detach(), *(t.grad[:used] for t in inputs), *gradients]  # type: ignore[index]

    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    try:
        for alone, among in zip(run(0), run(5), strict=True):
            assert alone.isfinite().all()
            assert torch.equal(alone, among)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("experts", "adds"), [(31, False), (32, True)])
def test_one_kernel_adds_the_gradients_of_many_experts(
    experts: int, adds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few, grouped_mm and an addition; both to the same sum."""
    added = []

    def kernel(dy: torch.Tensor, x: torch.Tensor, ends: torch.Tensor, main: torch.Tensor) -> None:
        added.append(len(main))
        main += layer._weight_gradient(dy, x, ends)

    monkeypatch.setattr(layer, "runs_as_one_kernel", lambda x: True)
    monkeypatch.setattr(expert_gradient_triton, "add_weight_gradient", kernel)
    torch.manual_seed(0)
    x = torch.randn(experts, 16).bfloat16().requires_grad_()
    weight = torch.nn.Parameter(torch.randn(experts, 8, 16).bfloat16())
    weight.main_grad = torch.ones(experts, 8, 16)  # type: ignore[attr-defined]
    ends = torch.arange(1, experts + 1, dtype=torch.int32)
    grouped_linear(x, weight, ends, fuse_accumulation=True).sum().backward()
    assert added == [experts] * adds
    expected = 1 + x.detach().float()[:, None, :].expand(-1, 8, -1)
    assert torch.allclose(weight.main_grad, expected, rtol=1e-2)  # type: ignore[attr-defined]


def test_no_rows_at_all() -> None:
    weight = torch.nn.Parameter(torch.randn(2, 4, 3))
    x = torch.zeros(0, 3, requires_grad=True)
    grouped_linear(x, weight, torch.zeros(2, dtype=torch.int32)).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
