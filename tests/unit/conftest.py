"""What tests of conversations with images share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.conversations import make_processor


@pytest.fixture(scope="session")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder's tokenizer, chat template and image processor, for reading."""
    return make_processor(tmp_path_factory.mktemp("processor"))
