"""A module imports only from layers below its own, or from its own package; the daemons never from each other.

Imports inside functions and under TYPE_CHECKING count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "termite"

LAYERS = [
    "errors",
    "logs",
    "loop",
    "paths",
    "attr",
    "command",
    "wire",
    "store",
    "mirror",
    "web",
    "coordinator",
    "worker",
    "master",
    "cli",
]
"""Low to high."""

STRANGERS = {"coordinator", "worker", "master"}
"""Daemons talk over the network only."""

FREE_FOR_ALL = {"__version__"}
"""What every module may take from the package itself."""


def layer_of(module: str) -> str:
    """`termite.wire.rpc` -> `wire`; the package itself has none."""
    return module.partition(".")[2].partition(".")[0]


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, module or name) of everything of ours that is imported, wherever in the file."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module or "") if part)
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}"


def breaches(source: str, module: str, is_package: bool = False) -> list[str]:
    own = layer_of(module)
    found = []
    for line, name in imports(ast.parse(source), module, is_package):
        if name.split(".")[0] != "termite":
            continue
        other = layer_of(name)
        if other in FREE_FOR_ALL or other == own:
            continue
        if other not in LAYERS:
            found.append(f"{module}:{line}: {name} belongs to no layer")
        elif own not in LAYERS or LAYERS.index(other) > LAYERS.index(own):
            found.append(f"{module}:{line}: {own or 'termite'} must not know {name}")
        elif own in STRANGERS and other in STRANGERS:
            found.append(f"{module}:{line}: {own} and {other} talk over the network only")
    return found


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["termite", *path.relative_to(PACKAGE).with_suffix("").parts]
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def test_every_module_belongs_to_a_layer() -> None:
    assert [name for name, _ in modules() if name != "termite" and layer_of(name) not in LAYERS] == []


def test_no_module_imports_from_above() -> None:
    found = []
    for name, path in modules():
        found += breaches(path.read_text("utf-8"), name, path.name == "__init__.py")
    assert found == []


def test_every_way_to_import_is_seen() -> None:
    for source in (
        "import termite.master.pool",
        "import os, termite.master.pool as p",
        "from termite.master import pool",
        "from termite import master",
        "from ..master import pool",
        "from .. import master",
        "def f():\n    from termite.master.pool import Pool",
        "if TYPE_CHECKING:\n    from termite.master.pool import Pool",
    ):
        assert len(breaches(source, "termite.wire.rpc")) == 1, source
    assert len(breaches("from . import master", "termite", is_package=True)) == 1
    assert len(breaches("from ..master import pool", "termite.wire.sub", is_package=False)) == 1


def test_what_is_allowed_is_not_reported() -> None:
    for source, module in (
        ("import os\nfrom os import path\nimport termites", "termite.errors"),
        ("from termite import __version__", "termite.errors"),
        ("from termite.wire.codec import encode\nfrom . import codec\nfrom .codec import encode", "termite.wire.rpc"),
        ("from termite.errors import TermiteError\nfrom termite import paths", "termite.wire.rpc"),
        ("from termite.master.daemon import Master\nfrom termite.worker.daemon import Worker", "termite.cli.master"),
    ):
        assert breaches(source, module) == [], source


def test_the_daemons_are_strangers_in_either_direction() -> None:
    assert breaches("from termite.worker import slots", "termite.master.pool") != []
    assert breaches("from termite.master import pool", "termite.worker.slots") != []
    assert breaches("import termite.coordinator.registry", "termite.worker.daemon") != []
