"""The runs and stacks of NOTES.md that the planner can express, as it would lay them out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qwen35_mcore.config.flavors import vision_flavor
from qwen35_mcore.config.images import Images
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.parallel.stages import parse_pipeline_layout
from qwen35_mcore.planner.calibration.rows import default_calibration, model_of
from qwen35_mcore.planner.candidate import Candidate, Job
from qwen35_mcore.planner.explain import parse_layout
from qwen35_mcore.planner.hardware import GIB, get_gpu
from qwen35_mcore.planner.layers import Model
from qwen35_mcore.planner.prediction import Prediction, predict_split


@dataclass(frozen=True)
class Noted:
    """A run or a stack of NOTES.md: the first layers of 35b-a3b at sequence 4096, bf16."""

    name: str
    layout: str
    """As ``--explain`` reads it."""
    ms: float
    gib: float | None = None
    gpu: str = "h100-80g"
    gpus: int = 2
    experts: int = 256
    vocab: int = 248_320
    cross_entropy: str = "native"
    flavor: str = "35b-a3b"
    layers: int = 4
    length: int = 4096
    samples: float = 4
    """Sequences of a GPU in a step."""
    optimizer: str = "adam"
    patches: int = 0
    """Of one image a sequence, where the tower trains."""

    @property
    def model(self) -> Qwen35Config:
        cut = {"num_hidden_layers": self.layers, "num_experts": self.experts}
        return model_of(self.flavor, cut | {"vocab_size": self.vocab})

    def job(self) -> tuple[Job, Candidate, str | None]:
        candidate, stages = parse_layout(self.layout)
        sizes, images = {"seq_length": self.length, "patches": self.patches}, None
        if self.patches:
            images = Images.of(vision_flavor(self.flavor), **sizes)
        job = Job(
            model_config=self.model,
            gpu=get_gpu(self.gpu),
            gpus=self.gpus,
            seq_length=self.length,
            global_batch_size=int(self.samples * self.gpus),
            calibration=default_calibration(self.gpu),
            images=images,
            optimizer=self.optimizer,
        )
        return job, replace(candidate, cross_entropy=self.cross_entropy), stages

    def prediction(self) -> Prediction:
        job, candidate, stages = self.job()
        whole = "E" + "t" * self.layers + "mL"
        return predict_split(job, candidate, parse_pipeline_layout(stages or whole))

    def stack_ms(self) -> float:
        """Forward and backward of the layers alone."""
        job, candidate, _ = self.job()
        model = Model(job, candidate)
        parts = [model.part[kind] for kind in model.kinds if kind in "ga"]
        return 1e3 * sum(part.forward_s + part.backward_s for part in parts)


_ONE: dict[str, Any] = {"gpus": 1, "experts": 64, "samples": 2}
_H200: dict[str, Any] = {"gpu": "h200-141g", "cross_entropy": "te"}
_PIPELINE = _H200 | {"experts": 128}
_SINGLE = _H200 | {"gpus": 1, "experts": 64}
_HALF = _H200 | {"gpus": 1, "experts": 128, "length": 16384, "samples": 1}
"""What a rank of two has of "long"."""
_VISION = _H200 | {"gpus": 1, "samples": 2}
_PEER = _H200 | {"layers": 40, "experts": 64, "samples": 8, "optimizer": "precision-aware"}
_SMALL: dict[str, Any] = {"gpus": 1, "experts": 16, "vocab": 512, "samples": 2}
_FP8 = "precision=fp8-tensorwise"
NOTED = (
    Noted("natural", "ep=2", 728, 63.6),
    Noted("natural", "ep=2,graphs=parts", 613, 63.5),
    Noted("balanced", "ep=2", 752, 63.5),
    Noted("natural", "pp=2,layout=Ettt|tmL", 1073, 59.8),
    Noted("natural", "pp=2,graphs=parts,layout=Ettt|tmL", 905, 59.8),
    Noted("balanced", "pp=2,layout=Ettt|tmL", 1054, 59.8),
    Noted("natural", f"ep=2,{_FP8}", 761, 63.8),
    Noted("natural", f"ep=2,{_FP8},graphs=parts", 588),
    Noted("balanced", f"ep=2,{_FP8}", 778, 63.7),
    Noted("natural", "ep=2,graphs=parts", 469, 58.1, **_H200),
    Noted("natural", "ep=2,dispatcher=ncclep,graphs=parts", 410.1, 58.6, **_H200),
    Noted("natural", "ep=2,dispatcher=ncclep", 467.5, 58.6, **_H200),
    Noted("natural", "ep=2,dispatcher=ncclep,graphs=full", 372.5, 58.7, **_H200),
    Noted("natural", "pp=2,graphs=parts,layout=Ett|ttmL", 625.0, 48.4, **_PIPELINE),
    Noted("natural", "pp=2,graphs=parts,layout=Et*4|mL", 485.2, 44.3, **_PIPELINE),
    Noted("natural", "pp=2,graphs=full,layout=Et*4|mL", 468.9, 44.4, **_PIPELINE),
    Noted("40 layers", "ep=2,dispatcher=ncclep,graphs=full", 2180.8, 92.5, **_PEER),
    Noted("long", "cp=2,ep=2,dispatcher=ncclep", 428.3, 89.5, length=32768, samples=0.5, **_H200),
    Noted("half", "mbs=1", 364.3, 89.5, **_HALF),
    Noted("half", "graphs=full", 345.7, 89.6, **_HALF),
    Noted("natural", "mbs=1", 426.6, 46.9, **_SINGLE),
    Noted("natural", "graphs=parts", 349.0, 46.9, **_SINGLE),
    Noted("natural", "graphs=full", 327.2, 47.0, **_SINGLE),
    Noted("natural", f"{_FP8},graphs=full", 320.2, 47.2, **_SINGLE),
    Noted("text", "mbs=1", 269.0, 98.65, **_VISION),
    Noted("images", "mbs=1", 580.7, 107.27, patches=1024, **_VISION),
    Noted("main job", "mbs=1", 322, 54.4e9 / GIB, **_ONE),
    Noted("main job", "mbs=1,graphs=full", 250, **_ONE),
    Noted("main job", _FP8, 328, 54.7e9 / GIB, **_ONE),
    Noted("main job", f"{_FP8},graphs=full", 249, **_ONE),
    Noted("vocabulary 512", "mbs=1", 228, **_SMALL),
    Noted("vocabulary 512", "mbs=1,graphs=parts", 85, **_SMALL),
)
"""Runs with MTP: routing, layout, milliseconds of a step, peak of the fullest rank."""
_ALONE: dict[str, Any] = {"gpus": 1, "experts": 32}
STACKS = (
    Noted("stack", "mbs=1", 67.8, **_ALONE),
    Noted("stack", "mbs=1,graphs=parts", 24.3, **_ALONE),
    Noted("stack", "mbs=1,graphs=full", 19.4, **_ALONE),
    Noted("stack", "mbs=4", 77.7, **_ALONE),
    Noted("stack", "mbs=4,graphs=parts", 74.4, **_ALONE),
    Noted("stack", "mbs=4,graphs=full", 69.4, **_ALONE),
    Noted("stack", "mbs=4", 82.9, gpus=1),
    Noted("stack, sequence 32768", "mbs=1", 214.8, length=32768, **_ALONE),
    Noted(
        "397b-a17b, a GDN layer", "mbs=4", 55.9, gpus=1, experts=16, flavor="397b-a17b", layers=1
    ),
    Noted(
        *("397b-a17b, a GDN layer", "mbs=4,graphs=full", 53.7),
        gpus=1,
        experts=16,
        flavor="397b-a17b",
        layers=1,
    ),
)
"""Layers alone, forward and backward, without FlashQLA."""
