"""One folder for everything that is compiled or tuned while a run starts.

Standard library only: the variables have to be set before Triton, tilelang and torch are imported.
"""

from __future__ import annotations

import os
from pathlib import Path

from qwen35_mcore.errors import ConfigError

VARIABLE = "QWEN35_KERNEL_CACHE"
FOLDERS = {
    "TRITON_CACHE_DIR": "triton",  # also what FLA's kernels were tuned to
    "TILELANG_CACHE_DIR": "tilelang",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "NCCL_EP_JIT_CACHE_DIR": "nccl_ep",
}
"""What each of them reads its folder from, and that folder under the shared one."""


def use_shared_folder() -> None:
    """Put the caches of this process and of what it starts into the folder that `VARIABLE` names,
    if it names one. A cache whose own variable is set stays where that says.

    Raises:
        ConfigError: the folder is not there and cannot be made.
    """
    given = os.environ.get(VARIABLE)
    if not given:
        return
    shared = Path(given).expanduser().absolute()
    try:
        shared.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the folder that {VARIABLE} names cannot be made",
            got=f"{shared}: {error.strerror}",
            fix="name another folder, or unset the variable",
        ) from error
    for variable, folder in FOLDERS.items():
        os.environ.setdefault(variable, str(shared / folder))
