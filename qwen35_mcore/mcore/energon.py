"""Every name of Megatron-Energon, the loader of samples with images, that this package uses.

It comes with the extra ``vision`` and is imported as a whole: import this module where it runs.
"""

from __future__ import annotations

from qwen35_mcore.errors import ConfigError

try:
    from megatron.energon import (
        InterleavedSample,
        Sample,
        SkipSample,
        TaskEncoder,
        WorkerConfig,
        edataclass,
        get_savable_loader,
        get_train_dataset,
        get_val_dataset,
        stateless,
    )
    from megatron.energon.epathlib import EPath
    from megatron.energon.errors import FatalSampleError, reraise_exception
    from megatron.energon.flavors.webdataset.config import MAIN_FOLDER_NAME
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator
except ModuleNotFoundError as missing:
    raise ConfigError(
        "conversations with images need Megatron-Energon and Pillow, which are not installed",
        got=f"no module named {missing.name}",
        fix="install the extra `vision`: pip install -c constraints.txt -e '.[vision]'",
    ) from missing

__all__ = [
    "MAIN_FOLDER_NAME",
    "EPath",
    "FatalSampleError",
    "InterleavedSample",
    "Sample",
    "SkipSample",
    "TaskEncoder",
    "WebdatasetPreparator",
    "WorkerConfig",
    "edataclass",
    "get_savable_loader",
    "get_train_dataset",
    "get_val_dataset",
    "reraise_exception",
    "stateless",
]
