"""Which classes megatron builds a model's two layers of the vocabulary from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron.core import tensor_parallel


@contextlib.contextmanager
def vocabulary_layers(output_layer: type, embedding: type) -> Iterator[None]:
    """While a model is built: what it takes for its output layer and its word embedding."""
    originals = tensor_parallel.ColumnParallelLinear, tensor_parallel.VocabParallelEmbedding
    tensor_parallel.ColumnParallelLinear = output_layer
    tensor_parallel.VocabParallelEmbedding = embedding
    try:
        yield
    finally:
        tensor_parallel.ColumnParallelLinear, tensor_parallel.VocabParallelEmbedding = originals
