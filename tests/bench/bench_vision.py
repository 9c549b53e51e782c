"""Training the vision tower with a cut language model on one GPU, beside what the planner predicts.

    python -m tests.bench.bench_vision --json out.jsonl
    python -m tests.bench.bench_vision --images 2 --patches 4096 --freeze language
    python -m tests.bench.bench_vision --cpu

35b-a3b's widths, four language layers with MTP, its own tower of 27 blocks; sequences of 4,096
tokens with one image of 1,024 patches each, two microbatches a step through megatron's schedule,
DDP and distributed optimizer; routing forced to balance. Each result is printed as it is there:

tower: the tower alone, forward and backward, and what autograd keeps between the two.
text: a step of the language model alone. Its time, tokens a second, and peak memory.
images: the same of the vision-language model; and the share of the step that its tower takes.

--cpu rehearses it with a toy and without memory. Exit status: 1 where a peak is more than 5 % from
its prediction.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from qwen35_mcore.config.flavors import vision_flavor
from qwen35_mcore.config.flops import BACKWARD_AND_FORWARD, training_flops
from qwen35_mcore.config.images import PARTS, Images
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.mcore import cpu_mode
from qwen35_mcore.planner.calibration.rows import default_calibration
from qwen35_mcore.planner.candidate import Candidate, Job
from qwen35_mcore.planner.hardware import GIB
from qwen35_mcore.planner.prediction import Prediction, predict

LENGTH, MICROBATCHES = 4096, 2
ALL_EXPERTS_GIB = 120
"""Memory of a GPU that holds all 256 experts of four layers with their optimizer state."""
TOLERANCE = 0.05


def start(cpu: bool) -> None:
    """One rank, on the GPU or in megatron's CPU mode, which comes before any import of megatron."""
    from tests.bench import common

    if not cpu:
        common.start()
        return
    cpu_mode.enable()
    from megatron.core import parallel_state, tensor_parallel

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29512")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def models(args: Any) -> tuple[Qwen35Config, Qwen35Config]:
    """The text model, and the same with its tower."""
    from tests.bench.common import cut_config
    from tests.helpers.toys import toy_config
    from tests.helpers.vision import vision_toy_config, with_tower

    if args.cpu:
        return toy_config(mtp_num_hidden_layers=1), vision_toy_config(mtp_num_hidden_layers=1)
    text = cut_config("35b-a3b", 4, args.experts, mtp=True)
    tower = vision_flavor("35b-a3b").carried_outer["vision_config"]
    return text, with_tower(text, **tower)


def run_config(model_config: Qwen35Config, args: Any, **run: Any) -> Any:
    from qwen35_mcore.model.transformer_config import transformer_config
    from tests.bench.common import gpu_config
    from tests.helpers.training import LOCAL

    run = {"moe_router_force_load_balancing": True, "calculate_per_token_loss": True, **run}
    if not args.cpu:
        return gpu_config(model_config, **{"cross_entropy_fusion_impl": "te", **run})
    return transformer_config(model_config, **LOCAL | run, params_dtype=torch.float32)


def grid(args: Any) -> tuple[int, int, int]:
    """One frame, as square as a power of two of patches can be."""
    rows = 2 ** ((args.patches.bit_length() - 1) // 2)
    return 1, rows, args.patches // rows


def time_tower(model_config: Qwen35Config, args: Any) -> dict[str, Any]:
    """The tower alone on the images of one microbatch."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from qwen35_mcore.model.spec_providers import get_spec_provider
    from qwen35_mcore.model.vision.tower import VisionModel
    from tests.bench.common import median_ms

    images, config = images_of(model_config, args), run_config(model_config, args)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    tower = VisionModel(images.vision, config, get_spec_provider(config), groups).cuda()
    grids = [grid(args)] * args.images
    patches = torch.randn(images.patches_of_a_sequence, images.vision.patch_values).cuda()

    def forward() -> torch.Tensor:
        for parameter in tower.parameters():
            parameter.grad = None
        return tower(patches, grids)

    gradient = torch.randn_like(forward())
    row: dict[str, Any] = {"what": "tower", "parameters": sum(images.parameters(1).values())}
    if not args.cpu:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        output = forward()
        row["kept_gib"] = (torch.cuda.memory_allocated() - before) / GIB
        kept, _ = images.kept_bytes(1, recomputed=False)
        row["kept_predicted_gib"] = images.patches_of_a_sequence * kept / GIB
        del output
    forward_ms = median_ms(forward, args.repeats)["ms"]
    both = median_ms(lambda: forward().backward(gradient), args.repeats)
    tflops = BACKWARD_AND_FORWARD * images.flops / both["ms"] / 1e9
    return row | {"forward_ms": forward_ms, **both, "tflops": tflops}


def images_of(model_config: Qwen35Config, args: Any) -> Images:
    return Images.of(
        model_config,
        seq_length=args.length,
        patches=args.patches,
        per_sequence=args.images,
        frozen=args.freeze,
    )


def predicted(model_config: Qwen35Config, images: Images | None, args: Any) -> Prediction:
    from tests.bench.multi_gpu.machine import card_name, planner_gpu

    gpu = planner_gpu("CPU" if args.cpu else card_name(), "h100" if args.cpu else None)
    job = Job(
        model_config=model_config,
        gpu=gpu,
        gpus=1,
        seq_length=args.length,
        global_batch_size=MICROBATCHES,
        calibration=default_calibration(gpu.name),
        images=images,
    )
    return predict(job, Candidate())


def batch_of(model_config: Qwen35Config, with_images: bool, args: Any) -> Any:
    """Two sequences, on the device with their patches."""
    from tests.helpers.toys import random_tokens
    from tests.helpers.training import Batch
    from tests.helpers.vision import VisionBatch, row

    if not with_images:
        return Batch(random_tokens(model_config, MICROBATCHES, args.length, seed=1).cuda())
    grids = [grid(args)] * args.images
    rows = [row(model_config, args.length, grids, [], seed=n) for n in range(MICROBATCHES)]
    batch = VisionBatch(model_config, rows)
    ready = [
        {name: value.cuda() for name, value in batch.images(n, 1).items()}
        for n in range(MICROBATCHES)
    ]
    batch.tokens = batch.tokens.cuda()
    batch.images = lambda first, count: ready[first]  # type: ignore[method-assign]
    return batch


def train(model_config: Qwen35Config, with_images: bool, args: Any) -> dict[str, Any]:
    """Training steps: what they took and held, and what the planner says of that."""
    from qwen35_mcore.model.build import build_model
    from qwen35_mcore.model.vision.freeze import freeze
    from tests.bench.common import median_ms, peak_gib
    from tests.bench.compare_plan import model_bytes, peak_bytes
    from tests.helpers.training import Layout, Result, forward_backward, wrap

    config = run_config(model_config, args, gradient_accumulation_fusion=not args.cpu)
    left_over = 0 if args.cpu else torch.cuda.memory_allocated()  # of what ran before
    dtype = torch.float32 if args.cpu else torch.bfloat16
    layout = Layout(dtype=dtype, vision=with_images)
    model = build_model(model_config, config, vision=with_images).cuda()
    if with_images:
        freeze(model, args.freeze)
    wrapped, optimizer = wrap([model], config, layout, 1e-4)
    data, result = batch_of(model_config, with_images, args), Result()

    def step() -> None:
        wrapped[0].zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward(data, wrapped, config, 1, result, 1)
        optimizer.step()

    step()
    images = images_of(model_config, args) if with_images else None
    plan = predicted(model_config, images, args)
    tokens = MICROBATCHES * args.length
    row: dict[str, Any] = {
        "what": "images" if with_images else "text",
        "frozen": ",".join(args.freeze) if with_images else "",
        "predicted_ms": plan.step_s * 1e3,
    }
    if not args.cpu:
        torch.cuda.synchronize()
        row["left_over_gib"] = left_over / GIB
        row["model_gib"] = (torch.cuda.memory_allocated() - left_over) / GIB
        row["model_predicted_gib"] = model_bytes(plan) / GIB
        row["peak_gib"] = peak_gib(step) - left_over / GIB
        row["peak_predicted_gib"] = peak_bytes(plan) / GIB
        row["peak_error"] = row["peak_predicted_gib"] / row["peak_gib"] - 1
    timing = median_ms(step, args.repeats, warmup=2)
    grids = [grid(args)] * (args.images * MICROBATCHES) if with_images else []
    flops = training_flops(model_config, tokens, seq_length=args.length, grids=grids)
    row |= {
        **timing,
        "tokens_per_s": tokens / timing["ms"] * 1e3,
        "tflops": flops / timing["ms"] / 1e9,
    }
    if not args.cpu:
        from tests.bench.bench_calibration import release

        release(wrapped[0], optimizer)
    return row


def main() -> None:
    from tests.bench.common import arguments, report

    parser = arguments(__doc__)
    parser.add_argument("--cpu", action="store_true", help="A rehearsal with a toy.")
    parser.add_argument("--images", type=int, default=1, help="Of a sequence.")
    parser.add_argument("--patches", type=int, help="Of an image, a power of two. Default: 1024.")
    parser.add_argument("--experts", type=int, help="Default: all 256 on a large GPU, else 64.")
    parser.add_argument("--freeze", nargs="*", default=[], choices=PARTS)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    start(args.cpu)
    args.length = 128 if args.cpu else LENGTH
    args.patches = args.patches or (64 if args.cpu else 1024)
    if not args.cpu and args.experts is None:
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
        args.experts = 256 if memory > ALL_EXPERTS_GIB else 64
    text, whole = models(args)
    setting = {"images": args.images, "patches": args.patches, "experts": text.num_experts}
    steps: list[tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]] = [
        (time_tower, (whole, args)),
        (train, (text, False, args)),
        (train, (whole, True, args)),
    ]
    rows = []
    for measure, given in steps:
        gc.collect()
        if not args.cpu:
            torch.cuda.empty_cache()
        rows.append({**setting, **measure(*given)})
        if rows[-1]["what"] == "images":
            rows[-1]["tower_share"] = MICROBATCHES * rows[0]["ms"] / rows[-1]["ms"]
        report(rows[-1], args.json)
    sys.exit(int(any(abs(row.get("peak_error", 0.0)) > TOLERANCE for row in rows)))


if __name__ == "__main__":
    main()
