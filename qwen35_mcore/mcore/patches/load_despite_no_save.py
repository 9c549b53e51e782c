"""Load what a run does not save: ``--no-save-optim`` and ``--no-save-rng`` of a run that resumes.

megatron-core asks a checkpoint for the state dict that the run would save. With ``--no-save-optim``
it does not ask for the optimizer's tensors, and goes on with the checkpoint's step count, main
parameters of random weights and moments of uninitialised memory; the first step puts these into the
model. With ``--no-save-rng`` it exits with status 0.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from megatron.training import checkpointing

from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict, shows


def _asking_for_everything(original: Any) -> Any:
    def generate_state_dict(args: Any, *rest: Any, **more: Any) -> dict[str, Any]:
        if (more.get("optim_sd_kwargs") or {}).get("is_loading"):
            args = copy.copy(args)
            # the caller passes None for what is not to be loaded
            args.no_save_optim = args.no_save_rng = False
        return original(args, *rest, **more)

    return generate_state_dict


def _probe() -> Verdict:
    """Does a run that does not save its optimizer ask for it while it loads?"""
    part = SimpleNamespace(sharded_state_dict=lambda *_, **__: {}, is_stub_optimizer=False)
    args = SimpleNamespace(no_save_optim=True, no_save_rng=True, ckpt_format="torch_dist")
    state = checkpointing.generate_state_dict(
        args,
        [part],
        part,
        None,
        None,
        optim_sd_kwargs={"is_loading": True, "metadata": {}},
        model_sd_kwargs={"metadata": {}},
    )
    return shows("optimizer" not in state)


PATCH = Patch(
    name="load what is not saved",
    target="megatron.training.checkpointing:generate_state_dict",
    why="a run with --no-save-optim resumes with uninitialised moments and random main parameters, "
    "one with --no-save-rng exits with status 0",
    replace=_asking_for_everything,
    probe=_probe,
)
