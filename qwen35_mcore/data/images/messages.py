"""Conversations as transformers' chat templates take them: what is allowed, and their images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from qwen35_mcore.errors import DataError

Messages = list[dict[str, Any]]

ALLOWED = (
    '[{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": '
    '"What is this?"}]}, {"role": "assistant", "content": "A cat."}]'
)

_KEYS = {
    "image": ("type", "image", "path", "url"),
    "video": ("type", "video", "path", "url", "fps"),
}
_OTHER_PICTURES = (
    *("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width"),
    *("nframes", "min_frames", "max_frames", "video_start", "video_end"),
)
"""Keys of Qwen's own tools (qwen_vl_utils) for one picture."""
_COUNTED = {"weight": 1, "loss": True, "train": True, "training": True, "masked": False}
"""Keys of other trainers that say whether an answer counts in the loss, and the value for yes."""


def checked_messages(given: Any) -> Messages:
    """Messages with every image and frame as a path: ``{"type": "image", "image": PATH}`` and
    ``{"type": "video", "video": [PATH, ...], "fps": NUMBER}``.

    Raises:
        DataError: they are not as chat templates take them, name no file of this machine, or hold
            no answer of the assistant.
    """
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        raise DataError(
            "messages must be a list of objects", got=type(given).__name__, allowed=ALLOWED
        )
    messages = [_message(message) for message in given]
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            "there is no answer to train on",
            got=f"roles {', '.join(message['role'] for message in messages) or 'none'}",
            allowed="at least one message of the role assistant",
        )
    return messages


def map_media(messages: Messages, function: Callable[[Any], Any]) -> Messages:
    """The same messages with ``function`` of every image and frame in its place, in order."""
    return [
        message
        if not isinstance(message.get("content"), list)
        else message | {"content": [_mapped(part, function) for part in message["content"]]}
        for message in messages
    ]


def videos(messages: Messages) -> Iterator[dict[str, Any]]:
    """The parts that are videos, in order."""
    for message in messages:
        if isinstance(message.get("content"), list):
            yield from (part for part in message["content"] if part["type"] == "video")


def texts(value: Any) -> Iterator[str]:
    """Every string in messages or tools, keys too: a template can write them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for pair in value.items() for part in pair for text in texts(part))
    elif isinstance(value, list):
        yield from (text for each in value for text in texts(each))


def unread_keys(messages: Messages, words: Collection[str]) -> Iterator[str]:
    """Keys that nothing reads, of messages that `checked_messages` takes, such as
    ``messages.name``.

    Args:
        messages: as the user wrote them.
        words: of the chat template.
    """
    for message in messages:
        yield from (f"messages.{key}" for key in message if key not in words)
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else ():
            known = _KEYS.get(part["type"], words)
            yield from (f"{part['type']}.{key}" for key in part if part[key] and key not in known)


def _message(message: dict[str, Any]) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise DataError("a message needs a role", got=role, allowed=ALLOWED)
    if role == "assistant":
        _check_counted(message)
    if content is None or isinstance(content, str):
        return message
    if not isinstance(content, list):
        raise DataError(
            "content must be a string or a list of parts",
            got=type(content).__name__,
            allowed=ALLOWED,
        )
    parts = [_part(part) for part in content]
    if role == "assistant" and any(part["type"] != "text" for part in parts):
        raise DataError(
            "an answer holds an image: the model writes text alone",
            fix="put the image into a message of another role",
        )
    return message | {"content": parts}


def _check_counted(message: dict[str, Any]) -> None:
    """Refuse an answer that other trainers' keys take out of the loss."""
    for key, counted in _COUNTED.items():
        if message.get(key, counted) not in (counted, None):
            raise DataError(
                "an answer asks for another weight in the loss than the others have",
                got=f"{key} {message[key]!r}",
                allowed=f"{key} {counted!r}, or no such key: every answer is trained on",
                fix="remove the key to train on it, or leave the conversation out",
            )


def _part(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("image", "video"):
        _refuse_other_pictures(part)
    if kind == "text" and isinstance(part.get("text"), str):
        return dict(part)
    if kind == "image":
        return {"type": "image", "image": _path(_only(part, "image"))}
    if kind == "video":
        return _video(part)
    raise DataError(
        "a part of a message is not one that chat templates take",
        got=repr(part)[:200],
        allowed='{"type": "text", "text": ...}, {"type": "image", "image": PATH} or '
        '{"type": "video", "video": [PATH, ...], "fps": NUMBER}',
    )


def _refuse_other_pictures(part: dict[str, Any]) -> None:
    asked = [key for key in _OTHER_PICTURES if part.get(key)]
    if asked:
        raise DataError(
            f"a part of type {part['type']} asks for another size or choice than the processor's",
            got=", ".join(f"{key} {part[key]!r}" for key in asked),
            allowed="the sizes of preprocessor_config.json, and every frame of a list",
            fix="change the files and remove the keys, or set the sizes in the processor's folder",
        )


def _only(part: dict[str, Any], kind: str) -> Any:
    """What a part names, under any of transformers' keys."""
    named = [part[key] for key in (kind, "path", "url") if part.get(key) is not None]
    if len(named) != 1:
        raise DataError(
            f"a part of type {kind} must name one file",
            got=f"keys {', '.join(part)}",
            allowed=f"one of the keys {kind}, path and url",
        )
    return named[0]


def _path(value: Any) -> str:
    if not isinstance(value, str) or "://" in value or value.startswith("data:"):
        raise DataError(
            "an image is not the path of a file",
            got=repr(value)[:200],
            allowed="a path, relative to the jsonl file or to --image-root",
            fix="download or write it to a file first",
        )
    return value


def _video(part: dict[str, Any]) -> dict[str, Any]:
    frames, fps = _only(part, "video"), part.get("fps")
    if not isinstance(frames, list) or len(frames) < 2:
        raise DataError(
            "a video must be a list of its frames",
            got=repr(frames)[:200],
            allowed="the paths of two or more images",
            fix="write the frames that the model is to see to files first",
        )
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1e6:
        raise DataError(
            "a video needs fps: the model reads the time of every frame",
            got=fps,
            allowed="frames of the list per second, such as 2",
        )
    return {"type": "video", "video": [_path(frame) for frame in frames], "fps": fps}


def _mapped(part: dict[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    if part["type"] == "image":
        return part | {"image": function(part["image"])}
    if part["type"] == "video":
        return part | {"video": [function(frame) for frame in part["video"]]}
    return part
