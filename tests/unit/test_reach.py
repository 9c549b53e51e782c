"""What this package takes from megatron-core, torch, Transformer Engine and FLA, and where.

Another release of megatron-core concerns `qwen35_mcore/mcore`: only there megatron is imported, an
attribute of these packages replaced, or a private name of theirs used.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen35_mcore.mcore import imports
from tests.helpers.distributed import WorkerPool

ROOT = Path(__file__).parents[2]
FOLDERS = ("qwen35_mcore", "checkpoint_tools", "examples", "launch")
REACHED = ("megatron", "torch", "transformer_engine", "fla", "triton")
TABLE = "qwen35_mcore.mcore.imports"

PRIVATE = {
    "torch.distributed.distributed_c10d._get_default_store": "torch has no public name for it",
    "torch.distributed.checkpoint.filesystem._StorageInfo": "named in the metadata of checkpoints",
    "torch._utils._rebuild_tensor_v2": "named in every pickle of a tensor",
}
"""Private names that are used outside `qwen35_mcore/mcore`, each with its reason."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A module of ours outside `qwen35_mcore/mcore`.

    Attributes:
        reached: names in it that are a module, class or function of `REACHED`, each with its
            dotted path.
    """

    path: str
    tree: ast.Module
    reached: dict[str, str]

    def dotted(self, node: ast.expr) -> str | None:
        """``torch.cuda.x`` for an attribute of something of `REACHED`, by whatever name."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id not in self.reached:
            return None
        return ".".join([self.reached[node.id], *reversed(parts)])


def source(path: str, text: str) -> Source:
    tree = ast.parse(text)
    reached: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in REACHED:
                    name = alias.asname or alias.name.partition(".")[0]
                    reached[name] = alias.name if alias.asname else name
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if node.module.partition(".")[0] in REACHED or node.module == TABLE:
                    reached[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                elif f"{node.module}.{alias.name}" == TABLE:
                    reached[alias.asname or alias.name] = TABLE
    return Source(path, tree, reached)


def sources() -> Iterator[Source]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if not name.startswith("qwen35_mcore/mcore/"):
                yield source(name, path.read_text())


def megatron_imports(module: Source) -> Iterator[str]:
    for node in ast.walk(module.tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            names = [str(node.args[0].value)] if called in ("import_module", "__import__") else []
        yield from (f"{module.path}: {n}" for n in names if n.partition(".")[0] == "megatron")


def replacements(module: Source) -> Iterator[str]:
    """Assignments to an attribute of a module or class of `REACHED`."""
    for node in ast.walk(module.tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = [part for target in node.targets for part in ast.walk(target)]  # type: ignore[misc]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            targets = [ast.Attribute(value=node.args[0], attr="?")]
        for target in targets:
            is_changed = isinstance(target, ast.Attribute) and not isinstance(
                getattr(target, "ctx", None), ast.Load
            )
            if is_changed and (dotted := module.dotted(target)):
                yield f"{module.path}: {dotted}"


def private_names(module: Source) -> Iterator[str]:
    attributes = [node for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)]
    inner = [node.value for node in attributes]
    whole = (module.dotted(node) or "" for node in attributes if node not in inner)
    for dotted in (*whole, *module.reached.values()):
        if any(part.startswith("_") and not part.endswith("__") for part in dotted.split(".")):
            yield f"{module.path}: {dotted}"


@pytest.mark.parametrize("find", [megatron_imports, replacements], ids=lambda find: find.__name__)
def test_only_mcore_knows_megatron(find) -> None:  # type: ignore[no-untyped-def]
    assert [line for module in sources() for line in find(module)] == []


def test_private_names() -> None:
    found = {line.partition(": ")[2] for module in sources() for line in private_names(module)}
    assert found == set(PRIVATE)


@pytest.mark.parametrize(
    ("find", "text"),
    [
        (megatron_imports, "import megatron.core as m"),
        (megatron_imports, "def f():\n    from megatron.core import mpu"),
        (megatron_imports, "import importlib\nimportlib.import_module('megatron.core')"),
        (replacements, "import torch\ntorch.cuda.synchronize = None"),
        (replacements, "import torch as t\nsetattr(t.Tensor, 'to', None)"),
        (replacements, "from fla.ops import gate\ngate.x, y = 1, 2"),
        (replacements, f"from {TABLE} import GPTModel\nGPTModel.forward = None"),
        (replacements, "from qwen35_mcore.mcore import imports\nimports.mpu.x = None"),
        (private_names, "import torch\ntorch._C._x()"),
        (private_names, "from torch.nn.modules import _functions"),
    ],
)
def test_these_tests_can_fail(find, text: str) -> None:  # type: ignore[no-untyped-def]
    assert list(find(source("x.py", text)))


def test_every_name_of_the_table_is_used() -> None:
    used = {
        dotted.removeprefix(f"{TABLE}.").partition(".")[0]
        for module in sources()
        for node in ast.walk(module.tree)
        for dotted in (
            [module.dotted(node)]
            if isinstance(node, ast.Attribute)
            else [module.reached.get(node.id)]
            if isinstance(node, ast.Name)
            else []
        )
        if dotted and dotted.startswith(f"{TABLE}.")
    }
    assert set(imports.NAMES) - used == set()


def test_every_name_of_the_table_exists(pool: WorkerPool) -> None:
    assert pool.run(missing_names, 1) == [[]]


def missing_names() -> list[str]:
    from qwen35_mcore.errors import ConfigError

    missing = []
    for name in imports.NAMES:
        try:
            getattr(imports, name)
        except ConfigError:
            missing.append(name)
        except ImportError:
            assert name == "TESpecProvider"  # where Transformer Engine is not installed
    return missing


def test_the_model_derives_from_the_listed_classes(pool: WorkerPool) -> None:
    """And replaces, or calls where it is private, what the list says of each."""
    listed = {name: methods.split() for name, methods in imports.BASE_CLASSES.items()}
    assert pool.run(derived, 1) == [listed]


def derived() -> dict[str, list[str]]:
    """By class of megatron's: its methods that classes of ours replace, or call though private."""
    found: dict[str, set[str]] = {}
    for module in sources():
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ClassDef):
                continue
            for base in node.bases:
                dotted = module.dotted(base) or ""
                if dotted.startswith(f"{TABLE}."):
                    name = dotted.rpartition(".")[2]
                    found.setdefault(name, set()).update(taken(node, getattr(imports, name)))
    return {name: sorted(found[name]) for name in sorted(found)}


def taken(node: ast.ClassDef, base: type) -> Iterator[str]:
    """Methods that megatron's own classes define, not those of torch above them."""
    of_megatron = {
        name
        for cls in inspect.getmro(base)
        if cls.__module__.startswith("megatron.")
        for name, value in vars(cls).items()
        if callable(getattr(value, "__func__", value)) and not name.startswith("__")
    }
    for part in ast.walk(node):
        is_method = isinstance(part, ast.FunctionDef) and part in node.body
        if is_method and part.name in of_megatron - {"forward", "sharded_state_dict"}:
            yield part.name
        is_private = isinstance(part, ast.Attribute) and part.attr.startswith("_")
        if is_private and part.attr in of_megatron:
            yield part.attr
