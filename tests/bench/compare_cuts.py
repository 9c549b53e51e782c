"""What the presets would gain by pipeline stages that end between a token mixer and a feed-forward.

    python -m tests.bench.compare_cuts

By the planner's cost model, for the sizes of each preset: the best split between whole layers and
the best between halves of layers (``--decoder hybrid --hybrid-layer-pattern``).
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from operator import sub
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
SIZES = (
    *("tp", "pp", "vpp", "cp", "ep", "etp", "micro_batch_size"),
    *("recompute", "precision", "dispatcher", "graphs"),
)


def halves(model: Model, kind: str, layer: Unit) -> tuple[Unit, Unit]:
    """A layer's token mixer and its MoE. A layer lists the compute of the two in turn, and the
    exchanges of one or the other; both have half of the TP communication and of what is kept."""
    seconds, computes = [0.0, 0.0], 0
    for term in model.part[kind].terms:
        share = {"compute": 1 - computes % 2, "tp": 0.5, "cp": 1.0, "ep": 0.0}[term.name]
        computes += term.name == "compute"
        seconds[0] += share * term.forward_s
        seconds[1] += share * term.backward_s
    weights = mixer_parameters(model.job.model_config, model.candidate, kind)
    static = sum(memory.static_bytes(weights, model.job, model.candidate))
    mixer = Unit(*seconds, static, layer.saved_bytes / 2)
    rest = [whole - part for whole, part in zip(layer, mixer, strict=True)]
    return mixer, Unit(*rest)


def in_halves(model: Model) -> Chain:
    """The model as the stage search takes it, with two units for each decoder layer."""
    chain, kinds = model.chain, model.kinds.rstrip("mL")[1:]
    sums = zip(
        chain.forward_s, chain.backward_s, chain.static_bytes, chain.saved_bytes, strict=True
    )
    first, *layers, last = (Unit(*map(sub, after, before)) for before, after in pairwise(sums))
    pairs = (halves(model, kind, layer) for kind, layer in zip(kinds, layers, strict=True))
    return Chain([first, *(half for pair in pairs for half in pair), last])


def compare(plan: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a step of a preset's plan, cut between layers and between halves of layers."""
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
    return layers, min(layers, fine.simulate(fine.best()).step_s)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for folder in sorted(PRESETS.iterdir()):
        layers, fine = compare(json.loads((folder / "plan.json").read_text()))
        print(
            f"{folder.name}: {layers:.3f} s between layers, {fine:.3f} s between halves: "
            f"{1 - fine / layers:.2%}"
        )


if __name__ == "__main__":
    main()
