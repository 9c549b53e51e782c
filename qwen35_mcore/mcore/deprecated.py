"""What megatron-core calls deprecated, or advises against, and training still uses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Deprecated:
    """One such part."""

    part: str
    when: str
    """The runs that use it."""
    instead: str
    module: str
    """Where megatron-core says it, and a piece of its words there."""
    says: str


IN_USE = (
    Deprecated(
        part="GPTModel",
        when="--decoder gpt, the default",
        instead="--decoder hybrid: the same weights, losses and checkpoints on HybridModel",
        module="megatron.core.models.gpt.gpt_model",
        says="GPTModel IS DEPRECATED",
    ),
    Deprecated(
        part="pretrain with a model provider",
        when="every run",
        instead="nothing yet: a ModelConfig of megatron's does not know this package's layers",
        module="megatron.training.argument_utils",
        says="It is recommended to use a ModelConfig",
    ),
    Deprecated(
        part="megatron-core's own asynchronous saving",
        when="--async-save with --async-strategy mcore",
        instead="--async-strategy nvrx with the package nvidia-resiliency-ext, or no --async-save",
        module="megatron.core.dist_checkpointing.strategies.torch",
        says="MCore's async save is deprecated",
    ),
)
