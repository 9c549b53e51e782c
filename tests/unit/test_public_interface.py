"""``import qwen35_mcore``: what it offers, that it is light, and that its example works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import qwen35_mcore

ROOT = Path(__file__).parents[2]


def run(code: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which sees no GPU."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("name", qwen35_mcore.__all__)
def test_every_name_is_there(name: str) -> None:
    value = getattr(qwen35_mcore, name)
    assert name in dir(qwen35_mcore)
    assert not callable(value) or value.__doc__


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qwen35_mcore.nothing


def test_importing_it_imports_no_torch() -> None:
    done = run(
        "import sys, qwen35_mcore; qwen35_mcore.get_flavor('4b'); qwen35_mcore.ConfigError\n"
        "heavy = {'torch', 'numpy', 'megatron', 'transformers'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    assert done.returncode == 0, done.stderr


DOCSTRING = textwrap.dedent(
    "\n".join(
        line for line in (qwen35_mcore.__doc__ or "").splitlines() if line[:4] in ("    ", "")
    )
)
README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
LOOK = """
assert losses.shape == (1, 64) and losses.dtype == torch.float32
uniform = torch.tensor(float(model_config.vocab_size)).log()
assert (losses.mean() - uniform).abs() < 0.2, losses.mean()
for name, parameter in model.named_parameters():
    assert parameter.grad is not None and parameter.grad.isfinite().all(), name
"""


@pytest.mark.parametrize("example", dict.fromkeys(text.strip() for text in (DOCSTRING, *README)))
def test_the_documented_example_computes_a_loss_and_gradients(example: str) -> None:
    done = run(example + LOOK)
    assert done.returncode == 0, done.stderr


def test_sizes_that_do_not_divide_the_ranks_are_one_error() -> None:
    done = run(
        "import qwen35_mcore as qwen35\n"
        "try:\n"
        "    qwen35.initialize_model_parallel(tensor_model_parallel_size=2)\n"
        "except qwen35.ConfigError as error:\n"
        "    assert 'got: 1 ranks' in str(error) and 'fix: ' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('no error')\n"
    )
    assert done.returncode == 0, done.stderr
