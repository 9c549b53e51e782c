"""Conversations about pictures that scikit-learn ships, and a small processor in Qwen3.5's form."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

Messages = list[dict[str, Any]]

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
PATCH, MERGE = 4, 2

CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{- content -}}{%- elif content -%}
{%- for part in content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- if tools -%}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' -}}{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' -%}
ANSWER{{- render(message.content) + '<|im_end|>' -}}END{{- '\\n' -}}
{%- else -%}{{- render(message.content) + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""ChatML as Qwen3.5 writes it, without thoughts; what stands for ANSWER and END marks answers."""


def chat_template(marked: bool) -> str:
    """The template, with or without ``{% generation %}``."""
    marks = ("{%- generation -%}", "{%- endgeneration -%}") if marked else ("", "")
    return CHAT_TEMPLATE.replace("ANSWER", marks[0]).replace("END{{", f"{marks[1]}{{{{")


def make_processor(
    folder: Path, *, images: bool = True, marked: bool = False, template: str | None = None
) -> Path:
    """What a published folder has for its texts and images; without ``images`` for texts alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([CHAT_TEMPLATE, "Which digit is this? It is a"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = chat_template(marked) if template is None else template
    tokenizer.save_pretrained(folder)
    if images:
        config = {
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "merge_size": MERGE,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "size": {"shortest_edge": 64, "longest_edge": 4096},
            "processor_class": "Qwen3VLProcessor",
        }
        for name, kind in (
            ("preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessorFast"}),
            ("video_preprocessor_config.json", {"video_processor_type": "Qwen3VLVideoProcessor"}),
        ):
            (folder / name).write_text(json.dumps(config | kind))
    return folder


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 pictures of 8 x 8 grey levels from 0 to 16, and what they show."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return loaded.images, loaded.target


def save_digit(path: Path, number: int, size: tuple[int, int] = (16, 16)) -> Path:
    """A picture of width and height ``size``; the type by the suffix of ``path``."""
    levels = (digits()[0][number] * 15.9).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(levels).convert("RGB").resize(size).save(path)
    return path


def ask(number: int, *images: str, text: str = "Which digit is this?") -> Messages:
    """A question with images, and its answer."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": text}]},
        {"role": "assistant", "content": f"It is a {digits()[1][number]}."},
    ]


def write_conversations(path: Path, conversations: list[Messages], **more: Any) -> Path:
    """One line each, with further keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"messages": messages, **more}) for messages in conversations)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_digits(folder: Path, count: int) -> Path:
    """Conversations of every kind about ``count`` digits: with one image, two, frames, and none."""
    conversations = []
    for number in range(count):
        size = (8 * (1 + number % 3), 8 * (1 + number % 2))
        name = save_digit(folder / f"pictures/{number}.png", number, size).relative_to(folder)
        kind = number % 4
        if kind == 0:
            messages = ask(number, str(name))
        elif kind == 1:
            messages = ask(number, str(name), f"pictures/{number - 1}.png")
        elif kind == 2:
            frames = {"type": "video", "video": [str(name)] * 3, "fps": 2}
            messages = ask(number)
            messages[0]["content"].insert(0, frames)
        else:
            messages = ask(number, text="Say a digit. " * (1 + number % 5))
            messages = [{"role": "system", "content": f"Number {number}."}, *messages, *messages]
        conversations.append(messages)
    return write_conversations(folder / "corpus.jsonl", conversations)
