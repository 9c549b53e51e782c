"""Our shared expert is megatron-core's: parameters, checkpoint keys, outputs and gradients."""

from __future__ import annotations

from typing import Any

import torch

from tests.helpers.distributed import WorkerPool
from tests.helpers.toys import toy_config
from tests.helpers.training import Layout, build_chunks, config_for, initialize


def ours_and_native() -> list[dict[str, Any]]:
    """What the shared expert of a model computes and stores, and what megatron's own does with its
    weights, in float32 under tensor and sequence parallelism."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

    from qwen35_mcore.mcore.imports import get_default_pg_collection

    layout = Layout(tp=2)
    initialize(layout)
    model_config = toy_config()
    config = config_for(model_config, layout)
    [model] = build_chunks(model_config, config, layout)
    layer = model.decoder.layers[0].mlp
    ours, groups = layer.shared_experts, get_default_pg_collection()
    linears = layer.submodules.shared_experts.keywords
    native = SharedExpertMLP(config=config, gate=True, pg_collection=groups, **linears)
    native.load_state_dict(ours.state_dict())
    x, dy = torch.randn(2, 6, 1, model_config.hidden_size)
    data = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}

    def describe(expert: Any) -> dict[str, Any]:
        inputs = x.clone().requires_grad_()
        output = expert(inputs)
        output.backward(dy)
        return {
            "output": output.detach(),
            "input gradient": inputs.grad,
            "sequence parallel": expert.gate_weight.sequence_parallel,
            "keys": [
                (name, stored.key)
                for name, stored in expert.sharded_state_dict("expert.", (), data).items()
            ],
            **{name: weight.grad for name, weight in expert.named_parameters()},
        }

    assert type(ours) is not type(native)
    return [describe(ours), describe(native)]


def test_it_is_megatrons(pool: WorkerPool) -> None:
    for ours, native in pool.run(ours_and_native, 2):
        assert ours.keys() == native.keys()
        assert {"gate_weight", "linear_fc1.weight", "linear_fc2.weight"} < ours.keys()
        for name, wanted in native.items():
            is_tensor = isinstance(wanted, torch.Tensor)
            assert torch.equal(ours[name], wanted) if is_tensor else ours[name] == wanted, name
