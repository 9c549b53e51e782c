"""Which tokenizer an export writes: the one of the run's data, or else the original's."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint_tools.hf.carried import Carried
from qwen35_mcore.data.tokenizer_files import (
    GENERATION_CONFIG,
    PROCESSOR_FILES,
    SPECIAL_IDS,
    is_tokenizer_file,
    tokenizer_files,
)


@dataclass(frozen=True, kw_only=True)
class OtherFiles:
    """The files that an export writes beside weights and config."""

    paths: dict[str, Path]
    """By relative name."""
    special_ids: dict[str, int] = field(default_factory=dict)
    """What config.json must say where the run brought its own tokenizer."""
    note: str | None = None
    """For the user: why there is no tokenizer among them."""


def other_files_of(
    carried: Carried | None, folder: Path | None, tokenizer_type: str | None, *, by_reference: bool
) -> OtherFiles:
    """Find the files of an export.

    Args:
        folder: where the run keeps the tokenizer of its data, None where it kept none.
        tokenizer_type: Megatron's name for what the run's data were read with.
        by_reference: whether `carried` is of a folder that the user named to supply the tokenizer.
    """
    paths = dict(carried.files) if carried is not None else {}
    paths.pop("config.json", None)
    given = any(map(is_tokenizer_file, paths))
    if folder is None or (by_reference and given):
        return OtherFiles(paths=paths, note=None if given else _no_tokenizer(tokenizer_type))
    found = tokenizer_files(folder)
    paths = {other: path for other, path in paths.items() if not _replaced(other)}
    if not found:
        return OtherFiles(
            paths=paths,
            note=f"no tokenizer: the run's own is not in {folder}; copy that folder there from the "
            "run and export again, or name a model's folder with --reference HF_DIR",
        )
    ids: dict[str, int] = {}
    if (folder / GENERATION_CONFIG).is_file():
        found[GENERATION_CONFIG] = folder / GENERATION_CONFIG
        content = json.loads(found[GENERATION_CONFIG].read_text())
        ids = {key: content[key] for key in SPECIAL_IDS if key in content}
    found |= {name: folder / name for name in PROCESSOR_FILES if (folder / name).is_file()}
    return OtherFiles(paths=paths | found, special_ids=ids)


def set_special_ids(config: dict[str, Any], ids: dict[str, int]) -> None:
    """Put the tokenizer's ids into a config.json, where transformers looks for the text's."""
    text = config.get("text_config", config)
    for name, value in ids.items():
        for level in (text, config):
            if level is text or name in level:
                level[name] = value


def _replaced(name: str) -> bool:
    return is_tokenizer_file(name) or name == GENERATION_CONFIG


def _no_tokenizer(kind: str | None) -> str:
    had = f"the run had {kind}, which has no files of Hugging Face's" if kind else "none was kept"
    return (
        f"no tokenizer: {had}; AutoTokenizer does not work on this folder until you add a "
        "tokenizer's files, or name a model's folder with --reference HF_DIR"
    )
