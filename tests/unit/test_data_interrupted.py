"""Tokenizing that is interrupted leaves no dataset and no process, and says so in one message."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.helpers.text_data import write_jsonl

ROOT = Path(__file__).parents[2]


def start_tokenizing(
    folder: Path, documents: int, *, workers_wait: Path | None = None
) -> tuple[subprocess.Popen[str], list[Path]]:
    """A run with two workers in a session of its own, and the files that were there before it.

    Args:
        workers_wait: a folder in which a worker says that it has started, before it imports
            anything of ours; it goes on once the folder holds ``go``.
    """
    source = write_jsonl(folder / "a.jsonl", ["x" * 5000] * documents)
    script = folder / "run.py"
    script.write_text(
        "import os, signal, time\n"
        "from pathlib import Path\n"
        f"waits = {workers_wait and str(workers_wait)!r}\n"
        "if __name__ == '__mp_main__' and waits:\n"
        "    Path(waits, str(os.getpid())).touch()\n"
        "    while not Path(waits, 'go').exists(): time.sleep(0.01)\n"
        "from qwen35_mcore import data\n"
        "if __name__ == '__main__':\n"
        # a shell's background job, and so a test run in one, starts with SIGINT ignored
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"    data.tokenize(inputs=[{str(source)!r}], tokenizer='byte', workers=2,\n"
        f"                  output_prefix={str(folder / 'out')!r})\n"
    )
    process = subprocess.Popen(
        [sys.executable, script],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return process, [source, script]


class TestInterruption:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
    def test_no_dataset_and_no_process_is_left(self, tmp_path: Path, number: int) -> None:
        process, before = start_tokenizing(tmp_path, 16_000)
        partial = tmp_path / "out.bin.partial"
        wait_for(lambda: partial.exists() and partial.stat().st_size > 2_000_000, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        if number == signal.SIGINT:  # a terminal sends it to the whole group
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, errors = process.communicate(timeout=300)
        assert process.returncode != 0
        assert not (tmp_path / "out.idx").exists()
        if number == signal.SIGINT:
            assert errors.count("\nKeyboardInterrupt") == 1, errors
            assert sorted(tmp_path.iterdir()) == before
        assert len(workers) >= 2
        assert not psutil.wait_procs(workers, timeout=300)[1]

    def test_ctrl_c_while_workers_start_is_one_traceback(
        self, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """Starts are slow on a cluster's file system; workers stay silent then, too."""
        starting = tmp_path_factory.mktemp("starting")
        process, before = start_tokenizing(tmp_path, 4000, workers_wait=starting)
        wait_for(lambda: len(list(starting.iterdir())) == 2, process)
        os.killpg(process.pid, signal.SIGINT)
        (starting / "go").touch()
        _, errors = process.communicate(timeout=300)
        assert process.returncode != 0
        assert errors.count("Traceback") == errors.count("\nKeyboardInterrupt") == 1, errors
        assert sorted(tmp_path.iterdir()) == before


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.002)
