"""What CPU mode leaves alone: calls that do not ask for CUDA, and models of other libraries."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import BuiltinFunctionType

import torch

from tests.helpers.distributed import WorkerPool

ROOT = Path(__file__).parents[2]

MODELS = """
import os, sys, torch
from pathlib import Path
from transformers import (
    AutoModelForCausalLM, LlamaConfig, Qwen3_5MoeTextConfig, Qwen3_5TextConfig
)

sizes = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
)
gdn = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8,
)
moe = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
)
folder = Path(sys.argv[1])
configs = {
    "dense": Qwen3_5TextConfig(**sizes, **gdn),
    "moe": Qwen3_5MoeTextConfig(**sizes, **gdn, **moe),
    "llama": LlamaConfig(**sizes),
}

def results():
    found = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        if not (folder / name).exists():
            model.save_pretrained(folder / name)
        loaded = AutoModelForCausalLM.from_pretrained(folder / name)  # built on meta
        with torch.device("meta"):
            assert all(p.is_meta for p in AutoModelForCausalLM.from_config(config).parameters())
        for way, model in (("built", model), ("loaded", loaded)):
            ids = torch.arange(40)[None]
            out = model.train()(ids, labels=ids)
            out.loss.backward()
            tensors = {"loss": out.loss, "logits": out.logits, **dict(model.named_buffers())}
            tensors |= {n: p.grad for n, p in model.named_parameters()}
            found |= {f"{name} {way} {key}": t.detach() for key, t in tensors.items()}
    return found

def differing(one, other):
    assert one.keys() == other.keys()
    return [key for key in one if not torch.equal(one[key], other[key])]

from qwen35_mcore.mcore import cpu_mode
child = os.fork()
if not child:  # one process: before and after
    before = results()
    torch.save(before, folder / "before.pt")
    cpu_mode.enable()
    print("after:", differing(before, results()), flush=True)
    os._exit(0)
os.waitpid(child, 0)
cpu_mode.enable()  # a process in which nothing has run before
print("at once:", differing(torch.load(folder / "before.pt"), results()))
print("compared:", len(torch.load(folder / "before.pt")))
"""


def test_models_of_transformers_are_bit_equal(tmp_path: Path) -> None:
    """Built, and loaded by way of the meta device: loss, logits, buffers and gradients."""
    done = subprocess.run(
        [sys.executable, "-c", MODELS, tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "after: []" in done.stdout, done.stdout
    assert "at once: []" in done.stdout, done.stdout
    assert int(done.stdout.rpartition("compared: ")[2]) > 200


def test_calls_that_do_not_ask_for_cuda(pool: WorkerPool) -> None:
    assert pool.run(leaves_alone, 1) == [None]


def leaves_alone() -> None:
    for name in ("zeros", "empty", "arange", "rand", "empty_like", "full", "eye"):
        assert isinstance(getattr(torch, name), BuiltinFunctionType)
    for function in (torch.Tensor.to, torch.Tensor.cuda, torch.cuda.synchronize):
        assert pickle.loads(pickle.dumps(function)) is function
    for make in (torch.tensor, torch.as_tensor):
        assert pickle.loads(pickle.dumps(make)) is make
        with torch.device("meta"):
            assert make([1.0]).is_meta
            assert make([1.0], device="cpu").device.type == "cpu"
        assert make([1], dtype=torch.bfloat16, device="meta").dtype == torch.bfloat16
    torch.set_default_device("meta")
    try:
        assert torch.tensor(1).is_meta
        assert torch.nn.Linear(2, 2).weight.is_meta
    finally:
        torch.set_default_device(None)
    x = torch.ones(2)
    assert x.type() == "torch.FloatTensor"
    assert x.type(torch.float64).dtype == x.to(torch.float64).dtype == torch.float64
    assert x.to("meta").is_meta
    assert torch.zeros(2, out=x) is x
    torch.manual_seed(3)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    torch.cuda.manual_seed(4)  # documented to be ignored where there is no CUDA
    assert torch.equal(torch.rand(2), drawn)
    assert torch.equal(torch.func.vmap(lambda row: row * torch.tensor(2.0))(x[None]), 2 * x[None])


def test_what_others_ask_of_cuda(pool: WorkerPool) -> None:
    assert pool.run(answers, 1) == [None]


def answers() -> None:
    assert not torch.cuda.is_available()
    assert not torch.cuda.is_initialized()
    assert torch.cuda.device_count() == 0
    assert not torch.cuda.is_bf16_supported()
    assert torch.cuda.memory_allocated() == 0
    assert isinstance(torch.cuda.current_stream(), torch.cuda.Stream)
    assert isinstance(torch.cuda.Stream(device="cuda"), torch.Stream)
    assert isinstance(torch.cuda.Event(enable_timing=True), torch.cuda.Event)
    assert not isinstance(torch.cuda.Event(), torch.cuda.Stream)


def test_tensors_on_cuda_are_made_on_the_cpu(pool: WorkerPool) -> None:
    assert pool.run(made_on_cpu, 1) == [None]


def made_on_cpu() -> None:
    x = torch.ones(2)
    for device in ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 1)):
        made = [
            torch.tensor([1.0], device=device),
            torch.as_tensor([1.0], device=device),
            torch.zeros(2, device=device, dtype=torch.bfloat16),
            torch.randperm(3, device=device),
            torch.empty_like(x, device=device),
            torch.empty_strided((2, 2), (1, 2), device=device),
            x.new_full((2,), 1.0, device=device),
            torch.nn.Linear(2, 2, device=device).weight,
            torch.nn.Linear(2, 2).to(device).weight,
        ]
        assert {tensor.device.type for tensor in made} == {"cpu"}
        assert made[2].dtype == torch.bfloat16
        assert x.to(device) is x.cuda() is x


def test_only_megatrons_functions_are_not_compiled(pool: WorkerPool) -> None:
    assert pool.run(compiles, 1) == [(True, False)]


def compiles() -> tuple[bool, bool]:
    from megatron.core.fusions.fused_bias_swiglu import swiglu

    compiled = torch.compile(lambda x: x + torch.tensor(1.0), backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return graphs > 0, hasattr(swiglu, "_torchdynamo_orig_callable")
