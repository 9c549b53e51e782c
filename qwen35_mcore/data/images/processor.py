"""transformers' processor of a Qwen3.5 folder, with Pillow in place of torchvision.

transformers resizes with torchvision where it is installed and with Pillow elsewhere; the two round
differently, by up to one of 255 levels for an image. Here it is Pillow everywhere, so that a run's
data do not depend on what else is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoImageProcessor, Qwen3VLProcessor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_transforms import resize
from transformers.image_utils import ChannelDimension, SizeDict
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from qwen35_mcore.data.tokenizer_files import PROCESSOR_FILES
from qwen35_mcore.data.tokenizers import where_to_load
from qwen35_mcore.errors import DataError


class _Pillow(TorchvisionBackend):
    """What `Qwen3VLVideoProcessor` asks of torchvision; frames are ``[..., channels, h, w]``."""

    def resize(self, image: Tensor, size: SizeDict, resample: Any = None, **_: Any) -> Tensor:
        first = ChannelDimension.FIRST
        frames = [
            resize(
                frame.numpy(),
                (size.height, size.width),
                resample=resample,
                data_format=first,
                input_data_format=first,
            )
            for frame in image.flatten(0, -4)
        ]
        return torch.from_numpy(np.stack(frames)).unflatten(0, image.shape[:-3])

    def normalize(self, image: Tensor, mean: Tensor, std: Tensor, **_: Any) -> Tensor:
        return (image - mean[:, None, None]) / std[:, None, None]


class PillowVideoProcessor(Qwen3VLVideoProcessor, _Pillow):
    """transformers' `Qwen3VLVideoProcessor` for frames that are RGB and chosen already."""

    def convert_to_rgb(self, video: Tensor) -> Tensor:
        return video


class PillowProcessor(Qwen3VLProcessor):
    """transformers' `Qwen3VLProcessor`, which without torchvision cannot even be built."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


def load_processor(name: str, tokenizer: Any) -> PillowProcessor | None:
    """The processor of a folder or name; None where it has no image processor, as a text model.

    Args:
        name: a Hugging Face folder or name.
        tokenizer: transformers' tokenizer of the same folder, which has the chat template.

    Raises:
        DataError: the image processor is not that of Qwen3.5, or cannot be loaded.
    """
    source, is_local = where_to_load(name)
    try:
        images = AutoImageProcessor.from_pretrained(
            source, local_files_only=is_local, backend="pil"
        )
        frames = PillowVideoProcessor.from_pretrained(source, local_files_only=is_local)
    except Exception as error:  # of many kinds, for a file that is damaged or of another model
        if isinstance(error, OSError) and not _has_processor(source):
            return None
        raise DataError(
            f"the image processor of {name!r} could not be loaded",
            got=str(error).strip().partition("\n")[0],
            allowed=" and ".join(PROCESSOR_FILES[:2]) + " as the model was published with",
            fix="download these files again",
        ) from error
    if not isinstance(images, Qwen2VLImageProcessorPil):
        raise DataError(
            f"the image processor of {name!r} is not Qwen3.5's",
            got=type(images).__name__,
            allowed="Qwen2VLImageProcessor",
            fix="name the folder of a Qwen3.5 or Qwen3.6 checkpoint",
        )
    frames.cap_pixels_per_frame = bool(frames.cap_pixels_per_frame)  # None warns in every process
    return PillowProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=frames,
        chat_template=tokenizer.chat_template,
    )


def _has_processor(folder: str) -> bool:
    """Whether a folder has what it should be loaded from; of a name on the hub nobody knows."""
    return any((Path(folder) / name).exists() for name in PROCESSOR_FILES)
