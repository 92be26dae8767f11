"""The structure of the package: imports go down, and none of them closes a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from paths import ROOT

PACKAGE = ROOT / "src" / "hpetr"
# From the top down. A folder imports from those below it, never from those above or beside it.
LAYERS = (
    ("cli",),
    ("training",),
    ("evaluation", "export", "server"),
    ("inference",),
    ("checkpoints", "data", "video"),
    ("model", "runtime"),
    ("poses",),
    ("images",),
    ("errors",),
)
LEVEL = {name: level for level, names in enumerate(reversed(LAYERS)) for name in names}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the names of hpetr's modules, or of names in them, that a file imports anywhere, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hpetr":
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "hpetr":
                    yield alias.name, node.lineno


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_modules(path: Path) -> set[str]:
    """Return the modules that a file imports; of a name in a module, the module."""
    found = set()
    for name, _ in imports(path):
        found.add(name if name in MODULES else name.rpartition(".")[0])
    return found & MODULES.keys() - {"hpetr"}


def test_every_folder_has_a_layer() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders | {"errors"} == set(LEVEL)


def test_imports_go_down() -> None:
    wrong = []
    for module, path in MODULES.items():
        own = module.split(".")[1] if "." in module else ""
        if own not in LEVEL:  # the package itself names its public parts
            continue
        for name, line in imports(path):
            other = name.split(".")[1] if "." in name else ""
            if other in LEVEL and other != own and LEVEL[other] >= LEVEL[own]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {own} imports {name}")
    assert not wrong


def test_no_circle_of_imports() -> None:
    """Imports within functions count too: they hide a circle, they do not open it."""
    graph = {module: imported_modules(path) - {module} for module, path in MODULES.items() if module != "hpetr"}
    # A package's __init__ runs before any of its modules: it is what imports it, not what its modules import.
    list(TopologicalSorter(graph).static_order())


def test_few_entries_in_the_package() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if not path.name.startswith(("_", "."))]
    entries.remove("py.typed")
    assert len(entries) <= 16, entries
