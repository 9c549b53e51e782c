"""Whether the datasets and the tokenizer that the flags name can train the model."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.data import IndexFile, check_dataset, check_ids, read_index, read_sidecar
from qwen35_mcore.data.token_ids import LOOKED_AT
from qwen35_mcore.errors import ConfigError, DataError
from qwen35_mcore.training.checks.data_flags import dataset_prefixes, split_data
from qwen35_mcore.training.checks.samples import check_samples

TOKENIZER_ADVICE = (
    "pass --tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER, or for byte or mock data "
    "--tokenizer-type NullTokenizer --vocab-size N"
)


def check_datasets(args: Namespace, model_config: Qwen35Config) -> None:
    """Check that every dataset is there, whole, of this vocabulary, and enough for the run.

    The ids of datasets without a sidecar are looked at, at most about 1 GiB of them: see
    `check_ids`. `check_batch` looks at the rest while the run reads it.

    Raises:
        DataError: with the first problem.
    """
    data = split_data(args)
    indexes = _indexes(dataset_prefixes(args), model_config.vocab_size)
    check_samples(args, data, indexes)
    foreign = [index for prefix, index in indexes.items() if read_sidecar(prefix) is None]
    for index in foreign:
        check_ids(index, vocab_size=model_config.vocab_size, budget=LOOKED_AT // len(foreign))


def _indexes(prefixes: list[str], vocab_size: int) -> dict[str, IndexFile]:
    for prefix in prefixes:
        check_dataset(prefix, vocab_size=vocab_size)
    return {prefix: read_index(prefix) for prefix in prefixes}


def check_batch(tokens: Any, labels: Any, vocab_size: int) -> None:
    """Refuse a batch on the host that a device would fail on without saying why.

    Args:
        tokens, labels: int64 tensors of any shape; None where the batch has none. Those on a
            device are passed over: with one graph of the step the batch was checked before it was
            copied there (`mcore.patches.captured_step`).
        vocab_size: rows of the model's embedding.

    Raises:
        DataError: an id outside ``0 .. vocab_size - 1``.
    """
    for ids in (tokens, labels):
        if ids is None or ids.is_cuda:
            continue
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise DataError(
                "a batch holds an id that the model does not have",
                got=low if low < 0 else high,
                allowed=f"0 to {vocab_size - 1}, the model's vocab_size less one",
                fix="find the dataset whose PREFIX.json is missing or whose .bin was changed, and "
                "tokenize it with the model's own tokenizer",
            )


def check_tokenizer_flags(args: Namespace) -> None:
    """Check that the flags say which tokenizer to load, after a sidecar's was filled in.

    Raises:
        DataError: none is named, or the one named is not there or lacks what it needs.
    """
    if args.tokenizer_type is None:
        prefixes = dataset_prefixes(args)
        raise DataError(
            "the run needs a tokenizer"
            + (f", and {prefixes[0]}.json, which would name it, is missing" if prefixes else ""),
            fix=TOKENIZER_ADVICE,
        )
    if args.tokenizer_type == "NullTokenizer" and args.vocab_size is None:
        raise DataError(
            "the null tokenizer needs the number of its ids",
            got="--tokenizer-type NullTokenizer",
            fix="pass --vocab-size N: 257 for byte data, or the model's vocab_size",
        )
    if args.tokenizer_type != "HuggingFaceTokenizer":
        return
    if args.tokenizer_model is None:
        raise DataError(
            "a Hugging Face tokenizer needs its folder or name",
            got="--tokenizer-type HuggingFaceTokenizer",
            fix="pass --tokenizer-model FOLDER, or a name on the Hugging Face hub",
        )
    name = args.tokenizer_model
    folder = Path(name).expanduser()
    if name.startswith((".", "~", "/")) and not folder.is_dir():
        raise DataError(
            "the tokenizer's folder does not exist" + named_by(args),
            got=name,
            allowed="a folder with tokenizer.json and tokenizer_config.json, or a name on the hub",
            fix="put the folder there, or name another: " + TOKENIZER_ADVICE,
        )


def named_by(args: Namespace) -> str:
    """For messages: which sidecar named the tokenizer, if one did."""
    sidecar = getattr(args, "qwen35_tokenizer_sidecar", None)
    return f" (named by {sidecar})" if sidecar else ""


def tokenizer_error(args: Namespace, error: ConfigError) -> ConfigError:
    """megatron's refusal of its arguments, or what is wrong with the tokenizer if it is that."""
    if args.tokenizer_type != "HuggingFaceTokenizer" or "AutoTokenizer" not in error.what:
        return error
    return ConfigError(
        "the tokenizer could not be loaded" + named_by(args),
        got=f"{args.tokenizer_model}: {error.what.partition('Exception: ')[2]}",
        allowed="a folder with tokenizer.json and tokenizer_config.json, or a name on the hub",
        fix="name another: " + TOKENIZER_ADVICE,
    )


def check_tokenizer(args: Namespace, model_config: Qwen35Config, tokenizer: Any) -> None:
    """Check the tokenizer that megatron built against the model and the datasets.

    Raises:
        DataError: it has more ids than the model, no end of document where the loss needs one, or
            datasets end documents with another one.
    """
    if tokenizer.vocab_size > model_config.vocab_size:
        raise DataError(
            "the tokenizer is larger than the model's vocabulary" + named_by(args),
            got=f"{args.tokenizer_model or args.tokenizer_type} with {tokenizer.vocab_size} ids",
            allowed=f"at most {model_config.vocab_size}",
            fix="use the model's own tokenizer, or choose a model with this vocabulary",
        )
    eod = getattr(tokenizer, "eod", None)
    if eod is None and args.eod_mask_loss:
        raise DataError(
            "--eod-mask-loss needs a tokenizer with an end of document" + named_by(args),
            got=f"{args.tokenizer_model or args.tokenizer_type} without one",
            fix="set eos_token in its tokenizer_config.json, or drop --eod-mask-loss",
        )
    for prefix in dataset_prefixes(args):
        if read_sidecar(prefix) is not None:
            check_dataset(prefix, vocab_size=model_config.vocab_size, eod_id=eod)
