"""Runs every patch's probe in a process of its own, where nothing of megatron-core is replaced.

python -m qwen35_mcore.mcore.patches.probes        prints a JSON list, a row for each patch
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass

from qwen35_mcore.mcore.imports import wrong_release
from qwen35_mcore.mcore.patches.verdict import Verdict

TIMEOUT_S = 600


@dataclass(frozen=True, kw_only=True)
class Probed:
    """A patch's text and what its probe found on the installed release."""

    name: str
    target: str
    why: str
    file: str
    upstream: str
    verdict: Verdict


def probe_all() -> list[Probed]:
    """Every patch, probed.

    Raises:
        ConfigError: the process that runs the probes failed.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        )
    except subprocess.SubprocessError as error:
        reason = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1]
        raise wrong_release(f"`python -m {__name__}` fails: {reason}") from error
    rows = json.loads(done.stdout.splitlines()[-1])
    return [Probed(**row | {"verdict": Verdict(row["verdict"])}) for row in rows]


def main() -> None:
    """Probe in this process, alone in a process group over gloo."""
    import torch

    from qwen35_mcore.mcore import cpu_mode

    if cpu_mode.is_needed():
        cpu_mode.enable()
    from qwen35_mcore.mcore.patches.table import PATCHES

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    rows = []
    for patch in PATCHES:
        try:
            verdict = patch.probe()
        except Exception as error:  # of whatever kind another release raises
            print(f"{patch.name}: {type(error).__name__}: {error}", file=sys.stderr)
            verdict = Verdict.UNKNOWN
        rows.append(
            Probed(
                name=patch.name,
                target=patch.target,
                why=patch.why,
                file=patch.file,
                upstream=patch.upstream,
                verdict=verdict,
            )
        )
    torch.distributed.destroy_process_group()
    print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
