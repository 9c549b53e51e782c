"""What megatron does around the capture of a step, without a GPU: the step itself is eager here."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import DataError
from qwen35_mcore.mcore.patches import captured_step
from qwen35_mcore.training.checks.data import check_batch
from tests.distributed.cases import DENSE
from tests.helpers.batches import Batch
from tests.helpers.distributed import WorkerPool
from tests.helpers.toys import random_tokens, toy_config
from tests.helpers.training import Layout, build_chunks, config_for, initialize, wrap


def gathers_of_steps(model_config: Qwen35Config, tokens: torch.Tensor) -> dict[str, list[int]]:
    """Gathers of parameters in a step behind others, behind a checkpoint and behind an evaluation:
    as megatron counts them, and where it would capture that step."""
    from megatron.core.distributed import param_and_grad_buffer

    layout = Layout(dtype=torch.bfloat16, overlap=True)
    initialize(layout)
    config = config_for(model_config, layout)
    [model], optimizer = wrap(build_chunks(model_config, config, layout), config, layout, 1e-3)
    sample = Batch(tokens).sample(0, len(tokens))

    def step(*_: Any, **__: Any) -> int:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        name = "dist_all_gather_func"
        original = getattr(param_and_grad_buffer, name)
        with mock.patch.object(param_and_grad_buffer, name, side_effect=original) as gather:
            loss = model(sample["tokens"], sample["position_ids"], None, labels=sample["labels"])
        loss.float().sum().backward()
        model.finish_grad_sync()
        optimizer.step()
        return gather.call_count

    def evaluate() -> None:
        model.disable_forward_pre_hook(param_sync=True)
        model.enable_forward_pre_hook()

    def captured(*, at: int) -> int:
        wrapper = Namespace(curr_iter=lambda stage: 3, cuda_graph_warmup_steps=at)
        return captured_step._gathering(step)(wrapper, model=[model], forward_only=False)

    step()  # the first one
    found: dict[str, list[int]] = {"eager": [], "captured": []}
    for name, run in (("eager", partial(captured, at=9)), ("captured", partial(captured, at=3))):
        for before in (lambda: None, partial(model.start_param_sync, force_sync=True), evaluate):
            before()
            found[name].append(run())
    return found


def test_a_captured_step_gathers_parameters_whatever_was_before_it(pool: WorkerPool) -> None:
    """Its graph does so in every replay. Elsewhere what was gathered is not gathered again."""
    model_config = toy_config(**DENSE)
    tokens = random_tokens(model_config, 2, 32, seed=1)
    for found in pool.run(gathers_of_steps, 2, model_config=model_config, tokens=tokens):
        usual, *others = found["eager"]
        assert usual > 0
        assert others == [0, 0]
        assert found["captured"] == [usual] * 3


def steps_of_megatrons_wrapper() -> tuple[list[int], str]:
    """How often parameters had to be gathered after each step, the second of which is captured, and
    what stopped the sixth, whose batch has an id outside the vocabulary."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper

    for patch in captured_step.PATCHES:
        patch.apply()
    model = mock.MagicMock(spec=DistributedDataParallel)
    ids = iter([{"tokens": torch.tensor([[n]]), "labels": None} for n in (0, 1, 2, 3, 255, 256)])
    cuda = ("Stream", "stream", "current_stream", "CUDAGraph", "graph", "graph_pool_handle")
    with contextlib.ExitStack() as stack:
        captured_step.check_by(partial(check_batch, vocab_size=256))
        stack.callback(captured_step.check_by, None)
        for name in cuda:
            stack.enter_context(mock.patch.object(torch.cuda, name, mock.MagicMock()))
        states = "megatron.core.full_cuda_graph.get_all_rng_states"
        stack.enter_context(mock.patch(states, return_value={}))
        wrapper = FullCudaGraphWrapper(lambda **_: None, cuda_graph_warmup_steps=1)
        step = partial(wrapper, model=[model], data_iterator=ids, num_microbatches=1, seq_length=1)
        gathered = []
        for _ in range(5):
            step(forward_only=False)
            gathered.append(model.reset_param_sync_dispatch_state.call_count)
        with pytest.raises(DataError) as error:
            step(forward_only=False)
    return gathered, str(error.value)


def test_megatrons_wrapper_calls_what_took_the_place_of_its_own(pool: WorkerPool) -> None:
    [(gathered, error)] = pool.run(steps_of_megatrons_wrapper, 1)
    assert gathered == [0, 1, 1, 1, 1]
    assert "got: 256" in error


@pytest.mark.parametrize("wrong", [-1, 256])
@pytest.mark.parametrize("key", ["tokens", "labels"])
def test_ids_are_checked_before_they_are_copied_to_the_device(key: str, wrong: int) -> None:
    copied: list[Any] = []
    load = captured_step._checking(lambda self, inputs, *stage: copied.append(inputs))
    batch = {"tokens": torch.tensor([[0, 255]]), "labels": torch.tensor([[255, 0]])}
    captured_step.check_by(partial(check_batch, vocab_size=256))
    try:
        load(None, batch, "training", 0)
        load(None, (batch,), "validation", 1)
        with pytest.raises(DataError, match="an id that the model does not have"):
            load(None, batch | {key: torch.tensor([[0, wrong]])}, "training", 0)
    finally:
        captured_step.check_by(None)
    assert copied == [batch, (batch,)]
