"""The import law: a layer sees only the layers below it, and only `runtime` sees processes."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatree"
# Layer -> the other layers that it may import. `cli`, `recipes` and the top see all of them.
SEES: dict[str, set[str]] = {
    "functional": set(),
    "models": {"functional"},
    "parallel": {"functional"},
    "io": {"functional", "parallel"},
    "runtime": {"functional", "parallel", "io"},
}
SEE_ALL = {"cli", "recipes", "__init__", "__main__"}
PROCESSES = ("torch.distributed", "torch._C._distributed")
TALKS_TO_PROCESSES = ("runtime/", "io/formats/dcp.py")


def violations(source: str, path: str) -> list[str]:
    """Return what breaks the law in `source`, the file at `path` relative to the package."""
    layer = path.split("/")[0].removesuffix(".py")
    if layer not in SEES and layer not in SEE_ALL:
        return [f"{path}: '{layer}' is no layer of the package"]
    found = []
    for line, name in imports(ast.parse(source), path):
        top, _, rest = name.partition(".")
        if top == "megatree" and layer in SEES:
            other = rest.split(".")[0]
            if other not in SEES[layer] | {layer}:
                found.append(f"{path}:{line}: {layer} imports {name}")
        if name.startswith(PROCESSES) and not path.startswith(TALKS_TO_PROCESSES):
            found.append(f"{path}:{line}: {name} outside runtime")
    return found


def imports(tree: ast.Module, path: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of all that a module at `path` imports, also inside functions.

    `from a import b` counts as `a.b`: `b` may be a module. A use of `torch.distributed` through
    `torch` counts as its import, and so does a literal name given to `import_module`.
    """
    package = ["megatree", *path.split("/")[:-1]]
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, name.name) for name in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = package[: len(package) + 1 - level] if level else []
                start = ".".join([*base, *([module] if module else [])])
                yield from ((node.lineno, f"{start}.{name.name}") for name in names)
            case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):
                yield node.lineno, "torch.distributed"
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]) if ast.unparse(
                func
            ).endswith(("import_module", "__import__")):
                yield node.lineno, name


def test_the_package_obeys_the_law() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 5, f"{PACKAGE} holds too little to judge"
    found = [
        line
        for file in files
        for line in violations(
            file.read_text(encoding="utf-8"), file.relative_to(PACKAGE).as_posix()
        )
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("functional/ops.py", "import megatree.parallel.types"),
        ("functional/ops.py", "from megatree.runtime import step"),
        ("functional/ops.py", "from megatree import io"),
        ("functional/ops.py", "import megatree as mt"),
        ("functional/ops.py", "from .. import parallel"),
        ("functional/ops.py", "from ..parallel import types"),
        ("functional/ops.py", "def f():\n    from megatree.models import gpt"),
        ("functional/ops.py", "from importlib import import_module\nimport_module('megatree.io')"),
        ("models/gpt.py", "from megatree.parallel import Rules"),
        ("models/llama/hf.py", "from ...io import formats"),
        ("parallel/plan.py", "from megatree.models import gpt"),
        ("parallel/plan.py", "from megatree.io.data import tokens"),
        ("io/checkpoint/save.py", "from megatree.runtime.world import World"),
        ("runtime/step.py", "from megatree.models import gpt"),
        ("runtime/step.py", "from megatree.recipes import demo"),
        ("io/data/tokens.py", "import torch.distributed as dist"),
        ("io/data/tokens.py", "from torch import distributed"),
        ("io/formats/dcp_more.py", "from torch.distributed.checkpoint import load"),
        ("parallel/mesh.py", "import torch\nworld = torch.distributed.get_world_size()"),
        ("cli/main.py", "from torch._C._distributed_c10d import ProcessGroup"),
        ("utils/misc.py", ""),
        ("misc.py", ""),
    ],
)
def test_a_violation_is_seen(path: str, source: str) -> None:
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("functional/ops.py", "import torch\nfrom megatree.functional.param import Param"),
        ("functional/ops.py", "from . import param\nfrom .param import Param"),
        ("models/gpt.py", "from megatree import functional as F"),
        ("io/checkpoint/save.py", "from megatree.parallel import types"),
        ("io/formats/dcp.py", "import torch.distributed.checkpoint"),
        ("runtime/gloo.py", "import torch.distributed\nfrom megatree.io import checkpoint"),
        ("recipes/demo.py", "import megatree.runtime\nimport megatree.models.gpt"),
        ("cli/__init__.py", "import megatree as mt"),
        ("__init__.py", "from megatree.runtime import step"),
    ],
)
def test_what_the_law_allows_passes(path: str, source: str) -> None:
    assert violations(source, path) == []
