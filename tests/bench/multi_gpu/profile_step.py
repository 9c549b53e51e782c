"""Where one training step's time went on this rank: idle, exposed communication, kernels, waits."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LONGEST, HOST_CALLS = 24, 10
Span = tuple[float, float, str]
"""Begin and end in nanoseconds, and a name."""


def profile_step(number: int, path: Path) -> None:
    """Have megatron's training loop profile its ``number``-th step and write a table to ``path``.

    The host's waits are those of the whole step, the one that ends the measurement included. The
    step after it says who waits, under the table.
    """
    import torch
    from megatron.training import training

    from tests.bench.multi_gpu.host_waits import callers_of_waits

    step, done = training.train_step, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        if done not in (number, number + 1):
            return step(*args, **kwargs)
        torch.cuda.synchronize()
        if done == number + 1:
            with callers_of_waits() as callers:
                result = step(*args, **kwargs)
            with path.open("a") as table:
                table.writelines(f"{n:7,d} waits  {who}\n" for who, n in callers.most_common())
            return result
        with torch.profiler.profile() as trace:
            result = step(*args, **kwargs)
            torch.cuda.synchronize()
        path.write_text(summary(*_spans(trace)))
        return result

    training.train_step = counted


def _spans(trace: Any) -> tuple[list[Span], list[Span]]:
    """What the GPU did, and what the host asked of CUDA."""
    import torch

    on_gpu, on_host = [], []
    for event in trace.profiler.kineto_results.events():
        span = (event.start_ns(), event.end_ns(), event.name())
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            if event.duration_ns() > 0 and not event.is_user_annotation():
                on_gpu.append(span)
        elif event.name().startswith("cuda"):
            on_host.append(span)
    return on_gpu, on_host


def summary(on_gpu: list[Span], on_host: list[Span]) -> str:
    """A table in milliseconds."""
    if not on_gpu:
        return "no GPU events\n"
    communication = [span for span in on_gpu if "nccl" in span[2].lower()]
    computation = [span for span in on_gpu if "nccl" not in span[2].lower()]
    whole = max(end for _, end, _ in on_gpu) - min(begin for begin, _, _ in on_gpu)
    busy, computing = covered(on_gpu), covered(computation)
    lines = [
        f"{whole / 1e6:9.1f} ms from the first to the last of {len(on_gpu):,} GPU events",
        f"{(whole - busy) / 1e6:9.1f} ms idle",
        f"{(busy - computing) / 1e6:9.1f} ms exposed communication "
        f"(all of it {covered(communication) / 1e6:.1f})",
        f"{computing / 1e6:9.1f} ms computation",
    ]
    lines += [*_longest(on_gpu, LONGEST), "host:", *_longest(on_host, HOST_CALLS)]
    return "\n".join(lines) + "\n"


def covered(spans: Iterable[Span]) -> float:
    """Nanoseconds in which at least one of the spans ran."""
    total = reached = 0.0
    for begin, end, _ in sorted(spans):
        if end > reached:
            total += end - max(begin, reached)
            reached = end
    return total


def _longest(spans: list[Span], count: int) -> list[str]:
    time, calls = collections.Counter[str](), collections.Counter[str]()
    for begin, end, name in spans:
        short = re.sub(r"<.*", "", name.replace("void ", ""))[:72]
        time[short] += int(end - begin)
        calls[short] += 1
    return [f"{ns / 1e6:9.1f} ms {calls[name]:7,d}  {name}" for name, ns in time.most_common(count)]
