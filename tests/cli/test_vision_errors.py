"""Bad flags of a run with images: one message, before any process group forms."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_pretrain_errors import error_of
from tests.helpers.image_rows import model_folder
from tests.helpers.kinds import kinds
from tests.helpers.vision import vision_toy_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), vision_toy_config(vocab_size=512))


DATA = ["--image-data", "conversations"]
VISION = ["--vision", *DATA]
REFUSED = [
    (["--vision"], ["--vision without --image-data", "a tower is then carried along"]),
    (["--freeze", "vision", *DATA], ["--freeze vision", "pass --vision as well"]),
    ([*VISION, "--freeze", "merger", "language", "vision"], ["leaves nothing to train"]),
    ([*VISION, "--freeze", "tower"], ["invalid choice: 'tower'"]),
    ([*DATA, "--mock-data"], ["--image-data --mock-data", "drop --mock-data"]),
    ([*DATA, "--split", "1,1,0"], ["--split is for text data", "drop --split"]),
    (["--mock-data", "--pack-samples"], ["--pack-samples needs --image-data"]),
    ([*DATA, "--tokenizer-type", "NullTokenizer"], ["drop --tokenizer-type"]),
    ([*VISION, "--decoder", "hybrid"], ["got: --decoder hybrid", "pass --decoder gpt"]),
    ([*VISION, "--use-megatron-fsdp"], ["does nothing with --image-data: its checkpoints"]),
    ([*VISION, "--optimizer", "muon"], ["got: --optimizer muon", "pass --optimizer adam"]),
]


KEPT = ("--vision", "--freeze vision --image-data conversations")


@pytest.mark.parametrize("case", kinds(REFUSED, KEPT, lambda case: " ".join(case[0])))
def test_refused(model: Path, case: tuple[list[str], list[str]]) -> None:
    more, parts = case
    message = error_of(flags(model, *more))
    for part in parts:
        assert part in message


def flags(model: Path, *more: str) -> list[str]:
    return [
        *("--hf-config", str(model), "--seq-length", "64", "--micro-batch-size", "1"),
        *("--train-iters", "10", "--lr", "1e-3", "--num-workers", "0", "--eval-iters", "0"),
        *more,
    ]


def test_a_model_without_a_tower(tmp_path: Path) -> None:
    text = vision_toy_config(vocab_size=512).to_text_only()
    message = error_of(flags(model_folder(tmp_path, text), *VISION))
    assert message.startswith("the model has no vision tower")


@pytest.mark.exhaustive
def test_a_tower_that_contradicts_the_text(tmp_path: Path) -> None:
    config = vision_toy_config(vocab_size=512, vision={"out_hidden_size": 32})
    message = error_of(flags(model_folder(tmp_path, config), *VISION))
    assert "out_hidden_size must be the language model's hidden_size" in message


@pytest.mark.exhaustive
def test_tensor_parallelism_that_does_not_divide_the_tower(tmp_path: Path) -> None:
    config = vision_toy_config(vocab_size=512, vision={"num_heads": 1})
    folder = model_folder(tmp_path, config)
    message = error_of(flags(folder, *VISION, "--tensor-model-parallel-size", "2"), 2)
    assert "does not divide the vision tower's num_heads" in message


@pytest.mark.exhaustive
def test_no_processor() -> None:
    message = error_of(
        [
            *("--flavor", "tiny-moe", *DATA, "--seq-length", "64", "--micro-batch-size", "1"),
            *("--train-iters", "10", "--lr", "1e-3"),
        ]
    )
    assert "pass --tokenizer-model FOLDER" in message
