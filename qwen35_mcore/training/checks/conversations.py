"""Whether the conversations that the flags name can be read, and as the model wants them."""

from __future__ import annotations

from argparse import Namespace

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.data.images.loader import check_folder
from qwen35_mcore.errors import DataError


def check_conversations(args: Namespace, model_config: Qwen35Config) -> None:
    """Check the folders of ``--image-data`` and the model's processor.

    Raises:
        ConfigError: the extra ``vision`` is not installed.
        DataError: a folder is no dataset, or has too few samples for the ranks and their workers;
            the run evaluates and has nothing to evaluate on; or the processor cannot be loaded or
            is not the tower's.
    """
    if not args.image_data:
        return
    import qwen35_mcore.mcore.energon  # noqa: F401  # is the extra there?
    from qwen35_mcore.data.images.chat import load_chat

    parallel = (
        args.tensor_model_parallel_size
        * args.pipeline_model_parallel_size
        * args.context_parallel_size
    )
    readers = max(1, args.world_size // parallel) * max(1, args.num_workers)
    check_folder(args.image_data, "train", readers)
    if args.image_valid_data:
        check_folder(args.image_valid_data, "val", readers)
    elif args.eval_iters:
        _check_validation(args, readers)
    chat = load_chat(args.tokenizer_model)
    if args.qwen35_vision:
        chat.check_tower(VisionConfig.of(model_config))


def _check_validation(args: Namespace, readers: int) -> None:
    try:
        check_folder(args.image_data, "val", readers)
    except DataError as error:
        raise DataError(
            "the run evaluates and has too few validation data",
            got=f"--eval-iters {args.eval_iters}; {error.what}: {error.got}",
            fix="pass --image-valid-data FOLDER or --eval-iters 0, or make the data with a share "
            "for validation: `qwen35 data images --split 99,1,0`",
        ) from error
