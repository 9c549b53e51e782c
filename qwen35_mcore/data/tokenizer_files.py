"""Which files of a Hugging Face folder are its tokenizer's."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

GENERATION_CONFIG = "generation_config.json"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_PATTERNS = (
    *("tokenizer*.json", "vocab*.json", "vocab*.txt", "merges*.txt", "tekken.json"),
    *("special_tokens_map.json", "added_tokens.json"),
    *("chat_template*.jinja", "chat_template*.json", "additional_chat_templates/*.jinja"),
    *("*.model", "*.tiktoken", "*.vocab", "tokenization_*.py"),
)

PROCESSOR_FILES = (
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
)
"""What a vision-language model has beside its tokenizer."""


def is_tokenizer_file(name: str) -> bool:
    """Whether a file, by its name relative to the model's folder, belongs to the tokenizer."""
    return any(fnmatchcase(name, pattern) for pattern in _PATTERNS)


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The tokenizer's files of a folder by relative name; empty where there is none."""
    files = (path for depth in ("*", "*/*") for path in sorted(folder.glob(depth)))
    named = {str(path.relative_to(folder)): path for path in files if path.is_file()}
    return {name: path for name, path in named.items() if is_tokenizer_file(name)}
