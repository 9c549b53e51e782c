"""What the vision-language model does not run beside, said before any process group forms."""

from __future__ import annotations

from argparse import Namespace

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.model.vision.transformer_config import check_tensor_parallel

_UNTESTED = "it was not tested with a vision tower"


def check_vision(args: Namespace, model_config: Qwen35Config) -> None:
    """Refuse what a run with ``--vision`` cannot do.

    Raises:
        ConfigError: the model has no tower, its tower contradicts its text, or a flag or the layout
            is not for the vision-language model.
    """
    if not args.qwen35_vision:
        return
    vision = VisionConfig.of(model_config)
    for given, reason, fix in _beside(args):
        if given:
            raise ConfigError(f"--vision does not run beside it: {reason}", got=given, fix=fix)
    check_tensor_parallel(vision, args.tensor_model_parallel_size)


def _beside(args: Namespace) -> list[tuple[str, str, str]]:
    """Each as what was given (empty: nothing), the reason, and the fix."""
    low = [_flag(name) for name in ("fp8", "fp4") if getattr(args, name)]
    return [
        (
            "--decoder hybrid" if args.decoder == "hybrid" else "",
            "only Megatron's GPTModel takes the tower's outputs",
            "pass --decoder gpt",
        ),
        (
            "--use-megatron-fsdp" if args.use_megatron_fsdp else "",
            _UNTESTED,
            "pass --use-distributed-optimizer in its place",
        ),
        (
            f"--optimizer {args.optimizer}" if "muon" in args.optimizer else "",
            "which parameters of the tower are matrices is not known to it",
            "pass --optimizer adam",
        ),
        (" ".join(low), _UNTESTED, f"drop {' and '.join(low)}"),
    ]


def _flag(name: str) -> str:
    return f"--{name}-format"
