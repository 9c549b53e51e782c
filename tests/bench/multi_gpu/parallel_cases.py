"""The parallel modes and precisions that are compared with one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from qwen35_mcore.config.rope import RopeParameters
from tests.distributed.cases import FULL_RECOMPUTE, MOE, STATES
from tests.helpers.equivalence import Case
from tests.helpers.training import Layout

REAL_HEADS: dict[str, Any] = MOE | {
    "vocab_size": 1024,
    "hidden_size": 512,
    "head_dim": 256,
    "rope_parameters": RopeParameters(rope_theta=1e7, mrope_section=(11, 11, 10)),
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_experts": 16,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}
"""A small model of the head sizes that the fast kernels are made for."""


@dataclass(frozen=True)
class Tolerance:
    """What a parallel run may differ from the serial one by.

    Absolute for a token's loss at step 0 and for the mean losses of later steps, relative by norm
    for each parameter's gradient. With ``noise`` a gradient or loss may also differ by that many
    times what the serial run itself differs from float32 there, which may not be more than
    ``most_noise`` of any gradient: else the comparison would show nothing.
    """

    token_loss: float
    gradient: float
    later_loss: float
    noise: float = 0.0
    most_noise: float = 0.0


@dataclass(frozen=True)
class Precision:
    """A backend and dtype."""

    name: str
    tolerance: Tolerance
    run: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    length: int = 256
    context_parallel: bool = True
    nccl_ep: bool = False
    wrong: float = 1.01
    """The factor on one rank's gradients that must be noticed."""


FLOAT32_GPU = Tolerance(token_loss=2e-5, gradient=1e-4, later_loss=5e-3)
"""The first step is exact to rounding; after it a token at a near tie may take another expert."""
NCCL_EP = {
    "moe_token_dispatcher_type": "flex",
    "moe_flex_dispatcher_backend": "ncclep",
    "moe_expert_rank_capacity_factor": 1.0,  # all that there is where every expert gets each token
    "gradient_accumulation_fusion": True,
}
LOCAL_ON_CPU = Precision("fp32 local", Tolerance(2e-6, 2e-5, 1e-4), model=MOE, length=64)
LOCAL = Precision("fp32 local", FLOAT32_GPU, run={"gdn_kernel": "torch"}, model=REAL_HEADS)


def precisions(*, on_gpus: bool, shared: bool = False) -> list[Precision]:
    """On a CPU only the local backend runs. NCCL EP exchanges rows within a host, and ranks that
    share a GPU are hosts of their own."""
    if not on_gpus:
        return [LOCAL_ON_CPU]
    from megatron.core.transformer.enums import AttnBackend

    from qwen35_mcore.mcore import nccl_ep
    from tests.bench.common import fast_settings

    te_in_float32 = {
        "transformer_impl": "transformer_engine",
        "attention_backend": AttnBackend.unfused,  # cuDNN and FlashAttention are 16-bit
        "gdn_kernel": "torch",
    }
    return [
        Precision(
            "bf16 TE",
            # two bf16 runs differ by rounding alone, so what they differ from float32 by is the
            # measure; every token goes to every expert, so that no near tie flips between them.
            # A_log and dt_bias of the first layer have gradients of 1e-4 that are sums of both
            # signs: FLA's kernels were 0.24 from float32 there, everything else below 0.12.
            Tolerance(0.05, 5e-2, 5e-2, noise=3.0, most_noise=0.3),
            run=fast_settings(),
            model=REAL_HEADS | {"num_experts_per_tok": 16},
            dtype=torch.bfloat16,
            nccl_ep=nccl_ep.unavailable() is None and not shared,
            wrong=1.5,
        ),
        Precision(
            "fp32 TE",
            FLOAT32_GPU,
            run=te_in_float32,
            model=REAL_HEADS,
            context_parallel=False,  # Transformer Engine's unfused attention has none
        ),
        LOCAL,
    ]


def cases(ranks: int, precision: Precision) -> Iterator[Case]:
    """Every mode that so many ranks can form; all at once on as many as there are."""

    def case(name: str, world: int, micro_batch_size: int = 1, **layout: Any) -> Case:
        run = precision.run | layout.pop("run", {})
        return Case(
            name,
            world,
            Layout(dtype=precision.dtype, run=run, **layout),
            precision.model,
            micro_batch_size,
            precision.length,
            steps=3,
        )

    if ranks == 1:
        yield case("microbatch of 4", 1, 4)
        yield case("full recompute", 1, run=FULL_RECOMPUTE)
        return
    yield case("TP2", 2, tp=2)
    yield case("PP2 x VPP2", 2, pp=2, vpp=2)
    yield case(f"EP{ranks}", ranks, ep=ranks)
    if precision.nccl_ep:
        yield case(f"EP{ranks} (NCCL EP)", ranks, ep=ranks, run=NCCL_EP)
    for cp in (2, 4) if precision.context_parallel else ():
        if cp <= ranks:
            yield case(f"CP{cp} (all-to-all GDN)", cp, cp=cp)
            yield case(f"CP{cp} (states passed)", cp, cp=cp, run=STATES)
    if ranks >= 4:
        yield case("TP2 x PP2 x EP2", ranks, tp=2, pp=2, ep=2)
