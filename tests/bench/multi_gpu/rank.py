"""One rank of a job: run a script, and leave the rank's peak memory behind.

    torchrun ... tests/bench/multi_gpu/rank.py FOLDER [--profile STEP] SCRIPT [flags of the script]

Writes FOLDER/RANK.peak: bytes of the GPU, or without one of the process. Megatron's own log has the
peaks of the first data parallel ranks only; with natural routing others may hold more. --profile
writes FOLDER/profile.txt, where the time of one step of rank 0 went.
"""

from __future__ import annotations

import os
import resource
import runpy
import sys
from pathlib import Path


def peak_bytes() -> int:
    """Most memory that torch had allocated on this rank's GPU, or the process's largest size."""
    import torch

    # without CUDA `mcore.cpu_mode` stands in for torch.cuda, and nothing is allocated there
    on_gpu = torch.cuda.max_memory_allocated()
    return on_gpu or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    folder, sys.argv = Path(sys.argv[1]), sys.argv[2:]
    if sys.argv[0] == "--profile":
        step, sys.argv = int(sys.argv[1]), sys.argv[2:]
        if os.environ["RANK"] == "0":
            from tests.bench.multi_gpu.profile_step import profile_step

            profile_step(step, folder / "profile.txt")
    script = sys.argv[0]
    sys.path[0] = str(Path(script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        partial = folder / f"{os.environ['RANK']}.partial"
        partial.write_text(str(peak_bytes()))
        partial.replace(partial.with_suffix(".peak"))


if __name__ == "__main__":
    main()
