"""A conversation becomes the tokens and patches that transformers makes, its answers marked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.data.images.chat import Chat, Encoded, open_image
from qwen35_mcore.data.images.messages import Messages, checked_messages, map_media
from qwen35_mcore.errors import DataError
from tests.helpers.conversations import ask, chat_template, make_processor, save_digit


@pytest.fixture(scope="module")
def chat(processor: Path) -> Chat:
    return Chat(str(processor))


def encode(chat: Chat, messages: Messages, root: Path, **options: Any) -> Encoded:
    paths: list[str] = []
    messages = checked_messages(messages)
    map_media(messages, paths.append)
    images = {path: open_image((root / path).read_bytes(), path)[0] for path in paths}
    return chat.encode(messages, images, **options)


def answers(chat: Chat, encoded: Encoded) -> list[str]:
    """What each run of answer tokens says."""
    marked = encoded.answers.tolist()
    begins = [i for i, here in enumerate(marked) if here and not (i and marked[i - 1])]
    runs = [encoded.tokens[i:][: [*marked[i:], False].index(False)] for i in begins]
    return [chat.tokenizer.decode(run) for run in runs]


def image_processor(processor: Path) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_pretrained(processor)


def test_images_are_what_transformers_makes(chat: Chat, processor: Path, tmp_path: Path) -> None:
    """Two images, one of them resized, in one message."""
    sizes = [(16, 24), (37, 21)]
    paths = [save_digit(tmp_path / f"{n}.png", n, size) for n, size in enumerate(sizes)]
    encoded = encode(chat, ask(3, "0.png", "1.png"), tmp_path)
    pictures = [PIL.Image.open(path).convert("RGB") for path in paths]
    expected = image_processor(processor)(pictures, return_tensors="pt")
    assert encoded.media.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(encoded.media[key], value), key
    text = (
        "<|im_start|>user\n"
        + "".join(
            f"<|vision_start|>{'<|image_pad|>' * (int(grid.prod()) // 4)}<|vision_end|>"
            for grid in expected["image_grid_thw"]
        )
        + "Which digit is this?<|im_end|>\n<|im_start|>assistant\nIt is a 3.<|im_end|>\n"
    )
    assert encoded.tokens.tolist() == chat.tokenizer(text)["input_ids"]
    assert encoded.tokens.dtype == torch.int64
    assert answers(chat, encoded) == ["It is a 3.<|im_end|>"]


@pytest.mark.parametrize("size", [(16, 16), (20, 28)], ids=["as it is", "resized"])
def test_frames_are_resized_and_normalized_as_images(
    chat: Chat, processor: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    """Each half of a patch is the patch of one frame; an odd last frame fills both halves."""
    paths = [save_digit(tmp_path / f"{n}.png", n, size) for n in range(3)]
    names = [path.name for path in paths]
    messages = ask(0)
    messages[0]["content"].insert(0, {"type": "video", "video": names, "fps": 2})
    encoded = encode(chat, messages, tmp_path)
    (frames, rows, columns), tokens = encoded.media["video_grid_thw"][0].tolist(), encoded.tokens
    assert frames == 2
    single = image_processor(processor)(
        [PIL.Image.open(path) for path in paths], return_tensors="pt"
    )
    assert single["image_grid_thw"].tolist() == [[1, rows, columns]] * 3
    halves = encoded.media["pixel_values_videos"].view(2, rows * columns, 3, 2, -1)
    images = single["pixel_values"].view(3, rows * columns, 3, 2, -1)
    for frame, (time, half) in enumerate([(0, 0), (0, 1), (1, 0)]):
        torch.testing.assert_close(halves[time, :, :, half], images[frame, :, :, 0])
    assert torch.equal(halves[1, :, :, 0], halves[1, :, :, 1])
    pads = "<|vision_start|>" + "<|video_pad|>" * (rows * columns // 4) + "<|vision_end|>"
    text = chat.tokenizer.decode(tokens)
    assert f"<0.2 seconds>{pads}<1.0 seconds>{pads}" in text  # the middle of 0.0 and 0.5, and 1.0


@pytest.mark.parametrize("marked", [False, True], ids=["ChatML", "generation marks"])
def test_answers_are_marked(tmp_path: Path, marked: bool) -> None:
    """Of every turn, to the end of the turn; both ways find the same, line breaks and all."""
    chat = Chat(str(make_processor(tmp_path / "processor", marked=marked)))
    save_digit(tmp_path / "1.png", 1)
    said = ["\n\nOne.\n", "", "assistant\nß🎈", "3"]
    messages = [{"role": "system", "content": "assistant"}]
    for text in said:
        messages += [*ask(1, "1.png")[:1], {"role": "assistant", "content": text}]
    encoded = encode(chat, messages, tmp_path)
    found = answers(chat, encoded)
    assert [text.lstrip() for text in found] == [f"{text}<|im_end|>".lstrip() for text in said]
    other = Chat(str(make_processor(tmp_path / "other", marked=not marked)))
    assert torch.equal(encode(other, messages, tmp_path).answers, encoded.answers)


def test_tools_reach_the_template(chat: Chat, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "count", "parameters": {}}}]
    encoded = encode(chat, ask(1), tmp_path, tools=tools)
    assert '"count"' in chat.tokenizer.decode(encoded.tokens)


def test_a_text_model_has_no_processor(tmp_path: Path) -> None:
    chat = Chat(str(make_processor(tmp_path / "processor", images=False)))
    assert chat.processor is None
    with pytest.raises(DataError, match="is of a text model, and the run trains a vision tower"):
        chat.check_tower(VisionConfig(out_hidden_size=64))
    assert answers(chat, encode(chat, ask(7), tmp_path)) == ["It is a 7.<|im_end|>"]
    save_digit(tmp_path / "1.png", 1)
    with pytest.raises(DataError, match="a conversation holds an image"):
        encode(chat, ask(1, "1.png"), tmp_path)


def test_images_turn_upright(tmp_path: Path) -> None:
    """As transformers turns them by their EXIF data; grey and transparent ones become RGB."""
    path = tmp_path / "1.png"
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("L", (8, 24)).save(path, exif=exif)
    image, kind = open_image(path.read_bytes(), "1.png")
    assert (image.size, image.mode, kind) == ((24, 8), "RGB", "png")


def test_text_cannot_write_special_tokens(chat: Chat, tmp_path: Path) -> None:
    for text in ("x <|im_end|>\n<|im_start|>assistant\n", "<|image_pad|>"):
        with pytest.raises(DataError, match="holds a special token") as caught:
            encode(chat, ask(1, text=text), tmp_path)
        assert "the chat template alone writes special tokens" in str(caught.value)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "show what the ass"),
        ("{{ raise_exception('no') }}", "show what the assistant"),
        ("", "has no chat template"),
    ],
)
def test_templates_without_answers(tmp_path: Path, template: str, said: str) -> None:
    folder = make_processor(tmp_path, images=False, template=template)
    if not template:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(DataError, match=said):
        Chat(str(folder))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"patch_size": 8}, "patch_size 8"),
        ({"temporal_patch_size": 4}, "temporal_patch_size 4"),
        ({"spatial_merge_size": 4}, "merge_size 4"),
        ({"image_token_id": 1}, "image_token_id 1"),
    ],
)
def test_a_processor_of_another_model(chat: Chat, change: dict[str, int], said: str) -> None:
    processor = chat.processor
    assert processor is not None
    fitting = {
        "out_hidden_size": 64,
        "patch_size": 4,
        "image_token_id": processor.image_token_id,
        "video_token_id": processor.video_token_id,
    }
    chat.check_tower(VisionConfig(**fitting))
    with pytest.raises(DataError, match="is not the one of the model") as caught:
        chat.check_tower(VisionConfig(**fitting | change))
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "video_preprocessor_config.json"])
@pytest.mark.parametrize("content", ["{]", "[1]"])
def test_a_damaged_processor_is_not_that_of_a_text_model(
    tmp_path: Path, name: str, content: str
) -> None:
    (make_processor(tmp_path) / name).write_text(content)
    with pytest.raises(DataError, match=r"the image processor of .* could not be loaded"):
        Chat(str(tmp_path))


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("text", "messages must be a list of objects"),
        ([{"content": "x"}], "a message needs a role"),
        ([{"role": "user", "content": "x"}], "there is no answer to train on"),
        ([{"role": "user", "content": 1}], "a string or a list of parts"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "not one that chat templates take"),
        ([{"role": "user", "content": [{"type": "image"}]}], "must name one file"),
        (ask(1, "https://host/a.png"), "not the path of a file"),
        (ask(1, "data:image/png;base64,"), "not the path of a file"),
        ([{"role": "assistant", "content": [{"type": "image", "image": "x"}]}], "holds an image"),
    ],
)
def test_messages_that_no_template_takes(messages: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        checked_messages(messages)


@pytest.mark.parametrize(
    ("video", "said"),
    [
        ({"video": "film.mp4", "fps": 2}, "a list of its frames"),
        ({"video": ["a.png"], "fps": 2}, "a list of its frames"),
        ({"video": ["a.png", "b.png"]}, "needs fps"),
        ({"video": ["a.png", "b.png"], "fps": 0}, "needs fps"),
        ({"video": ["a.png", 1], "fps": 1}, "not the path of a file"),
    ],
)
def test_videos_are_frames(video: dict[str, Any], said: str) -> None:
    messages = ask(1)
    messages[0]["content"].append({"type": "video"} | video)
    with pytest.raises(DataError, match=said):
        checked_messages(messages)


def test_pixels_do_not_depend_on_torchvision(chat: Chat) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    assert chat.processor is not None
    assert type(chat.processor.image_processor) is Qwen2VLImageProcessorPil
    frames = torch.from_numpy(np.arange(2 * 3 * 8 * 8, dtype=np.uint8).reshape(2, 3, 8, 8))
    video = chat.processor.video_processor
    assert torch.equal(video.convert_to_rgb(frames), frames)


def test_chat_templates_of_these_tests() -> None:
    assert json.dumps(chat_template(True)) != json.dumps(chat_template(False))
    assert "{%- generation -%}" in chat_template(True)
