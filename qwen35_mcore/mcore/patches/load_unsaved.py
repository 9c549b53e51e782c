"""Load what a run does not save: ``--no-save-optim`` and ``--no-save-rng`` of a run that resumes.

Depends on megatron-core 0.19: it asks a checkpoint for the state dict that it would save. With
``--no-save-optim`` the optimizer's tensors are not asked for, and nothing notices: the run goes on
with the checkpoint's step count, main parameters of random weights and moments of uninitialised
memory. The first step puts these into the model. With ``--no-save-rng`` it exits with status 0.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron.training import checkpointing


def install() -> None:
    """Patch ``megatron.training.checkpointing``; does nothing when called again."""
    original = checkpointing.generate_state_dict
    if hasattr(original, "asks_for_everything"):
        return

    def generate_state_dict(args: Any, *rest: Any, **more: Any) -> dict[str, Any]:
        if (more.get("optim_sd_kwargs") or {}).get("is_loading"):
            args = copy.copy(args)
            # what is to be loaded the caller says: it passes None for the rest
            args.no_save_optim = args.no_save_rng = False
        return original(args, *rest, **more)

    generate_state_dict.asks_for_everything = True  # type: ignore[attr-defined]
    checkpointing.generate_state_dict = generate_state_dict
