"""On a GPU: experts behind a half-empty receive buffer, the shared expert's gate, gradients that
layers add, the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35_mcore.kernels.grouped_linear import grouped_linear
from qwen35_mcore.kernels.sigmoid_gate import sigmoid_gate
from qwen35_mcore.kernels.weighted_swiglu import weighted_swiglu
from qwen35_mcore.model.layers.vocabulary import add_rows
from tests.helpers.one_gpu import one_rank, relative

__all__ = ["one_rank"]  # a fixture
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_rank")]


COUNTS = {
    "uneven": (64, 0, 1, 447),
    "even": (128,) * 4,
    "one": (0, 0, 512, 0),
    "32 experts": (0, 3, 61, *(16,) * 28, 0),  # whose weight gradients one kernel of ours adds
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("fused", [False, True])
def test_experts_behind_a_half_empty_buffer(counts: tuple[int, ...], fused: bool) -> None:
    """Against float64 on the used rows alone; every unused one, and fresh memory, holds NaN."""
    used, rows, hidden, width = sum(counts), 1100, 256, 128
    generator = torch.Generator("cuda").manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    x, probs, dy = random(rows, hidden), random(rows).float().abs(), random(rows, hidden)
    experts = len(counts)
    w1, w2 = random(experts, 2 * width, hidden) / 16, random(experts, hidden, width) / 11
    ends = torch.tensor(counts, device="cuda").cumsum(0, dtype=torch.int32)

    def run(dtype: torch.dtype, take: int, poison: bool) -> list[Tensor]:
        inputs: list[Any] = [t[:take].to(dtype).clone() for t in (x, probs)]
        if dtype == torch.bfloat16:
            inputs[1] = probs[:take].clone()
        if poison:
            for t in inputs:
                t[used:] = torch.nan
        for t in inputs:
            t.requires_grad_()
        weights = [torch.nn.Parameter(w.to(dtype)) for w in (w1, w2)]
        if poison and fused:
            for w in weights:
                w.main_grad = torch.zeros_like(w, dtype=torch.float32)  # type: ignore[attr-defined]
        gate_up = grouped_linear(inputs[0], weights[0], ends, fuse_accumulation=fused)
        activated = weighted_swiglu(gate_up, inputs[1], ends[-1:])
        y = grouped_linear(activated, weights[1], ends, fuse_accumulation=fused)
        gradient = dy[:take].to(dtype).clone()
        if poison:
            gradient[used:] = torch.nan
        y.backward(gradient)
        name = "main_grad" if poison and fused else "grad"
        of_weights = [getattr(w, name) for w in weights]
        return [y[:used].detach(), *(t.grad[:used] for t in inputs), *of_weights]

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        found = run(torch.bfloat16, rows, poison=True)
    finally:
        torch.use_deterministic_algorithms(False)
    for got, exact in zip(found, run(torch.float64, used, poison=False), strict=True):
        assert got.isfinite().all()
        assert relative(got, exact) < 8e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4096, 1, 2048), (77, 3, 3000), (5, 1, 40), (0, 2, 64)], ids=str)
@pytest.mark.parametrize("order", ["whole", "batch first", "expanded"])
def test_gate_of_the_shared_expert(
    dtype: torch.dtype, shape: tuple[int, int, int], order: str
) -> None:
    """Against float64; the same to the last bit when it is run again, eagerly or as a graph."""
    generator = torch.Generator("cuda").manual_seed(5)

    def random(width: int) -> Tensor:
        t = torch.randn(*shape[:2], width, device="cuda", generator=generator).to(dtype)
        return t.transpose(0, 1).contiguous().transpose(0, 1) if order == "batch first" else t

    inputs = [random(shape[2]).requires_grad_(), random(1).requires_grad_()]
    dy = random(1).expand(shape) if order == "expanded" else random(shape[2])

    def run() -> list[Tensor]:
        y = sigmoid_gate(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    found = run()
    reference = [t.detach().double().requires_grad_() for t in inputs]
    y = reference[0] * reference[1].sigmoid()
    exact = [y.detach(), *torch.autograd.grad(y, reference, dy.double())]
    for got, wanted in zip(found, exact, strict=True):
        assert got.dtype == dtype
        assert got.shape == wanted.shape
        if wanted.numel():
            assert relative(got, wanted) < (5e-6 if dtype == torch.float32 else 4e-3)
    if not shape[0]:
        return
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    for got, again, replayed in zip(found, run(), captured, strict=True):
        assert torch.equal(got, again)
        assert torch.equal(got, replayed)


@pytest.mark.parametrize("main", [torch.float32, torch.bfloat16], ids=str)
def test_weight_gradient_of_one_kernel(main: torch.dtype) -> None:
    from qwen35_mcore.kernels.expert_gradient_triton import add_weight_gradient

    generator = torch.Generator("cuda").manual_seed(2)
    counts = (300, 0, 1, 700)
    dy, x = (
        torch.randn(1200, n, device="cuda", generator=generator).bfloat16() for n in (1024, 2048)
    )
    before = torch.randn(4, 1024, 2048, device="cuda", generator=generator).to(main)
    ends = torch.tensor(counts, device="cuda").cumsum(0, dtype=torch.int32)
    parts = zip(dy[:1001].double().split(counts), x[:1001].double().split(counts), strict=True)
    exact = before.double() + torch.stack([a.t() @ b for a, b in parts])
    dy[1001:], x[1001:] = torch.nan, torch.nan
    after = before.clone()
    add_weight_gradient(dy, x, ends, after)
    assert relative(after, exact) < (1e-6 if main == torch.float32 else 3e-3)


@pytest.mark.parametrize("main", [torch.float32, torch.bfloat16], ids=str)
def test_product_of_the_output_layer_is_added(main: torch.dtype) -> None:
    from qwen35_mcore.mcore.patches.accumulating_products import add_product

    generator = torch.Generator("cuda").manual_seed(3)
    x = torch.randn(512, 256, device="cuda", generator=generator).bfloat16()
    dy = torch.randn(512, 1024, device="cuda", generator=generator).bfloat16()
    sums = torch.randn(1024, 256, device="cuda", generator=generator).to(main)
    exact = sums.double() + dy.double().t() @ x.double()
    add_product(x, dy, sums)
    assert relative(sums, exact) < (1e-6 if main == torch.float32 else 3e-3)


@pytest.mark.parametrize("main", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_the_embedding_are_added(main: torch.dtype) -> None:
    """A third of the tokens are the same one. Captured, and replayed with other tokens: right, and
    the same bits every time."""
    generator = torch.Generator("cuda").manual_seed(5)
    tokens, vocabulary = 4096, 5000
    batches = torch.randint(vocabulary, (2, tokens), device="cuda", generator=generator)
    batches[0, : tokens // 3], batches[1, ::3] = 7, 4999
    rows = torch.randn(tokens, 256, device="cuda", generator=generator).bfloat16()
    before = torch.randn(vocabulary, 256, device="cuda", generator=generator).to(main)
    ids, sums, graph = batches[0].clone(), before.clone(), torch.cuda.CUDAGraph()
    add_rows(sums, ids, rows)
    with torch.cuda.graph(graph):
        add_rows(sums, ids, rows)
    for batch in batches:
        exact, found = before.double().index_add(0, batch, rows.double()), []
        for _ in range(3):
            ids.copy_(batch)
            sums.copy_(before)
            graph.replay()
            found.append(sums.clone())
        assert relative(found[0], exact) < (1e-6 if main == torch.float32 else 3e-3)
        assert torch.equal(found[1], found[0])
        assert torch.equal(found[2], found[0])


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_cross_entropy(dtype: torch.dtype, most: float) -> None:
    """The default on a GPU against float64, over the whole vocabulary; some positions do not count
    and get no gradient. Tensor parallel: tests/bench/bench_exchange.py."""
    from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy

    tokens, columns = 256, 248320
    generator = torch.Generator("cuda").manual_seed(4)
    logits = (4 * torch.randn(tokens, 1, columns, device="cuda", generator=generator)).to(dtype)
    labels = torch.randint(columns, (tokens, 1), device="cuda", generator=generator)
    counted = torch.rand(tokens, 1, device="cuda", generator=generator) < 0.7
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="none").view(-1, 1)
    (losses * counted).sum().backward()
    logits.requires_grad_()
    found = te_parallel_cross_entropy(logits, labels, torch.distributed.group.WORLD, False)
    (found * counted).sum().backward()
    assert logits.grad is not None
    assert exact.grad is not None
    assert found.dtype == torch.float32
    assert relative(found.detach(), losses.detach()) <= 1e-6
    assert relative(logits.grad, exact.grad) <= most
    assert not logits.grad[~counted.squeeze(1)].any()
