"""Which part of the project may import which: an import goes down, never up, and nothing outside reaches inside."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rvsm_kernels as rk

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "rvsm_kernels"
MAY_IMPORT = {
    "method": {"method"},
    "engines": {"method", "engines", "_C"},
    "model": {"method", "dist", "model"},
    "dist": {"method", "engines", "dist"},
    "optim": {"method", "engines", "model", "dist", "optim"},
    "integrations": {"method", "model", "optim", "integrations"},
}
TOOLS_OF_TRITON = {"host_triton.py", "static_triton.py"}
"""They measure the inside of the Triton engine."""


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(absolute module, name) of every import in a file; the name is empty for ``import module``."""
    here = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def used_parts(path: Path) -> set[str]:
    """The parts of the package that a file of it imports."""
    parts = set()
    for module, name in imports(path):
        names = f"{module}.{name}".split(".")
        if names[0] == "rvsm_kernels" and len(names) > 1 and names[1]:
            parts.add(names[1])
    return parts


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_go_down(part: str) -> None:
    files = list((PACKAGE / part).rglob("*.py"))
    assert len(files) > 2
    for path in files:
        assert used_parts(path) <= MAY_IMPORT[part], path.name


def test_how_imports_are_found() -> None:
    """Relative ones, those inside functions, and those of a module by its package."""
    assert {"method", "engines", "dist"} <= used_parts(PACKAGE / "optim" / "split_optimizer.py")
    assert {"method", "model"} <= used_parts(PACKAGE / "optim" / "reading.py")
    assert "_C" in used_parts(PACKAGE / "engines" / "native.py")
    assert ("rvsm_kernels.engines.triton.engine", "TritonEngine") in imports(PACKAGE / "engines" / "registry.py")


@pytest.mark.parametrize("folder", ["bench", "examples"])
def test_public_names_only(folder: str) -> None:
    files = [path for path in (ROOT / folder).rglob("*.py") if path.name not in TOOLS_OF_TRITON]
    users = 0
    for path in files:
        for module, name in imports(path):
            if module.split(".")[0] == "rvsm_kernels":
                users += 1
                if module.startswith("rvsm_kernels.integrations."):
                    assert name == "SparseWeightsCallback", f"{path.name}: {module} {name}"
                    continue
                assert module == "rvsm_kernels" and (not name or name in rk.__all__), f"{path.name}: {module} {name}"
    assert users > 2
