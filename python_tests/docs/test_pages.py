"""Every code block of README.md and of the site's pages runs, in order, page by page.

A page's blocks share one namespace. Comments in a page, which no reader sees, help:
``<!-- hidden``, lines of Python, ``-->`` runs what the page takes for given;
``<!-- not run: why -->`` before a block says that it is only compiled.
Of a diff, what it leaves behind runs. Of a shell block, every ``python`` line names
what exists: a script or module, and options that its ``--help`` knows; every ``make`` line a target.
"""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import rvsm_kernels

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md", ROOT / "examples" / "README.md"]
SLOW = {"frameworks.md", "shipping.md", "start-transformer.md"}
"""Pages that train for half a minute, or import what `make .venv/frameworks` brings."""


@dataclass(frozen=True)
class Block:
    """Code of a page: its language, its text, its first line's number, and why it is not run ("" if it is)."""

    language: str
    code: str
    line: int
    not_run: str = ""


def blocks(page: Path) -> Iterator[Block]:
    """The code blocks of a page and its hidden ones, in order."""
    lines, reason = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1)), ""
    for number, line in lines:
        fence = re.match(r"( *)```(\w*)", line)
        if note := re.fullmatch(r" *<!-- not run: (.+) -->", line):
            reason = note[1]
        elif fence or line == "<!-- hidden":
            indent, end = (len(fence[1]), "```") if fence else (0, "-->")
            code = []
            for _, inside in lines:
                if inside.strip() == end:
                    break
                code.append(inside[indent:])
            yield Block(fence[2] if fence else "python", "\n".join(code) + "\n", number, reason)
            reason = ""


def as_python(block: Block) -> str | None:
    """What a block leaves to run, or None for one that is no Python."""
    if block.language == "diff":
        return re.sub(r"^[+ ]", "", re.sub(r"^-.*\n", "", block.code, flags=re.MULTILINE), flags=re.MULTILINE)
    return block.code if block.language == "python" else None


def test_blocks_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- hidden\na = 1\n-->\n\n```diff\n-old = 0\n+new = 2\n```\n- item\n\n  ```python\n  b = 3\n  ```\n"
        "<!-- not run: no device -->\n```python\nc\n```\n```\ntext\n```\n"
    )
    found = list(blocks(page))
    assert [as_python(block) for block in found] == ["a = 1\n", "new = 2\n", "b = 3\n", "c\n", None]
    assert [block.line for block in found] == [1, 5, 11, 15, 18]
    assert [block.not_run for block in found] == ["", "", "", "no device", ""]


def with_python() -> list[Any]:
    """Pages that have Python, some as slow tests."""
    pages = [page for page in PAGES if any(as_python(block) for block in blocks(page))]
    return [pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.name in SLOW else []) for page in pages]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", with_python())
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a page may write files
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    try:
        for block in blocks(page):
            code = as_python(block)
            if code is not None:
                # Lines of an error are the page's.
                compiled = compile("\n" * block.line + code, str(page), "exec")
                if not block.not_run:
                    exec(compiled, namespace)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_few_blocks_are_not_run() -> None:
    left = {f"{page.name}:{block.line}" for page in PAGES for block in blocks(page) if block.not_run}
    assert len(left) <= 3, left


@functools.cache
def help_of(*command: str) -> str:
    """What a command says of its options."""
    run = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def commands(program: str) -> list[Any]:
    """The lines of all shell blocks that begin with a program, each once."""
    found: dict[str, Any] = {}
    for page in COMMANDS:
        for block in blocks(page):
            for line in block.code.splitlines() if block.language in ("", "sh", "console") else ():
                if not re.match(rf"\S*\b{program} ", line):
                    continue
                words = shlex.split(line, comments=True)
                if words[0].rpartition("/")[2] == program:
                    found[" ".join(words)] = pytest.param(words[1:], id=f"{page.stem}-{' '.join(words)}")
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("words", commands("python"))
def test_python_commands_exist(words: list[str]) -> None:
    if words[:2] == ["-m", "torch.distributed.run"]:
        words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
    script = words[:2] if words[0] == "-m" else words[:1]
    if script == ["-m", "rvsm_kernels"]:
        return
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file()
    rest = words[len(script) :]
    if script == ["-m", "bench"] and rest and not rest[0].startswith("-"):
        script, rest = [*script, rest[0]], rest[1:]
    known = help_of(*script) if any(word.startswith("--") for word in rest) else ""
    assert [word for word in rest if word.startswith("--") and word.partition("=")[0] not in known] == []


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rules = re.findall(r"^([\w ./-]+):", makefile.replace("$(VENV)", ".venv"), re.MULTILINE)
    targets = {name for line in rules for name in line.split()}
    asked = {word for param in commands("make") for word in param.values[0] if "=" not in word}
    assert asked <= targets and {"bench", "test"} <= asked


def test_the_version_is_one() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    released = re.findall(
        r"^## \[(\d\S*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert released[0][0] == rvsm_kernels.__version__
    assert f"\nversion: {released[0][0]}\ndate-released: {released[0][1]}\n" in citation
