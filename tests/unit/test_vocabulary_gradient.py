"""The gradient of the word embedding, which a layer adds to the main gradient by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen35_mcore.model.layers.vocabulary import add_rows


@given(
    vocabulary=st.integers(1, 70),
    tokens=st.integers(0, 200),
    frequent=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_rows_of_repeated_tokens_are_added_up(
    vocabulary: int, tokens: int, frequent: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (tokens,), generator=generator)
    ids[torch.rand(tokens, generator=generator) < frequent] = vocabulary - 1
    table = torch.randn(vocabulary, 6, generator=generator)
    rows = torch.randn(tokens, 6, generator=generator).bfloat16()
    expected = table.double().index_add(0, ids, rows.double())
    add_rows(table, ids, rows)
    torch.testing.assert_close(table.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_without_rows_keeps_its_gradient(dtype: torch.dtype) -> None:
    table = torch.randn(9, 4, dtype=dtype)
    before = table.clone()
    add_rows(table, torch.tensor([7, 7, 7, 2]), torch.ones(4, 4, dtype=torch.bfloat16))
    kept = [i for i in range(9) if i not in (2, 7)]
    assert torch.equal(table[kept], before[kept])
    added = torch.tensor([[1.0], [3.0]], dtype=dtype)
    torch.testing.assert_close(table[[2, 7]], before[[2, 7]] + added)
