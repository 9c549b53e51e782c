"""What only several GPUs can show of the exchange of experts' tokens, and of the loss over them.

    torchrun --nproc-per-node 2 -m tests.bench.bench_exchange
    torchrun --nproc-per-node 2 -m tests.bench.bench_exchange --dtype float32

Each rank is a GPU of one host. NCCL EP against the formula of a layer whose experts scale their
rows, forward and backward, at even and uneven routing, with NaN in every unused row; a rank that is
sent more than its buffer holds; CUDA graphs replayed with other routing; how a token's rows are
rounded; times. Transformer Engine's cross entropy over a vocabulary that the ranks share, against
float64. Every result is printed as it comes.

Exit status: 0 all is right, 1 something is not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from qwen35_mcore.mcore import nccl_ep
from qwen35_mcore.mcore.nccl_ep import ExchangeSize, NcclEp
from qwen35_mcore.model.layers.fixed_capacity import _Combine, _Dispatch

TOKENS, TOP_K, EXPERTS, HIDDEN = 4096, 8, 256, 2048
ROUNDING = {torch.bfloat16: 6e-3, torch.float32: 1e-6}
"""Of sums of eight rows, relative by norm."""


class Checks:
    """Prints what was found, on rank 0, and whether any rank found it wrong."""

    def __init__(self) -> None:
        self.failed = False

    def add(self, name: str, right: bool, text: str = "") -> None:
        wrong = torch.tensor([not right], dtype=torch.int, device="cuda")
        dist.all_reduce(wrong)
        self.failed |= bool(wrong.item())
        if dist.get_rank() == 0:
            print(f"{'FAIL' if wrong.item() else 'ok':4s} {name:58s} {text}", flush=True)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def median_ms(work: Callable[[], Any], repeats: int = 20, inside: int = 8) -> float:
    """Of one of ``inside`` calls in a CUDA graph, so that no launch counts."""
    graph = captured(lambda: [work() for _ in range(inside)])[0]
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / inside)
    return statistics.median(times)


def captured(work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of ``work``, and what it returned when it was captured."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
        torch.cuda.synchronize()
        dist.barrier()
        with torch.cuda.graph(graph, stream=stream):
            return graph, work()


def choices(kind: str, generator: torch.Generator) -> Tensor:
    """Experts ``[tokens, top_k]`` of every token."""
    scores = torch.rand(TOKENS, EXPERTS, device="cuda", generator=generator)
    if kind == "uneven":  # none for one expert, a tenth of all rows for another
        scores[:, 0] = -1.0
        scores[: int(0.1 * TOP_K * TOKENS), EXPERTS - 1] = 2.0
    if kind == "one rank":
        scores[:, EXPERTS // dist.get_world_size() :] -= 2.0
    return scores.topk(TOP_K, dim=1).indices


def layer(exchange: NcclEp, x: Tensor, probs: Tensor, experts: Tensor) -> tuple[Tensor, Any]:
    """Dispatch, experts that multiply a row by their number plus one and its probability, combine;
    NaN in what is unused, in both directions. Nothing waits for the host."""
    handle = exchange.handle()
    rows, row_probs = _Dispatch.apply(x, probs, experts, exchange, handle)
    ends = handle.tokens_per_expert.cumsum(0)
    place = torch.arange(rows.shape[0], device="cuda")
    first = dist.get_rank() * exchange.size.local_experts
    number = torch.searchsorted(ends, place, right=True) + first + 1
    used = (place < ends[-1])[:, None]
    nan = torch.full_like(rows, torch.nan)
    if rows.requires_grad:
        rows.register_hook(lambda g: torch.where(used, g, nan))
        row_probs.register_hook(lambda g: torch.where(used[:, 0], g, torch.nan))
    scaled = (rows.float() * (number * row_probs)[:, None]).to(rows.dtype)
    return _Combine.apply(torch.where(used, scaled, nan), exchange, handle, x.shape[0]), handle


def expected(x: Tensor, probs: Tensor, experts: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Output, and gradients of x and of the probabilities, in float64."""
    x, probs, dy, scale = x.double(), probs.double(), dy.double(), (experts + 1).double()
    weight = (scale * probs).sum(1, keepdim=True)
    return x * weight, dy * weight, scale * (x * dy).sum(1, keepdim=True)


def compare(checks: Checks, name: str, found: tuple[Any, ...], exact: tuple[Tensor, ...]) -> None:
    for what, a, b in zip(("y", "dx", "dprobs"), found, exact, strict=True):
        error = relative(a.detach(), b)
        checks.add(f"{name}: {what}", error <= ROUNDING[found[0].dtype], f"{error:.1e}")


def check_rounding(
    checks: Checks, name: str, y: Tensor, x: Tensor, probs: Tensor, experts: Tensor
) -> None:
    """The sum of a token's rows is rounded on each rank that has some, then over the ranks: bit for
    bit what comes back, but for the order of sums. Printed beside one rounding of the whole."""
    rows = (x.float()[:, None] * ((experts + 1) * probs)[:, :, None]).to(x.dtype).float()
    rank_of = experts // (EXPERTS // dist.get_world_size())
    of_ranks = [
        (rows * (rank_of == rank)[:, :, None]).sum(1).to(x.dtype).float()
        for rank in range(dist.get_world_size())
    ]
    twice = torch.stack(of_ranks).sum(0).to(x.dtype)
    once = rows.sum(1).to(x.dtype)
    equal = [float((y == each).float().mean()) for each in (twice, once)]
    text = f"{equal[0]:.2%} equal; with one rounding {equal[1]:.2%}"
    checks.add(f"{name}: y rounded on each rank, then over ranks", equal[0] > 0.99, text)


def check_exchange(checks: Checks, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(7 + dist.get_rank())
    size = ExchangeSize(EXPERTS, dist.get_world_size(), TOP_K, HIDDEN, TOKENS, 1.5, dtype)
    exchange = NcclEp(dist.group.WORLD, size)
    x, dy = (
        torch.randn(TOKENS, HIDDEN, device="cuda", generator=generator).to(dtype) for _ in range(2)
    )
    probs = torch.rand(TOKENS, TOP_K, device="cuda", generator=generator)
    for kind in ("even", "uneven", "one rank", "even"):
        experts = choices(kind, generator)
        inputs = x.clone().requires_grad_(), probs.clone().requires_grad_()
        y, handle = layer(exchange, *inputs, experts)
        y.backward(dy)
        sent = int(handle.total_recv_tokens)
        counts = torch.bincount(experts.flatten(), minlength=EXPERTS)
        dist.all_reduce(counts)
        mine = counts.view(dist.get_world_size(), -1)[dist.get_rank()]
        checks.add(f"{kind}: rows that were sent here", sent == int(mine.sum()), f"{sent:,}")
        if kind == "one rank":
            held = int(handle.tokens_per_expert.sum())
            over = dist.get_rank() != 0 or sent > size.capacity
            checks.add(
                "one rank: more than fit, without a crash",
                over and held <= size.capacity,
                f"{sent:,} sent, {held:,} of {size.capacity:,} held",
            )
            continue
        right = torch.equal(handle.tokens_per_expert.long(), mine)
        checks.add(f"{kind}: rows of each expert", right, f"{int(mine.min())} to {int(mine.max())}")
        found = (y, inputs[0].grad, inputs[1].grad)
        compare(checks, kind, found, expected(x, probs, experts, dy))
        if dtype == torch.bfloat16:
            check_rounding(checks, kind, y.detach(), x, probs, experts)
    check_graph(checks, exchange, generator, x, dy, probs)
    times(checks, exchange, x, dy, probs, choices("even", generator))


def check_graph(
    checks: Checks,
    exchange: NcclEp,
    generator: torch.Generator,
    x: Tensor,
    dy: Tensor,
    probs: Tensor,
) -> None:
    """Forward and backward in one graph, replayed with other routing than it was captured with."""
    experts = choices("even", generator)
    inputs = x.clone().requires_grad_(), probs.clone().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        y, _ = layer(exchange, *inputs, experts)
        return (y, *torch.autograd.grad(y, inputs, dy))

    graph, found = captured(step)
    for kind in ("uneven", "even"):
        experts.copy_(choices(kind, generator))
        graph.replay()
        torch.cuda.synchronize()
        compare(checks, f"graph replayed, {kind}", found, expected(x, probs, experts, dy))


def times(
    checks: Checks, exchange: NcclEp, x: Tensor, dy: Tensor, probs: Tensor, experts: Tensor
) -> None:
    handle = exchange.handle()
    rows, row_probs = exchange.dispatch(handle, x, probs, experts)
    rows.nan_to_num_()
    pieces: dict[str, Callable[[], Any]] = {
        "dispatch with permutation": lambda: exchange.dispatch(handle, x, probs, experts),
        "combine": lambda: exchange.combine(handle, rows, TOKENS),
        "backward of combine": lambda: exchange.combine_backward(handle, dy),
        "backward of dispatch": lambda: exchange.dispatch_backward(handle, rows, row_probs, TOKENS),
    }
    for name, work in pieces.items():
        checks.add(f"time of {name}", True, f"{median_ms(work):.3f} ms")


def check_cross_entropy(checks: Checks) -> None:
    """Over all ranks; labels of other ranks' rows, and positions that do not count."""
    from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy

    ranks, rank, tokens, columns = dist.get_world_size(), dist.get_rank(), 512, 248320
    generator = torch.Generator("cuda").manual_seed(3)  # of all ranks alike
    logits = 4 * torch.randn(tokens, 1, columns, device="cuda", generator=generator)
    labels = torch.randint(columns, (tokens, 1), device="cuda", generator=generator)
    counted = torch.rand(tokens, 1, device="cuda", generator=generator) < 0.7
    own = slice(rank * columns // ranks, (rank + 1) * columns // ranks)
    for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        exact = logits.to(dtype).double().requires_grad_()
        rows = exact.flatten(0, 1)
        losses = F.cross_entropy(rows, labels.flatten(), reduction="none").view(-1, 1)
        (losses * counted).sum().backward()
        assert exact.grad is not None
        part = logits[..., own].to(dtype).contiguous().requires_grad_()
        found = te_parallel_cross_entropy(part, labels, dist.group.WORLD, False)
        (found * counted).sum().backward()
        assert part.grad is not None
        name = str(dtype).removeprefix("torch.")
        error = relative(found.detach(), losses.detach())
        checks.add(
            f"cross entropy over {ranks} ranks, {name}: losses", error <= 1e-6, f"{error:.1e}"
        )
        error = relative(part.grad, exact.grad[..., own])
        checks.add(f"cross entropy over {ranks} ranks, {name}: grad", error <= most, f"{error:.1e}")
        silent = not part.grad[~counted.expand(-1, 1).squeeze(1)].any()
        checks.add(f"cross entropy over {ranks} ranks, {name}: what does not count", silent)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    dtype = getattr(torch, parser.parse_args().dtype)
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", device_id=device)
    checks = Checks()
    check_cross_entropy(checks)
    against = nccl_ep.unavailable()
    checks.add("NCCL EP can be had", against is None, against or "")
    if against is None:
        check_exchange(checks, dtype)
    sys.stdout.flush()
    os._exit(checks.failed)  # NCCL EP's teardown would wait for ranks that have left


if __name__ == "__main__":
    main()
