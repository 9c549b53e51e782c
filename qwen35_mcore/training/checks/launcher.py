"""Which rank of how many this process is: what a launcher has put into the environment."""

from __future__ import annotations

import os

from qwen35_mcore.errors import ConfigError

OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and launch/rank.sh tell a rank."""
TASKS_OF_OTHER_LAUNCHERS = (
    *("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
)
"""Which say how many processes were started: srun, Open MPI and other MPIs set no RANK beside."""


def run_alone_without_a_launcher() -> None:
    """Plain ``python`` instead of torchrun: a run of one process.

    Raises:
        ConfigError: srun or mpirun has started several, each of which would train by itself into
            the same folder; or a launcher has set a part of what a rank needs.
    """
    launched = "RANK" in os.environ
    wrong = _wrong_of_a_rank() if launched else _wrong_of_a_process_alone()
    if wrong:
        raise ConfigError(
            "the environment does not say which rank of how many this process is",
            got=", ".join(wrong),
            allowed=f"{', '.join(OF_A_LAUNCHER)}, as torchrun sets them; none of them for a run of "
            "one process",
            fix="start one process a node with torchrun in front of the script; under SLURM submit "
            "launch/slurm.sbatch",
        )
    if not launched:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")  # any free one: nobody else has to find it


def _wrong_of_a_rank() -> list[str]:
    given = {name: os.environ.get(name, "") for name in OF_A_LAUNCHER}
    needed = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [f"no {name}" for name in needed if not given[name]]
    numbers = {name: text for name, text in given.items() if text and name != "MASTER_ADDR"}
    wrong = [f"{name}={text}" for name, text in numbers.items() if not text.isdecimal()]
    if not missing and not wrong and int(given["RANK"] or 0) >= int(given["WORLD_SIZE"]):
        wrong = [f"RANK={given['RANK']} of WORLD_SIZE={given['WORLD_SIZE']}"]
    return missing + wrong


def _wrong_of_a_process_alone() -> list[str]:
    tasks = {name: os.environ.get(name, "") for name in TASKS_OF_OTHER_LAUNCHERS}
    several = {name: text for name, text in tasks.items() if text.isdecimal() and int(text) > 1}
    return [f"{name}={text}, and no RANK" for name, text in several.items()]
