"""``import qwen35_mcore``: what it offers, and that it is light."""

from __future__ import annotations

import subprocess
import sys

import pytest

import qwen35_mcore


@pytest.mark.parametrize("name", qwen35_mcore.__all__)
def test_every_name_is_there(name: str) -> None:
    value = getattr(qwen35_mcore, name)
    assert name in dir(qwen35_mcore)
    assert not callable(value) or value.__doc__


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qwen35_mcore.nothing


def test_importing_it_imports_no_torch() -> None:
    code = (
        "import sys, qwen35_mcore; qwen35_mcore.get_flavor('4b'); qwen35_mcore.ConfigError\n"
        "heavy = {'torch', 'numpy', 'megatron', 'transformers'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
