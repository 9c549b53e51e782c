"""What Megatron's own schedule functions do on each pipeline rank, and how long it takes.

`record` runs the real functions of one rank. What they call is replaced: passes and transfers are
noted instead of done, tensors are tags. `play` then runs the notes of all ranks against each other
on a clock of its own, where a transfer begins once its sender and its receiver have both asked for
it, as NCCL's do, and a rank that waits for a transfer stands still.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from megatron.core.pipeline_parallel import schedules


@dataclass(frozen=True)
class Pass:
    """A forward ('F') or backward ('B') pass."""

    kind: str
    chunk: int
    microbatch: int


@dataclass(frozen=True)
class Post:
    """A rank asks for a transfer: its part of it ('send' or 'recv') and the way the tensor goes
    ('next': activations to the next rank, 'prev': gradients to the previous one)."""

    part: str
    way: str
    number: int
    """Counts the posts of the rank with the same part and way: the number of the transfer."""


@dataclass(frozen=True)
class Wait:
    """A rank waits for a transfer that it asked for."""

    post: Post


Note = Pass | Post | Wait


def record(
    rank: int,
    *,
    pp: int,
    vpp: int,
    microbatches: int,
    group: int | None = None,
    overlap: bool = False,
) -> list[Note]:
    """What Megatron does on a rank, in order.

    Args:
        overlap: ``--overlap-p2p-communication``, which only the interleaved schedule has.
    """
    notes: list[Note] = []

    def forward_step(*_: Any, current_microbatch: int, vp_stage: int = 0, **__: Any) -> Any:
        notes.append(Pass("F", vp_stage, current_microbatch))
        return SimpleNamespace(tag=(vp_stage, current_microbatch)), 0

    def backward_step(_: Any, output: Any, *__: Any) -> Any:
        notes.append(Pass("B", *output.tag))
        return SimpleNamespace()

    cpu_torch = SimpleNamespace(zeros=lambda *_, **__: 0, int=torch.int, nn=torch.nn)
    stand_ins = {
        "forward_step": forward_step,
        "backward_step": backward_step,
        "deallocate_output_tensor": lambda *_: None,
        "get_model_config": lambda _: _config(pp, vpp, group, overlap),
        "get_model_type": lambda _: None,
        # the real ones take every rank for the first and last without a process group
        "is_pp_first_stage": lambda group: group.rank() == 0,
        "is_pp_last_stage": lambda group: group.rank() == group.size() - 1,
        "torch": cpu_torch,  # the token counter is asked for on "cuda"
    }
    interleaved = vpp > 1
    with mock.patch.multiple(schedules, **stand_ins):
        run = (
            schedules.forward_backward_pipelining_with_interleaving
            if interleaved
            else schedules.forward_backward_pipelining_without_interleaving
        )
        run(
            forward_step_func=None,
            data_iterator=[None] * vpp,
            model=[torch.nn.Identity() for _ in range(vpp)],
            num_microbatches=microbatches,
            seq_length=1,
            micro_batch_size=1,
            p2p_communicator=_Neighbours(notes, rank, pp, vpp if interleaved else None),
            pg_collection=_collection(),
        )
    return notes


@dataclass(frozen=True)
class Played:
    """When what happened."""

    step_s: float
    passes: dict[tuple[str, int, int], tuple[float, float]]
    """(kind, virtual stage, microbatch) -> begin and end."""


def play(
    recorded: Sequence[Sequence[Note]],
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    p2p_s: float,
) -> Played:
    """The step of ranks that do what was recorded.

    Args:
        forward_s, backward_s: seconds per virtual stage, in forward order.
        p2p_s: seconds of a transfer.
    """
    pp = len(recorded)
    clock, reached = [0.0] * pp, [0] * pp
    asked: dict[tuple[int, Post], float] = {}
    passes = {}
    while any(reached[rank] < len(recorded[rank]) for rank in range(pp)):
        before = list(reached)
        for rank, notes in enumerate(recorded):
            for note in notes[reached[rank] :]:
                if isinstance(note, Pass):
                    stage, begin = note.chunk * pp + rank, clock[rank]
                    clock[rank] += (forward_s if note.kind == "F" else backward_s)[stage]
                    passes[note.kind, stage, note.microbatch] = (begin, clock[rank])
                elif isinstance(note, Post):
                    asked[rank, note] = clock[rank]
                else:
                    other = asked.get(_counterpart(rank, note.post, pp))
                    if other is None:
                        break
                    done = max(asked[rank, note.post], other) + p2p_s
                    clock[rank] = max(clock[rank], done)
                reached[rank] += 1
        assert reached != before, "the ranks wait for each other"
    return Played(max(clock), passes)


def _counterpart(rank: int, post: Post, pp: int) -> tuple[int, Post]:
    sends, forward = post.part == "send", post.way == "next"
    other = (rank + 1 if sends == forward else rank - 1) % pp
    return other, Post("recv" if sends else "send", post.way, post.number)


def megatron_warmup(rank: int, *, pp: int, vpp: int, microbatches: int, group: int) -> int:
    """Megatron's own number of warm-up passes of a rank."""
    neighbours = _Neighbours([], rank, pp, vpp if vpp > 1 else None)
    answer = schedules.get_pp_rank_microbatches(
        microbatches, vpp, group, p2p_communicator=neighbours
    )
    return answer[2]


class _Group:
    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


class _Neighbours:
    """Megatron's P2PCommunicator, noting what it is asked for."""

    def __init__(self, notes: list[Note], rank: int, pp: int, vpp: int | None) -> None:
        self.pp_group = _Group(rank, pp)
        self.virtual_pipeline_model_parallel_size = vpp
        self.total_stages, self.current_stage = pp, rank
        self.is_pp_first_stage, self.is_pp_last_stage = rank == 0, rank == pp - 1
        self.config = SimpleNamespace()
        self._notes = notes
        self._numbers: dict[tuple[str, str], Iterator[int]] = defaultdict(
            lambda: iter(range(10**9))
        )

    def _ask(self, wanted: Mapping[str, Any], waits: bool = True) -> dict[str, Any]:
        """The handles by the name of the transfer, such as send_next."""
        handles = {}
        for name in (name for name, is_wanted in wanted.items() if is_wanted):
            part, neighbour = name.split("_")
            way = neighbour if part == "send" else {"prev": "next", "next": "prev"}[neighbour]
            post = Post(part, way, next(self._numbers[part, way]))
            self._notes.append(post)
            handles[name] = SimpleNamespace(wait=lambda post=post: self._notes.append(Wait(post)))
        if waits:
            for handle in handles.values():
                handle.wait()
        return handles

    def recv_forward(self, _: Any, is_first_stage: bool) -> Any:
        self._ask({"recv_prev": not is_first_stage})

    def recv_backward(self, _: Any, is_last_stage: bool) -> Any:
        self._ask({"recv_next": not is_last_stage})

    def send_forward(self, _: Any, is_last_stage: bool) -> None:
        self._ask({"send_next": not is_last_stage})

    def send_backward(self, _: Any, is_first_stage: bool) -> None:
        self._ask({"send_prev": not is_first_stage})

    def send_forward_recv_backward(self, _: Any, __: Any, is_last_stage: bool) -> Any:
        self._ask({"send_next": not is_last_stage, "recv_next": not is_last_stage})

    def send_backward_recv_forward(self, _: Any, __: Any, is_first_stage: bool) -> Any:
        self._ask({"send_prev": not is_first_stage, "recv_prev": not is_first_stage})

    def send_forward_recv_forward(
        self, output_tensor: Any, recv_prev: bool, overlap_p2p_comm: bool = False, **_: Any
    ) -> Any:
        wanted = {"send_next": output_tensor is not None, "recv_prev": recv_prev}
        handles = self._ask(wanted, waits=not overlap_p2p_comm)
        return (None, handles) if overlap_p2p_comm else None

    def send_backward_recv_backward(
        self, input_tensor_grad: Any, recv_next: bool, overlap_p2p_comm: bool = False, **_: Any
    ) -> Any:
        wanted = {"send_prev": input_tensor_grad is not None, "recv_next": recv_next}
        handles = self._ask(wanted, waits=not overlap_p2p_comm)
        return (None, handles) if overlap_p2p_comm else None

    def send_forward_backward_recv_forward_backward(
        self, output: Any, gradient: Any, recv_prev: bool, recv_next: bool, **_: Any
    ) -> Any:
        sends = {"send_next": output is not None, "send_prev": gradient is not None}
        self._ask(sends | {"recv_prev": recv_prev, "recv_next": recv_next})
        return None, None


def _collection() -> Any:
    collection = schedules.ProcessGroupCollection()
    collection.tp = collection.cp = _Group(0, 1)
    return collection


def _config(pp: int, vpp: int, group: int | None, overlap: bool) -> SimpleNamespace:
    return SimpleNamespace(
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        microbatch_group_size_per_vp_stage=group or pp,
        hidden_size=1,
        timers=None,
        no_sync_func=None,
        grad_sync_func=None,
        param_sync_func=None,
        finalize_model_grads_func=None,
        num_microbatches_with_partial_activation_checkpoints=None,
        overlap_p2p_comm=overlap,
        overlap_p2p_comm_warmup_flush=False,
        overlap_moe_expert_parallel_comm=False,
        batch_p2p_comm=not overlap,
        sequence_parallel=False,
        variable_seq_lengths=True,
        deallocate_pipeline_outputs=True,
        calculate_per_token_loss=False,
    )
