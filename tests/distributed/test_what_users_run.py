"""The training script with a user's flags: the same numbers in the log in every layout.

Documents are unequal and their ends do not count, so microbatches and ranks count unequal numbers
of tokens.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.kinds import kinds
from tests.helpers.pretrain_runs import script_server, small_dataset
from tests.helpers.run_results import logged_scalars

PACKED = ("--dataloader-inter-document-masking",)
CP2 = ("--context-parallel-size", "2")
TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
EP2 = ("--expert-model-parallel-size", "2")
LOSSES = ("lm loss", "mtp_1 loss", "global_load_balancing_loss", "grad-norm")


def flags(microbatch: int, *more: str) -> list[str]:
    return [
        *("--flavor", "tiny-moe", "--data-path", small_dataset(), "--split", "80,10,10"),
        *("--seq-length", "512", "--global-batch-size", "4", "--eod-mask-loss"),
        *("--micro-batch-size", str(microbatch), "--num-workers", "0", "--log-interval", "1"),
        *("--lr", "1e-3", "--min-lr", "1e-4", "--eval-iters", "0"),
        *more,
    ]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to start from: random ones depend on the layout."""
    folder = tmp_path_factory.mktemp("start")
    saving = ("--train-iters", "1", "--save", str(folder), "--save-interval", "1")
    script_server().run(flags(1, *saving))
    return folder


def logged(start: Path, log: Path, world: int, microbatch: int, *more: str) -> dict[str, float]:
    begin = ("--load", str(start), "--finetune", "--no-load-optim", "--no-load-rng")
    end = ("--train-iters", "1", "--tensorboard-dir", str(log))
    script_server().run(flags(microbatch, *begin, *end, *more), world)
    scalars = logged_scalars(log, LOSSES)
    return {name: scalars[name][1][0] for name in LOSSES}


CASES = {
    "DP2": (2, 2, ()),
    "EP2": (2, 2, EP2),
    "CP2": (2, 1, CP2),
    "PP2": (2, 1, PP2),
    "CP2, documents": (2, 1, (*CP2, *PACKED)),
    "CP2 x TP2, documents": (4, 1, (*CP2, *TP2, *PACKED)),
    "CP2 x PP2, documents": (4, 1, (*CP2, *PP2, *PACKED)),
}
"""Ranks, samples that are forwarded at once, flags."""


@pytest.mark.parametrize("name", kinds(CASES, ("DP2", "CP2, documents")))
def test_the_log_equals_one_process(name: str, start: Path, tmp_path: Path) -> None:
    world, at_once, parallel = CASES[name]
    alone = PACKED if "documents" in name else ()
    expected = logged(start, tmp_path / "one", 1, at_once, *alone)
    found = logged(start, tmp_path / "ranks", world, 1, *parallel)
    # MTP weighs the tokens of a microbatch by how many of them have a token after next
    norm = 1e-4 if at_once > 1 else 2e-5
    assert found.pop("grad-norm") == pytest.approx(expected.pop("grad-norm"), rel=norm)
    assert found == pytest.approx(expected, rel=1e-6)


def test_what_is_chosen_is_said_once() -> None:
    """Values of megatron's flags that are this package's reach a run, which says what it took."""
    auto = ("--cuda-graph-impl", "auto", "--moe-token-dispatcher-type", "auto", *EP2)
    output = script_server().run(flags(1, *auto, "--train-iters", "1"), 2).output()
    for line in (
        "CUDA graphs: none, chosen because there is no CUDA device",
        "exchange of the experts' tokens: all-to-all, chosen because",
        "GDN kernels: torch, chosen because",
    ):
        assert output.count(line) == 1, line
    quiet = script_server().run(flags(1, "--train-iters", "1", "--logging-level", "30"))
    assert "chosen because" not in quiet.output()
