"""Seconds of collectives, from latency and bandwidth of the links in a node and between nodes.

A group is described by its size and the distance between neighbouring ranks, which says how many of
them share a node. Megatron numbers ranks in the order tp, cp, dp, pp, of experts etp, ep, dp, pp.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from qwen35_mcore.planner.candidate import Candidate, Job
from qwen35_mcore.planner.hardware import Gpu

_NVLINK_S, _NETWORK_S = 8e-6, 18e-6
"""Latency of a message over either link."""
_LONGEST_RING = 16
"""Nodes; NCCL builds trees over more."""
_PEERS_AT_A_TIME = 8
"""NCCL's sends and receives to hundreds of ranks queue up."""


@dataclass(frozen=True)
class Group:
    """A process group: ``size`` ranks, ``stride`` apart."""

    size: int
    stride: int = 1

    def joined(self, gpu: Gpu) -> int:
        """Members that NVLink joins."""
        return max(1, min(self.size, gpu.nvlink_gpus // self.stride))


def groups_of(candidate: Candidate, job: Job) -> dict[str, Group]:
    """The groups of one rank; dp of data and context parallel ranks together, which share gradients
    and optimizer state, expert_dp of the ranks that hold the same experts."""
    return {
        "tp": Group(candidate.tp),
        "cp": Group(candidate.cp, candidate.tp),
        "dp": Group(candidate.dp(job) * candidate.cp, candidate.tp),
        "ep": Group(candidate.ep, candidate.etp),
        "etp": Group(candidate.etp),
        "expert_dp": Group(candidate.expert_dp(job), candidate.etp * candidate.ep),
        "pp": Group(candidate.pp, job.gpus // candidate.pp),
    }


def gather(total_bytes: float, group: Group, gpu: Gpu) -> float:
    """All-gather to, or reduce-scatter of, ``total_bytes`` on every rank: (n - 1) / n of them pass
    each link of a ring. Between nodes every member brings its own network card."""
    if group.size == 1:
        return 0.0
    members = group.joined(gpu)
    nodes = ceil(group.size / members)
    rate, latency_s = gpu.nvlink_bytes_per_s, (members - 1) * _NVLINK_S
    if nodes > 1:
        rate = min(rate, members * gpu.network_bytes_per_s)
        latency_s += min(nodes - 1, _LONGEST_RING) * _NETWORK_S
    return latency_s + total_bytes * (group.size - 1) / group.size / rate


def all_to_all(own_bytes: float, group: Group, gpu: Gpu) -> float:
    """Every rank sends an equal share of its ``own_bytes`` to every other; what stays in the node
    and what leaves it travel side by side."""
    if group.size == 1:
        return 0.0
    members, share = group.joined(gpu), own_bytes / group.size
    inside = _NVLINK_S + (members - 1) * share / gpu.nvlink_bytes_per_s
    if group.size == members:
        return inside
    peers = group.size - members
    turns = ceil(peers / _PEERS_AT_A_TIME)
    return max(inside, turns * _NETWORK_S + peers * share / gpu.network_bytes_per_s)


def send(total_bytes: float, group: Group, gpu: Gpu) -> float:
    """From one member to the next."""
    if group.size == 1:
        return 0.0
    if group.stride < gpu.nvlink_gpus:
        return _NVLINK_S + total_bytes / gpu.nvlink_bytes_per_s
    return _NETWORK_S + total_bytes / gpu.network_bytes_per_s
