"""Parameters that the planner expects on a rank are those that megatron builds there."""

from __future__ import annotations

import pytest

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.config.images import Images
from qwen35_mcore.parallel.parameters import Parameters, part_parameters
from qwen35_mcore.planner.calibration.rows import default_calibration
from qwen35_mcore.planner.candidate import Candidate, Job
from qwen35_mcore.planner.hardware import get_gpu
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
    job = Job(
        model_config=get_flavor(flavor),
        gpu=get_gpu("h100-80g"),
        gpus=4,
        seq_length=64,
        global_batch_size=16,
        calibration=default_calibration("h100-80g"),
    )
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
