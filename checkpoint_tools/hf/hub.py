"""A Hugging Face repo id where a folder is expected."""

from __future__ import annotations

import re
from pathlib import Path

from qwen35_mcore.errors import CheckpointError

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_OTHER_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx"]


def local_folder(source: str) -> Path:
    """The folder itself, or the downloaded snapshot of a repo id.

    Raises:
        CheckpointError: it is neither, or the download failed.
    """
    path = Path(source)
    if path.exists() or not _REPO_ID.fullmatch(source):
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(source, ignore_patterns=_OTHER_WEIGHTS))
    except Exception as error:
        raise CheckpointError(
            "there is no such folder, and fetching it from the Hugging Face Hub failed",
            got=f"{source}: {type(error).__name__}: {str(error).splitlines()[0]}",
            fix="check the spelling, your connection, and `hf auth login` for gated models",
        ) from error
