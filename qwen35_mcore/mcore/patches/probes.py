"""Runs every patch's probe in a process of its own, where nothing of megatron-core is replaced.

python -m qwen35_mcore.mcore.patches.probes        prints a JSON object, verdicts by name
"""

from __future__ import annotations

import json
import subprocess
import sys

from qwen35_mcore.mcore.patches.patch import Verdict

TIMEOUT_S = 300


def probe_all() -> dict[str, Verdict]:
    """The verdict of every patch's probe on the installed release, by the patch's name.

    Raises:
        RuntimeError: the process that runs them failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the probes of megatron-core failed:\n{done.stderr[-2000:]}")
    verdicts = json.loads(done.stdout.splitlines()[-1])
    return {name: Verdict(text) for name, text in verdicts.items()}


def main() -> None:
    """Probe in this process, alone in a process group over gloo."""
    import torch

    from qwen35_mcore.mcore import cpu_mode

    if cpu_mode.is_needed():
        cpu_mode.enable()
    from qwen35_mcore.mcore.patches.table import PATCHES

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    verdicts = {}
    for patch in PATCHES:
        try:
            verdicts[patch.name] = patch.probe()
        except Exception as error:  # of whatever kind another release raises
            print(f"{patch.name}: {type(error).__name__}: {error}", file=sys.stderr)
            verdicts[patch.name] = Verdict.UNKNOWN
    torch.distributed.destroy_process_group()
    print(json.dumps(verdicts))


if __name__ == "__main__":
    main()
