"""What the presets would gain by pipeline stages that end between a token mixer and a feed-forward.

    python -m tests.bench.compare_cuts

By the planner's cost model, for the sizes of each preset: the best split between whole layers and
the best between halves of layers (``--decoder hybrid --hybrid-layer-pattern``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.parallel.parameters import mixer_parameters
from qwen35_mcore.parallel.schedule import Shape
from qwen35_mcore.planner import memory
from qwen35_mcore.planner.calibration.rows import default_calibration
from qwen35_mcore.planner.candidate import Candidate, Job
from qwen35_mcore.planner.hardware import get_gpu
from qwen35_mcore.planner.layers import Model
from qwen35_mcore.planner.stages import Chain, Splits, Unit

PRESETS = Path(__file__).parents[2] / "launch" / "presets"
SIZES = ("tp", "pp", "vpp", "cp", "ep", "etp", "micro_batch_size", "recompute", "precision")


def halves(model: Model, kind: str) -> tuple[Unit, Unit]:
    """A layer's token mixer and its MoE. A layer lists the compute of the two in turn, and the
    exchanges of one or the other; both have half of the TP communication and of what is kept."""
    layer, seconds, computes = model.part[kind], [0.0, 0.0], 0
    for term in layer.terms:
        share = {"compute": 1 - computes % 2, "tp": 0.5, "cp": 1.0, "ep": 0.0}[term.name]
        computes += term.name == "compute"
        seconds[0] += share * term.forward_s
        seconds[1] += share * term.backward_s
    weights = mixer_parameters(model.job.model_config, model.candidate, kind)
    static = sum(memory.static_bytes(weights, model.job, model.candidate))
    mixer = Unit(*seconds, static, layer.unit.saved_bytes / 2)
    rest = [whole - part for whole, part in zip(layer.unit, mixer, strict=True)]
    return mixer, Unit(*rest)


def in_halves(model: Model) -> Chain:
    """The model as the stage search takes it, with two units for each decoder layer."""
    layers = model.kinds.rstrip("mL")[1:]
    tail = [model.part[kind].unit for kind in model.kinds[1 + len(layers) :]]
    units = [model.part["E"].unit, *(half for kind in layers for half in halves(model, kind))]
    return Chain([*units, Unit(*map(sum, zip(*tail, strict=True)))])


def compare(plan: dict[str, Any]) -> str:
    """A line for the plan of one preset."""
    candidate = Candidate(**{name: plan["plan"][name] for name in SIZES})
    job = Job(
        model_config=get_flavor(plan["model"]),
        gpu=get_gpu(plan["gpu"]),
        gpus=plan["gpus"],
        seq_length=plan["seq_length"],
        global_batch_size=plan["global_batch_size"],
        calibration=default_calibration(plan["gpu"]),
        headroom_bytes=plan["headroom_bytes"],
    )
    model = Model(job, candidate)
    shape = Shape(pp=candidate.pp, vpp=candidate.vpp, microbatches=candidate.microbatches(job))
    whole, fine = (
        Splits(chain, shape, model.p2p_s, model.capacity_bytes)
        for chain in (model.chain, in_halves(model))
    )
    cuts = whole.best()
    layers = whole.simulate(cuts).step_s
    same = fine.simulate(tuple(max(1, 2 * cut - 1) for cut in cuts)).step_s
    assert abs(same / layers - 1) < 1e-6, "halves of layers do not add up to layers"
    half = min(layers, fine.simulate(fine.best()).step_s)
    return f"{layers:.3f} s between layers, {half:.3f} s between halves: {1 - half / layers:.2%}"


def main() -> None:
    for folder in sorted(PRESETS.iterdir()):
        print(f"{folder.name}: {compare(json.loads((folder / 'plan.json').read_text()))}")


if __name__ == "__main__":
    main()
