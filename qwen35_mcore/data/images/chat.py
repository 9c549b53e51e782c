"""A conversation to tokens, the answers among them, and patches, as transformers makes them."""

from __future__ import annotations

import functools
import io
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import PIL.Image
import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers.image_utils import load_image

from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.data.images.messages import Messages, map_media, texts, videos
from qwen35_mcore.data.images.processor import load_processor
from qwen35_mcore.data.tokenizers import load_auto_tokenizer
from qwen35_mcore.errors import DataError

MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")

_START, _END, _HEADER = "<|im_start|>", "<|im_end|>", "assistant\n"
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
_BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error),
    PIL.Image.DecompressionBombError,
)
"""What Pillow raises for a file that is no image, or a damaged one."""
_REFUSALS = (*(ValueError, TypeError, ArithmeticError, LookupError, AttributeError, TemplateError),)
"""What a template or a processor raises for a conversation that it was not made for."""
_WITH_FRAMES = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")
"""Formats whose further frames are further pictures; others hold previews or layers so."""


class Encoded(NamedTuple):
    """One conversation of n tokens.

    Attributes:
        tokens: ``[n]`` int64, with a token for each of the merger's outputs.
        answers: ``[n]`` bool: the tokens that the assistant wrote, the end of its turn included.
        media: ``pixel_values`` ``[patches, patch_values]`` float32 and ``image_grid_thw``
            ``[images, 3]`` int64, the same of videos; only of what there is.
    """

    tokens: Tensor
    answers: Tensor
    media: dict[str, Tensor]


def open_image(content: bytes, name: str) -> tuple[PIL.Image.Image, str]:
    """An image as transformers loads it (turned upright, RGB), and its format, such as ``png``.

    Raises:
        DataError: it is broken, or no image.
    """
    try:
        image = PIL.Image.open(io.BytesIO(content))
        return load_image(image), (image.format or "image").lower()
    except _BROKEN as error:
        raise DataError(
            f"the image {name} cannot be opened",
            got=str(error).partition("\n")[0],
            allowed="whole files of a format that Pillow reads",
            fix="replace or remove it",
        ) from error


def check_kept(content: bytes, name: str) -> None:
    """Check that the model would see all of an image that `open_image` opens.

    Raises:
        DataError: it has several frames, of which transformers takes the first, or levels that are
            not bytes, which Pillow cuts off at 255.
    """
    image = PIL.Image.open(io.BytesIO(content))
    frames = getattr(image, "n_frames", 1) if image.format in _WITH_FRAMES else 1
    if frames > 1:
        raise DataError(
            f"the image {name} has several frames, and the model would see the first alone",
            got=f"{frames} frames",
            allowed='one; frames in files of their own are a part of type "video"',
            fix="write the frame that is meant, or each of them, to a file of its own",
        )
    if image.mode.startswith(("I", "F")):
        raise DataError(
            f"the image {name} has levels that would be cut off at 255",
            got=f"{'floating-point' if image.mode == 'F' else '16- or 32-bit'} levels",
            allowed="8 bits a channel",
            fix="scale it to 8 bits first",
        )


@functools.cache
def load_chat(name: str) -> Chat:
    """The chat format of a Hugging Face folder or name. Raises DataError: see `Chat`."""
    return Chat(name)


class Chat:
    """A model's tokenizer, chat template and image processor.

    Answers are what the template marks with ``{% generation %}``; a template without marks has to
    be ChatML, where an answer lies between ``<|im_start|>assistant`` with a line break and
    ``<|im_end|>``.

    Attributes:
        tokenizer: transformers' tokenizer.
        processor: transformers' processor; None for a text model.
        words: those of the template, among them each key of a message that it reads.

    Raises:
        DataError: the tokenizer or the processor cannot be loaded, there is no chat template, or
            answers are not to be found in what it writes.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.tokenizer = load_auto_tokenizer(name)
        if not isinstance(self.tokenizer.chat_template, str):
            raise DataError(
                f"tokenizer {name!r} has no chat template, or several",
                fix="put the model's chat_template.jinja into the folder of the tokenizer",
            )
        self.processor = load_processor(name, self.tokenizer)
        self._marked = bool(_MARKS_ANSWERS.search(self.tokenizer.chat_template))
        self.words = frozenset(re.findall(r"\w+", self.tokenizer.chat_template))
        special = [
            token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special
        ]
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self._check_template()

    def encode(
        self, messages: Messages, images: Mapping[str, PIL.Image.Image], tools: Any = None
    ) -> Encoded:
        """Tokens, answers and patches of a conversation.

        Args:
            messages: of `checked_messages`, which name their images as ``images`` does.
            images: of `open_image`.
            tools: descriptions of tools, for the template.

        Raises:
            DataError: the text holds a special token, or the template or the processor refuses the
                conversation.
        """
        for text in texts([messages, tools]):
            if found := self._special.search(text):
                raise DataError(
                    "the text of a conversation holds a special token of the model",
                    got=f"{found[0]} in {text[max(0, found.start() - 20) : found.end() + 20]!r}",
                    fix="rewrite it: the chat template alone writes special tokens",
                )
        with_images = map_media(messages, images.__getitem__)
        try:
            output = self._apply_template(with_images, tools)
        except _REFUSALS as error:
            raise DataError(
                "the chat template or the processor refuses a conversation",
                got=str(error).strip().partition("\n")[0] or type(error).__name__,
            ) from error
        tokens = output["input_ids"].flatten()
        answers = (
            torch.as_tensor(output["assistant_masks"]).flatten().bool()
            if self._marked
            else self._chatml_answers(tokens)
        )
        if not answers.any():
            raise DataError("the chat template writes no token of an answer")
        return Encoded(tokens, answers, {key: output[key] for key in MEDIA if key in output})

    def check_tower(self, vision: VisionConfig) -> None:
        """Raise DataError where patches or tokens are not those that the tower takes."""
        if self.processor is None:
            raise DataError(
                f"{self.name!r} is of a text model, and the run trains a vision tower",
                got="no preprocessor_config.json",
                fix="name the folder that the model's config.json comes from",
            )
        tower = {
            "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "image_token_id": vision.image_token_id,
            "video_token_id": vision.video_token_id,
        }
        made = [
            vars(part)[key] if key in vars(part) else getattr(part, key)
            for part in (self.processor.image_processor, self.processor.video_processor)
            for key in ("patch_size", "merge_size", "temporal_patch_size")
        ]
        ids = [self.processor.image_token_id, self.processor.video_token_id]
        expected = [*list(tower.values())[:3] * 2, *list(tower.values())[3:]]
        if made + ids != expected:
            raise DataError(
                f"the processor of {self.name!r} is not the one of the model",
                got=f"of images {made[:3]}, of videos {made[3:]}, tokens {ids}",
                allowed=", ".join(f"{key} {value}" for key, value in tower.items()),
                fix="name the folder that the model's config.json comes from",
            )

    def _apply_template(self, messages: Messages, tools: Any) -> Mapping[str, Any]:
        arguments: dict[str, Any] = {
            "tools": tools,
            "tokenize": True,
            "return_dict": True,
            "return_tensors": "pt",
            "return_assistant_tokens_mask": self._marked,
        }
        media = list(_media(messages))
        if self.processor is None:
            if media:
                raise DataError(
                    f"{self.name!r} is of a text model, and a conversation holds an image",
                    got="no preprocessor_config.json",
                    fix="name the folder of a vision-language model, or leave images out",
                )
            return self.tokenizer.apply_chat_template(messages, **arguments)
        if shown := list(videos(messages)):
            arguments["processor_kwargs"] = {
                "videos_kwargs": {
                    "do_sample_frames": False,
                    "video_metadata": [_metadata(video) for video in shown],
                }
            }
        return self.processor.apply_chat_template(messages, **arguments)

    def _chatml_answers(self, tokens: Tensor) -> Tensor:
        start, end = self.tokenizer.convert_tokens_to_ids([_START, _END])
        answers = torch.zeros_like(tokens, dtype=torch.bool)
        for at in (tokens == start).nonzero().flatten().tolist():
            ends = (tokens[at:] == end).nonzero().flatten()
            stop = at + int(ends[0]) + 1 if len(ends) else len(tokens)
            first = self._answer_begins(tokens[at + 1 : stop].tolist())
            if first is not None:
                answers[at + 1 + first : stop] = True
        return answers

    def _answer_begins(self, turn: list[int]) -> int | None:
        """Tokens of the header of an assistant's turn, but for one that reaches into the answer."""
        text = ""
        for count in range(len(turn) + 1):
            text = self.tokenizer.decode(turn[:count], skip_special_tokens=False)
            if len(text) >= len(_HEADER):
                return count - (len(text) > len(_HEADER)) if text.startswith(_HEADER) else None
        return None

    def _check_template(self) -> None:
        known = self.tokenizer.get_vocab().keys()
        probe = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        try:
            if not self._marked and not {_START, _END} <= known:
                raise DataError(f"no tokens {_START} and {_END}")
            encoded = self.encode(probe, {})
            answer = self.tokenizer.decode(encoded.tokens[encoded.answers])
        except DataError as error:
            answer = str(error)
        if "2" not in answer or "1" in answer:
            raise DataError(
                f"the chat template of {self.name!r} does not show what the assistant wrote",
                got=answer,
                allowed="ChatML (<|im_start|>assistant ... <|im_end|>), or a template that puts "
                "answers between {% generation %} and {% endgeneration %}",
                fix="add the marks to the template",
            )


def _media(messages: Messages) -> Iterator[Any]:
    found: list[Any] = []
    map_media(messages, found.append)
    yield from found


def _metadata(video: dict[str, Any]) -> dict[str, Any]:
    count = len(video["video"])
    return {"total_num_frames": count, "fps": video["fps"], "frames_indices": list(range(count))}
