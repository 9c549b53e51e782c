"""The whole model with NCCL EP beside the same model with all-to-all, on the GPUs of one host.

    python -m tests.bench.compare_exchange --gpus 2
    python -m tests.bench.compare_exchange --cpu

Same weights, tokens and routing: one expert gets nothing, one a tenth of all tokens, and no choice
is near a tie, so that no rounding changes one. In float32 both must agree. In bfloat16
each is compared with all-to-all in float32, and NCCL EP may be no further from it, in the losses of
single tokens, in the gradient as a whole and in that of each parameter. Then one graph of forward
and backward, captured with NCCL EP, is replayed with other tokens and other routing, beside the
same step without a graph.

--cpu: two processes, float32, and a stand-in for NCCL EP over gloo; no graph.

Exit status: 0 all is right, 1 something is not.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.model.layers.router import Router
from tests.bench.multi_gpu.parallel_cases import LOCAL, LOCAL_ON_CPU, REAL_HEADS, precisions
from tests.helpers.distributed import WorkerPool
from tests.helpers.equivalence import Case, Run, batches, initial_weights, largest, run_case
from tests.helpers.gloo_exchange import train_over_gloo
from tests.helpers.training import Layout, build_chunks, config_for, initialize, load_global, train

NCCL_EP = {
    "moe_token_dispatcher_type": "flex",
    "moe_flex_dispatcher_backend": "ncclep",
    "moe_expert_rank_capacity_factor": 4.0,
}
ROUNDING = 2e-5
"""Of two float32 runs: a token's loss, absolute, and a gradient, relative by norm."""
FURTHER = 1.5
"""How much further from float32 NCCL EP may be than all-to-all, in bfloat16."""
EAGER_STEPS = 4
"""With which another eager step is compared, to see what no graph has to do with."""
NOISE = 0.1
"""A gradient that all-to-all in bfloat16 has this wrong decides nothing by itself."""


def scores(tokens: int, experts: int, seed: int) -> Tensor:
    """What forced routing adds to the logits, ``[tokens, experts]``: a permutation of whole numbers
    for each token; the first expert gets nothing, and the last a tenth of all tokens."""
    generator = torch.Generator().manual_seed(seed)
    forced = torch.rand(tokens, experts, generator=generator).argsort(1).float()
    forced[:, 0] = -float(experts)
    forced[:, -1] = -float(experts)
    forced[: tokens // 10, -1] = float(experts)
    return forced


@contextlib.contextmanager
def routed_by(forced: dict[tuple[int, ...], Tensor]) -> Iterator[None]:
    """Let `forced` choose the experts, by shape, made when first asked for. A router's own logits
    count for a fiftieth of theirs: it has a gradient, and no say."""
    routing = Router.routing

    def routing_by_scores(self: Router, logits: Tensor, padding_mask: Any = None) -> Any:
        experts = logits.shape[-1]
        shape = (logits.numel() // experts, experts)
        if shape not in forced:
            forced[shape] = scores(*shape, seed=3).to(logits.device, logits.dtype)
        return routing(self, logits / 50 + forced[shape].view_as(logits), padding_mask)

    with mock.patch.object(Router, "routing", routing_by_scores):
        yield


def train_unevenly(**case: Any) -> Any:
    """`train`, its experts chosen by `scores`; with NCCL EP also in float32, which a run refuses
    because grouped_mm experts are bfloat16."""
    with routed_by({}), mock.patch("qwen35_mcore.training.checks.run.check_flex"):
        if torch.cuda.is_available():
            return train(**case)
        return train_over_gloo(**case)


@dataclass
class Report:
    failed: bool = False

    def add(self, name: str, right: bool, text: str) -> None:
        self.failed |= not right
        print(f"{'ok' if right else 'FAIL':4s} {name:52s} {text}", flush=True)


def token_error(a: Run, b: Run) -> Tensor:
    return (a.token_loss - b.token_loss).double()


def gradient_errors(a: Run, b: Run) -> dict[str, float]:
    return {
        key: float(
            (a.gradients[key] - value).detach().norm() / value.detach().norm().clamp(min=1e-12)
        )
        for key, value in b.gradients.items()
    }


def compare_float32(report: Report, ep: Run, alltoall: Run) -> None:
    worst = float(token_error(ep, alltoall).abs().max())
    report.add("float32: loss of a token", worst <= ROUNDING, f"{worst:.1e}")
    errors = gradient_errors(ep, alltoall)
    name = max(errors, key=lambda key: errors[key])
    report.add(
        "float32: gradient", largest(errors.values()) <= 5 * ROUNDING, f"{errors[name]:.1e} {name}"
    )


def compare_bf16(report: Report, ep: Run, alltoall: Run, exact: Run) -> None:
    """Distances from float32, and what the mean loss differs by beside what chance makes of the
    tokens' differences."""
    spread = [float(token_error(run, exact).square().mean().sqrt()) for run in (ep, alltoall)]
    report.add(
        "bf16: loss of a token, root mean square",
        spread[0] <= FURTHER * spread[1],
        f"NCCL EP {spread[0]:.2e}, all-to-all {spread[1]:.2e} from float32",
    )
    apart = token_error(ep, alltoall)
    mean, chance = float(apart.mean()), float(apart.std() / apart.numel() ** 0.5)
    report.add(
        "bf16: mean loss", abs(mean) <= 4 * chance, f"{mean:+.2e} apart, by chance {chance:.2e}"
    )
    total = [whole_error(run, exact) for run in (ep, alltoall)]
    report.add(
        "bf16: whole gradient",
        total[0] <= 1.1 * total[1],
        f"NCCL EP {total[0]:.2e}, all-to-all {total[1]:.2e} from float32",
    )
    found, expected = gradient_errors(ep, exact), gradient_errors(alltoall, exact)
    telling = [key for key in found if expected[key] <= NOISE]
    worst = max(telling, key=lambda key: found[key] / max(expected[key], 1e-3))
    report.add(
        f"bf16: gradient of a parameter, {len(telling)} of {len(found)}",
        found[worst] <= FURTHER * max(expected[worst], 1e-3),
        f"NCCL EP {found[worst]:.2e}, all-to-all {expected[worst]:.2e} {worst}",
    )
    for key in sorted(found.keys() - set(telling)):
        print(f"     NCCL EP {found[key]:.2e}, all-to-all {expected[key]:.2e} {key}", flush=True)


def whole_error(run: Run, exact: Run) -> float:
    """Of all gradients as one vector, relative by norm."""
    errors = [run.gradients[key].double() - g.double() for key, g in exact.gradients.items()]
    squares = [sum(float(t.norm() ** 2) for t in ts) for ts in (errors, exact.gradients.values())]
    return float((squares[0] / squares[1]) ** 0.5)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12))


def replay(
    model_config: Qwen35Config, layout: Layout, weights: dict[str, Tensor], batches: list[Any]
) -> dict[str, float]:
    """Differences between a replayed graph and the eager step, for the batch that it was captured
    with and another one, each with routing of its own: relative for the losses, for the gradients
    in the most that eager steps differ by, which add up in no fixed order."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    initialize(layout)
    model_parallel_cuda_manual_seed(1, te_rng_tracker=True, force_reset_rng=True)
    config = config_for(model_config, layout)
    (chunk,) = build_chunks(model_config, config, layout)
    load_global([chunk], weights)
    parameters = [p for p in chunk.parameters() if p.requires_grad]
    names = [name for name, p in chunk.named_parameters() if p.requires_grad]
    rank, samples = torch.distributed.get_rank(), [b.to("cuda").sample(0, 2) for b in batches]
    inputs = {key: samples[0][key].clone() for key in ("tokens", "labels", "position_ids")}
    forced: dict[tuple[int, ...], Tensor] = {}

    def take(number: int) -> None:
        for key, tensor in inputs.items():
            tensor.copy_(samples[number][key])
        for shape, tensor in forced.items():
            tensor.copy_(scores(*shape, seed=10 * number + rank))

    def step() -> list[Tensor]:
        losses = chunk(inputs["tokens"], inputs["position_ids"], None, labels=inputs["labels"])
        gradients = torch.autograd.grad(
            losses.float().sum(), parameters, allow_unused=True, materialize_grads=True
        )
        return [losses.detach(), *gradients]

    with routed_by(forced):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
            take(0)
            torch.cuda.synchronize()
            torch.distributed.barrier()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                captured = step()
        found = {}
        for number in range(len(batches)):
            take(number)
            graph.replay()
            torch.cuda.synchronize()
            replayed = [tensor.clone() for tensor in captured]
            eager, *others = (step() for _ in range(1 + EAGER_STEPS))
            found[f"loss, batch {number}"] = relative(replayed[0], eager[0])
            of = {}
            for at, name in enumerate(names, start=1):
                own = max(relative(other[at], eager[at]) for other in others)
                of[name] = relative(replayed[at], eager[at]) / max(own, 1e-3)
            worst = max(of, key=lambda name: of[name])
            found[f"gradients over eager's own, batch {number}, {worst}"] = of[worst]
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--gpus", type=int, choices=(2, 4))
    which.add_argument("--cpu", action="store_true")
    args = parser.parse_args(argv)
    ranks, report = args.gpus or 2, Report()

    def pool() -> contextlib.closing[WorkerPool]:
        """Anew for each run: NCCL EP is made once a process, for one dtype and size."""
        return contextlib.closing(WorkerPool(ranks, gpus=0 if args.cpu else ranks))

    def run(precision: Any, more: dict[str, Any]) -> Run:
        model = precision.model if args.cpu else REAL_HEADS | {"num_experts_per_tok": 4}
        layout = Layout(ep=ranks, dtype=precision.dtype, run=precision.run | more)
        case = Case("", ranks, layout, model, length=precision.length, steps=1)
        with pool() as workers:
            return run_case(workers, case, train_unevenly)

    local = LOCAL_ON_CPU if args.cpu else LOCAL
    exact = run(local, {})
    compare_float32(report, run(local, NCCL_EP), exact)
    if args.gpus:
        bf16 = precisions(on_gpus=True)[0]
        compare_bf16(report, run(bf16, NCCL_EP), run(bf16, {}), exact)
        layout = Layout(ep=ranks, dtype=torch.bfloat16, run=bf16.run | NCCL_EP)
        case = Case("", ranks, layout, REAL_HEADS, length=bf16.length, steps=2)
        with pool() as workers:
            results = workers.run(
                replay, ranks, model_config=case.config, layout=layout,
                weights=initial_weights(workers, case.config), batches=batches(case),
            )  # fmt: skip
        for rank, result in enumerate(results):
            for name, error in result.items():
                most = 0.0 if name.startswith("loss") else 3.0
                report.add(f"graph replayed, rank {rank}: {name}", error <= most, f"{error:.1e}")
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
