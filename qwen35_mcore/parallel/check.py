"""Whether a layout can run a model: every broken rule at once, because finding them one error at a
time costs a cluster allocation each."""

from __future__ import annotations

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.parallel.layout import ParallelLayout
from qwen35_mcore.parallel.rules import RULES, Case
from qwen35_mcore.parallel.violation import Violation


def check_layout(
    model_config: Qwen35Config,
    layout: ParallelLayout,
    *,
    seq_length: int | None = None,
    world_size: int | None = None,
    micro_batch_size: int | None = None,
    global_batch_size: int | None = None,
    fp8: bool = False,
    vision: VisionConfig | None = None,
) -> list[Violation]:
    """Everything that keeps `model_config` from running under `layout`; empty when nothing does.

    Args:
        seq_length: tokens per sequence, before context parallelism splits it.
        world_size: ranks in all.
        micro_batch_size: sequences per forward pass and data parallel rank.
        global_batch_size: sequences per optimizer step.
        fp8: whether matrix products run in FP8.
        vision: the vision tower of a run that trains it.
    """
    case = Case(
        model_config=model_config,
        layout=layout,
        seq_length=seq_length,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        fp8=fp8,
        vision=vision,
    )
    return [violation for rule in RULES for violation in rule(case)]


def too_many_stages(model_config: Qwen35Config, layout: ParallelLayout) -> list[Violation]:
    """What is against stages without a layer, where they are not named in a layout string."""
    most = model_config.num_hidden_layers + 2
    if layout.pp * layout.vpp <= most:
        return []
    return [
        Violation(
            rule="every virtual stage has a layer",
            reason="a stage without layers has empty gradient buffers",
            value=f"pp {layout.pp} * vpp {layout.vpp}, {most - 2} layers",
            allowed=f"up to {most} stages: embedding and loss can stand alone",
            fix="lower pp or vpp",
        )
    ]


def refuse_violations(violations: list[Violation]) -> None:
    """Turn what `check_layout` found into an error.

    Raises:
        ConfigError: with every violation in its message.
    """
    if violations:
        listing = "\n  - ".join(str(violation) for violation in violations)
        raise ConfigError(f"the parallel layout cannot run this model:\n  - {listing}")
