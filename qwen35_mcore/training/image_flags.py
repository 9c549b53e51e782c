"""Flags of a run with images: the vision-language model, what of it is trained, and its data.

`--image-data` reads conversations, which `qwen35 data images` wrote. They need no image, so it also
trains a text model, on answers alone.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from qwen35_mcore.data.tokenizer_files import tokenizer_files
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.model.vision.freeze import PARTS

TEXT_DATA = (
    *("data_path", "data_args_path", "per_split_data_args_path", "mock_data"),
    *("train_data_path", "valid_data_path", "test_data_path"),
)
_OF_TEXT_DATA = {
    "split": "the folder says which samples are for validation",
    "dataloader_inter_document_masking": "--pack-samples packs and keeps samples apart",
    "eod_mask_loss": "answers alone are trained on, and their ends belong to them",
    "full_validation": "an evaluation reads --eval-iters microbatches",
    "multiple_validation_sets": "there is one validation set",
    "data_cache_path": "nothing is cached",
    "dataloader_type": "samples are shuffled, and repeated without end",
    "use_megatron_fsdp": "its checkpoints do not hold the position in the data",
}
"""Flags that conversations do not read, and why."""


def add_image_arguments(parser: ArgumentParser) -> None:
    """Add the flags, all of them off by default."""
    group = parser.add_argument_group(title="images")
    group.add_argument(
        "--vision",
        action="store_true",
        dest="qwen35_vision",
        help="Train the vision-language model. Without this flag the text model is trained, and "
        "the vision tower of a checkpoint is carried along unchanged.",
    )
    group.add_argument(
        "--freeze",
        nargs="+",
        choices=PARTS,
        default=[],
        help="With --vision, parts that are not trained: they have neither gradients nor optimizer "
        "state. language: all but the tower. vision: the tower without the merger. merger.",
    )
    group.add_argument(
        "--image-data",
        metavar="FOLDER",
        help="Conversations that `qwen35 data images` wrote, or an Energon metadataset (.yaml) "
        "that blends several. A sample without images is as good: without --vision it trains the "
        "text model on answers.",
    )
    group.add_argument(
        "--image-valid-data",
        metavar="FOLDER",
        help="The same, for validation. Without this flag, the validation part of --image-data.",
    )
    group.add_argument(
        "--pack-samples",
        action="store_true",
        help="With --image-data, put several samples into a sequence, each of which attends to "
        "itself alone. Without this flag a sequence is one sample, and the rest of it padding.",
    )
    group.add_argument(
        "--bad-samples",
        choices=("error", "skip"),
        default="error",
        help="With --image-data, what a sample does that cannot be used, as one with an image that "
        "does not open or with more tokens than a sequence: end the run, or be left out with a "
        "warning and counted.",
    )


def complete_image_flags(args: Namespace, hf_config: str | None) -> None:
    """Check these flags among themselves and fill in what follows from them.

    Args:
        hf_config: the config.json of the model, or its folder, where one was named: the folder may
            hold the processor, too.

    Raises:
        ConfigError: a flag without the one that it belongs to, everything frozen, a flag of text
            data beside ``--image-data``, or no processor.
    """
    args.freeze = [part for part in PARTS if part in args.freeze]
    _check_freeze(args)
    if not args.image_data:
        _check_without_data(args)
        return
    _check_beside_data(args)
    args.tokenizer_type = "HuggingFaceTokenizer"
    args.tokenizer_model = args.tokenizer_model or _processor(hf_config)
    args.dataloader_type = "external"
    args.dataloader_inter_document_masking = args.pack_samples


def _check_freeze(args: Namespace) -> None:
    if args.freeze and not args.qwen35_vision:
        raise ConfigError(
            "--freeze is for the vision-language model, and this run trains the text model whole",
            got=f"--freeze {' '.join(args.freeze)}",
            fix="pass --vision as well, or drop --freeze",
        )
    if len(args.freeze) == len(PARTS):
        raise ConfigError(
            "--freeze leaves nothing to train",
            got=f"--freeze {' '.join(args.freeze)}",
            allowed=f"one or two of {', '.join(PARTS)}",
            fix="leave one out",
        )


def _check_without_data(args: Namespace) -> None:
    if args.qwen35_vision:
        raise ConfigError(
            "--vision trains on images, and the flags name none",
            got="--vision without --image-data",
            fix="pass --image-data FOLDER, or drop --vision: a tower is then carried along",
        )
    given = [
        flag
        for flag, on in (
            ("--image-valid-data", args.image_valid_data),
            ("--pack-samples", args.pack_samples),
            ("--bad-samples", args.bad_samples != "error"),
        )
        if on
    ]
    if given:
        raise ConfigError(
            f"{given[0]} needs --image-data",
            got="no --image-data",
            fix=f"pass --image-data FOLDER, or drop {given[0]}",
        )


def _check_beside_data(args: Namespace) -> None:
    sources = [_flag(name) for name in TEXT_DATA if getattr(args, name)]
    if sources:
        raise ConfigError(
            "the flags name text and conversations to train on",
            got=" ".join(["--image-data", *sources]),
            fix=f"drop {sources[0]}: `qwen35 data images` also takes conversations without images",
        )
    for name, why in _OF_TEXT_DATA.items():
        if getattr(args, name):
            raise ConfigError(
                f"{_flag(name)} is for text data, and does nothing with --image-data: {why}",
                got=_flag(name),
                fix=f"drop {_flag(name)}",
            )
    if args.tokenizer_type not in (None, "HuggingFaceTokenizer"):
        raise ConfigError(
            "conversations are encoded with the model's own tokenizer and chat template",
            got=f"--tokenizer-type {args.tokenizer_type}",
            allowed="--tokenizer-type HuggingFaceTokenizer",
            fix="drop --tokenizer-type, and name the model's folder with --tokenizer-model",
        )


def _processor(hf_config: str | None) -> str:
    """The folder of the model, where it has a tokenizer."""
    path = Path(hf_config) if hf_config else None
    folder = path.parent if path is not None and path.is_file() else path
    if folder is None or not tokenizer_files(folder):
        raise ConfigError(
            "--image-data needs the model's tokenizer, chat template and image processor",
            got=f"no tokenizer in {folder}" if folder else "no folder of the model",
            fix="pass --tokenizer-model FOLDER: the model's Hugging Face folder, or its name",
        )
    return str(folder)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
