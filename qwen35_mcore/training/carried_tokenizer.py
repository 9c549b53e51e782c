"""The tokenizer that made the data, kept beside the checkpoints for the export.

A folder ``qwen35-tokenizer-*`` holds the tokenizer's files and a generation_config.json with its
special ids; of a run of conversations also the files of the image processor. Its name is the string
``qwen35_tokenizer`` in the checkpoint's arguments.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.data import BYTE, Sidecar, read_sidecar
from qwen35_mcore.data.tokenizer_files import (
    GENERATION_CONFIG,
    PROCESSOR_FILES,
    SPECIAL_IDS,
    tokenizer_files,
)
from qwen35_mcore.training.carried_files import store, take_over
from qwen35_mcore.training.checks.checkpoint import Start
from qwen35_mcore.training.checks.data import dataset_prefixes

_CHANGING_FLAGS = ("special_tokens", "vocab_file", "merge_file", "chat_template")
"""Flags with which megatron's tokenizer is another than the one in the files."""

_MODULE = "tokenization_as_saved"
_CODE = '''"""The tokenizer of tokenizer.json as it is, not as the model's type would rebuild it."""

from transformers import PreTrainedTokenizerFast


class AsSaved(PreTrainedTokenizerFast):
    pass
'''


def carry_tokenizer(
    args: Namespace, model_config: Qwen35Config, start: Start | None, built: Any
) -> None:
    """Keep the run's Hugging Face tokenizer in ``--save``, and name it in the checkpoints.

    The tokenizer that made the data wins over the one of the checkpoint that the run starts from;
    where they give the same ids, what that checkpoint has stays as it is.

    Args:
        built: megatron's tokenizer.
    """
    args.qwen35_tokenizer = ""
    if not args.save or args.rank != 0:
        return
    save, tokenizer = Path(args.save), _of_the_run(args, built)
    name, before = _of_the_start(start)
    if tokenizer is None:
        args.qwen35_tokenizer = name
        sidecar = _sidecar(args)
        if before is not None and sidecar is not None and sidecar.tokenizer == BYTE:
            print(
                "tokenizer: the data were made by the byte tokenizer, which has no files; the "
                "export will hold the tokenizer of the checkpoint that the run starts from",
                flush=True,
            )
    elif before is not None and same_ids(_loaded(before), tokenizer):
        args.qwen35_tokenizer = name
    else:
        args.qwen35_tokenizer = name = _name(tokenizer)
        if before is not None:
            print(
                f"tokenizer: the data were made by {tokenizer.name_or_path}, another one than the "
                "tokenizer of the checkpoint that the run starts from; the export will hold the "
                "data's",
                flush=True,
            )
        known = {} if before is not None else model_config.carried
        store(name, save, partial(_write, tokenizer, args, model_config, known))
    if start is not None and name:
        take_over(name, start.folder.parent, save)


def same_ids(one: Any, other: Any) -> bool:
    """Whether two transformers tokenizers, or None, turn text into the same ids."""
    if one is None or other is None or one.get_vocab() != other.get_vocab():
        return False
    if not (one.is_fast and other.is_fast):
        return bool(type(one) is type(other))
    return _rules(one) == _rules(other)


def _rules(tokenizer: Any) -> list[Any]:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = ("model", "pre_tokenizer", "normalizer", "added_tokens")
    return [_deciding(content[part]) for part in parts]


def _deciding(value: Any) -> Any:
    """A rule without what does not change ids, in one spelling of what is off."""
    if isinstance(value, dict):
        kept = {key: one for key, one in value.items() if key not in ("trim_offsets", "special")}
        return {key: _deciding(one) for key, one in kept.items() if one or one == 0}
    return [_deciding(one) for one in value] if isinstance(value, list) else value


def _of_the_run(args: Namespace, built: Any) -> Any:
    """The transformers tokenizer that megatron built, or else the one that made the data."""
    from transformers import PreTrainedTokenizerBase

    while built is not None and not isinstance(built, PreTrainedTokenizerBase):
        built = getattr(built, "_tokenizer", None) or getattr(built, "tokenizer", None)
    return built if built is not None else _of_the_data(args)


def _of_the_data(args: Namespace) -> Any:
    """For flags that name no tokenizer of Hugging Face's although the data's sidecar does."""
    sidecar = _sidecar(args)
    flags = sidecar.megatron_flags() if sidecar is not None else []
    if "--tokenizer-model" not in flags:
        return None
    named = flags[flags.index("--tokenizer-model") + 1]
    tokenizer = _loaded(named)
    if tokenizer is None:
        print(f"tokenizer: {named}, which made the data, is not here to be kept", flush=True)
    return tokenizer


def _sidecar(args: Namespace) -> Sidecar | None:
    prefixes = dataset_prefixes(args)
    return read_sidecar(prefixes[0]) if prefixes else None


def _of_the_start(start: Start | None) -> tuple[str, Path | None]:
    """Name and place of the tokenizer that the run finds; an import has it without a name."""
    if start is None:
        return "", None
    beside = start.folder.parent
    if start.tokenizer and (beside / start.tokenizer).is_dir():
        return start.tokenizer, beside / start.tokenizer
    imported = beside / start.carried / "files"
    return "", imported if start.carried and tokenizer_files(imported) else None


def _loaded(folder: Path | str) -> Any:
    """The transformers tokenizer of a folder or a cached name; None where it cannot be loaded."""
    from transformers import AutoTokenizer

    with contextlib.suppress(Exception):  # the Rust library raises bare Exception
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    return None


def _name(tokenizer: Any) -> str:
    rules = _rules(tokenizer) if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    content = [rules, tokenizer.special_tokens_map, tokenizer.chat_template]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
    return f"qwen35-tokenizer-{digest.hexdigest()[:12]}"


def _write(
    tokenizer: Any, args: Namespace, model_config: Qwen35Config, known: dict[str, Any], folder: Path
) -> None:
    """Write files of which transformers makes the same tokenizer beside this model's config."""
    folder.mkdir()
    config = folder / "config.json"
    config.write_text(json.dumps(model_config.to_hf()))
    if not any(same_ids(_loaded(folder), tokenizer) for _ in _attempts(tokenizer, args, folder)):
        print(
            f"tokenizer: transformers does not load {tokenizer.name_or_path} as it is beside a "
            "config of Qwen3.5; in the exported folder load it with PreTrainedTokenizerFast",
            flush=True,
        )
    config.unlink()
    source = _folder_of(tokenizer.name_or_path)
    if args.image_data and source is not None:
        for path in (source / name for name in PROCESSOR_FILES):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    ids = {name: known.get(name, getattr(tokenizer, name)) for name in SPECIAL_IDS}
    ids = {name: value for name, value in ids.items() if value is not None}
    if ids:
        (folder / GENERATION_CONFIG).write_text(json.dumps(ids, indent=2) + "\n")


def _attempts(tokenizer: Any, args: Namespace, folder: Path) -> Iterator[None]:
    """Write the files byte for byte, then as transformers saves them, then with a class named."""
    source = _folder_of(tokenizer.name_or_path)
    if source is not None and not any(getattr(args, flag, None) for flag in _CHANGING_FLAGS):
        for name, path in tokenizer_files(source).items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
        yield
    _name_class(folder)
    yield
    tokenizer.save_pretrained(folder)
    _name_class(folder)
    yield


def _folder_of(name: str) -> Path | None:
    """Where the files of a tokenizer lie: its folder, or that of the Hub's cache."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    from huggingface_hub import snapshot_download

    with contextlib.suppress(Exception):  # not in the cache, or not a name of the Hub
        return Path(snapshot_download(name, local_files_only=True))
    return None


def _name_class(folder: Path) -> None:
    """Have transformers load tokenizer.json as it is.

    Beside a config of a Qwen3.5 it builds Qwen's own tokenizer from the vocabulary, whatever class
    the files name; only a class that comes with code of its own turns that off, and then the named
    class is loaded, also where that code is not trusted.
    """
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    content["tokenizer_class"] = "TokenizersBackend"
    content["auto_map"] = {"AutoTokenizer": [None, f"{_MODULE}.AsSaved"]}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    (folder / f"{_MODULE}.py").write_text(_CODE)
