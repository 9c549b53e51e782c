"""Parameters, and bytes of optimizer state, that the planner expects on a rank are those that
megatron has there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from megatron.training.training import wrap_model_chunks_with_ddp

from qwen35_mcore.config.counts import count_parameters
from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.config.images import Images
from qwen35_mcore.config.matrices import matrix_weights
from qwen35_mcore.mcore.muon import MatrixMuon
from qwen35_mcore.mcore.patches import float32_order, muon_matrices, precision_aware
from qwen35_mcore.parallel.parameters import Parameters, part_parameters
from qwen35_mcore.planner.calibration.rows import default_calibration
from qwen35_mcore.planner.candidate import OPTIMIZERS, Candidate, Job
from qwen35_mcore.planner.hardware import get_gpu
from qwen35_mcore.planner.memory import MOMENT, gradient_bytes, state_bytes
from qwen35_mcore.planner.prediction import predict_split
from tests.helpers.distributed import WorkerPool
from tests.helpers.kinds import kinds
from tests.helpers.training import Layout, build_chunks, config_for, initialize
from tests.helpers.vision import vision_toy_config

CASES = {
    "tp2 pp2 ep2": ("tiny-moe", Candidate(tp=2, pp=2, ep=2), "Ett|ttmL"),
    "pp2 vpp2 ep2": ("tiny-moe", Candidate(pp=2, vpp=2, ep=2), "E|tt|tt|mL"),
    "tp2 etp2 ep2": ("tiny-moe", Candidate(tp=2, etp=2, ep=2), "EttttmL"),
    "tp4 dense": ("tiny-dense", Candidate(tp=4, etp=4), "EttttmL"),
    "pp4 dense": ("tiny-dense", Candidate(pp=4), "Et|t|tt|mL"),
}


def built_parameters(flavor: str, layout: Layout) -> tuple[int, int]:
    """Elements of dense and of expert parameters on this rank."""
    initialize(layout)
    model_config = get_flavor(flavor)
    chunks = build_chunks(model_config, config_for(model_config, layout), layout)
    named = [pair for chunk in chunks for pair in chunk.named_parameters()]
    expert = sum(p.numel() for name, p in named if ".experts." in name)
    return sum(p.numel() for _, p in named) - expert, expert


def job_of(flavor: str, gpus: int, optimizer: str = "adam") -> Job:
    return Job(
        model_config=get_flavor(flavor),
        gpu=get_gpu("h100-80g"),
        gpus=gpus,
        seq_length=64,
        global_batch_size=16,
        calibration=default_calibration("h100-80g"),
        optimizer=optimizer,
    )


@pytest.mark.parametrize("case", CASES)
def test_a_rank_holds_what_the_planner_says(case: str, pool: WorkerPool) -> None:
    flavor, candidate, stages = CASES[case]
    layout = Layout(
        tp=candidate.tp,
        pp=candidate.pp,
        vpp=candidate.vpp if candidate.vpp > 1 else None,
        stages=stages if candidate.pp > 1 else None,
        ep=candidate.ep,
        etp=candidate.etp,
    )
    built = pool.run(built_parameters, 4, flavor=flavor, layout=layout)
    job = job_of(flavor, 4)
    prediction = predict_split(job, candidate, tuple(stages.split("|")))
    ranks_of_a_stage = 4 // candidate.pp
    for rank, (dense, expert) in enumerate(built):
        expected = prediction.rank_parameters(rank // ranks_of_a_stage)
        assert expected.expert == expert
        # tensor parallel ranks each hold the few norms and gates that are not split
        assert expected.dense == pytest.approx(dense, rel=1e-2)
        if candidate.tp == 1:
            # the final norm is where the last decoder layer is, the planner counts it with the loss
            assert abs(expected.dense - dense) in (0, job.model_config.hidden_size)
    if candidate.tp == 1:
        ranks = map(prediction.rank_parameters, range(candidate.pp))
        assert sum(ranks, Parameters()).dense * ranks_of_a_stage == sum(dense for dense, _ in built)


def built_tower(layout: Layout) -> int:
    """Elements of the vision tower on this rank."""
    initialize(layout)
    model_config = vision_toy_config(moe=False)
    [chunk] = build_chunks(model_config, config_for(model_config, layout), layout)
    return sum(p.numel() for name, p in chunk.named_parameters() if "vision_model." in name)


@pytest.mark.parametrize("tp", kinds((4, 2), ("2",)))
def test_a_rank_of_the_first_stage_holds_its_part_of_the_tower(tp: int, pool: WorkerPool) -> None:
    layout = Layout(tp=tp, pp=4 // tp, vision=True)
    built = pool.run(built_tower, 4, layout=layout)
    model_config = vision_toy_config(moe=False)
    images = Images.of(model_config, seq_length=64, patches=4)
    candidate = Candidate(tp=tp, pp=4 // tp)
    both, text = (part_parameters(model_config, candidate, "E", one) for one in (images, None))
    expected = int(both.dense - text.dense)
    assert built == [expected] * tp + [0] * (4 - tp)


AWARE = {
    "use_precision_aware_optimizer": True,
    **dict.fromkeys(("main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"), torch.bfloat16),
}
"""What a plan's flags ask for."""


def state_after_a_step(optimizer: str) -> tuple[set[int], list[tuple[bool, bool, int, int]]]:
    """Bytes of this rank's gradients of bfloat16 parameters, and for each parameter that it updates
    whether Muon does, whether the model has it in float32, its elements, and the bytes of its
    state."""
    for patch in (float32_order.PATCH, *precision_aware.PATCHES, *muon_matrices.PATCHES):
        patch.apply()
    muon, aware = optimizer == "muon", optimizer == "precision-aware"
    layout = Layout(ep=2, dtype=torch.bfloat16, run={"gdn_gates_apart": muon})
    initialize(layout)
    config = config_for(get_flavor("tiny-moe"), layout)
    chunks = build_chunks(get_flavor("tiny-moe"), config, layout)
    wrapped = wrap_model_chunks_with_ddp(
        [Float16Module(config, chunk) for chunk in chunks],
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=not aware, use_distributed_optimizer=not muon
        ),
        use_layer_wise_distributed_optimizer=muon,
    )
    settings = OptimizerConfig(
        optimizer="muon" if muon else "adam",
        lr=1e-3,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=not muon,
        use_layer_wise_distributed_optimizer=muon,
        **(AWARE if aware else {}),
    )
    whole = get_megatron_optimizer(settings, wrapped)
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    for parameter in parameters:
        parameter.main_grad.fill_(1e-3)
    gradients = {p.main_grad.element_size() for p in parameters if p.dtype == torch.bfloat16}
    starts = {p.data_ptr(): p.numel() * 4 for p in parameters if p.dtype == torch.float32}
    whole.step()
    found = []
    for one in single_optimizers(whole):
        for p in (p for group in one.param_groups for p in group["params"]):
            own = any(start <= p.data_ptr() < start + size for start, size in starts.items())
            tensors = [*one.state[p].values(), *([] if own or p.dtype != torch.float32 else [p])]
            held = sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))
            found.append((isinstance(one, MatrixMuon), own, p.numel(), held))
    return gradients, found


def single_optimizers(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """The torch optimizers inside megatron's."""
    if hasattr(optimizer, "chained_optimizers"):
        for one in optimizer.chained_optimizers:
            yield from single_optimizers(one)
    else:
        yield optimizer.optimizer


@pytest.mark.parametrize("optimizer", kinds(OPTIMIZERS, ("precision-aware", "muon")))
def test_a_parameter_has_the_state_that_the_planner_says(optimizer: str, pool: WorkerPool) -> None:
    """Of every bfloat16 parameter on two ranks that share experts, and everything else's state."""
    config, candidate = get_flavor("tiny-moe"), Candidate(ep=2)
    job = job_of("tiny-moe", 2, optimizer)
    ranks = pool.run(state_after_a_step, 2, optimizer=optimizer)
    each = state_bytes(job, candidate)
    for gradients, parameters in ranks:
        assert gradients == {gradient_bytes(job)}
        for muon, float32, elements, held in parameters:
            if not float32:
                assert held == (each - MOMENT if muon else each) * elements
    rows = [row for _, parameters in ranks for row in parameters]
    assert sum(elements for _, _, elements, _ in rows) == count_parameters(config).total
    matrices = sum(elements for muon, _, elements, _ in rows if muon)
    expected = sum(weight.parameters for weight in matrix_weights(config))
    assert matrices == (expected if optimizer == "muon" else 0)
