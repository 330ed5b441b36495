"""``python -m bench report``: Markdown and plots from the JSON, and the README's numbers from it alone."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from . import tables
from .config import RESULTS, ROOT
from .results import Result, read_json

README = ROOT / "README.md"
REPORT = "report.md"

_SOURCES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "headline": ("throughput", tables.headline),
    **{kind: (kind, render) for kind, render in tables.KINDS.items()},
}
"""Block name to (result file, its table)."""


def render(folder: Path, name: str) -> str:
    """The text of one block from the results in a folder.

    Raises:
        ValueError: a block name that does not exist.
    """
    if name not in _SOURCES:
        raise ValueError(f"unknown block bench:{name} (choose one of {', '.join(_SOURCES)})")
    kind, table = _SOURCES[name]
    result = read_json(folder / f"{kind}.json")
    return tables.NOT_MEASURED if result is None else table(result)


def write_folder(folder: Path) -> list[Path]:
    """report.md and the plots beside the JSON of a folder; returns what was written."""
    found = [kind for kind in tables.KINDS if (folder / f"{kind}.json").exists()]
    if not found:
        return []
    written = []
    result = read_json(folder / "throughput.json")
    if result is not None:
        from .plots import PLOTS  # matplotlib is needed here only

        written = [folder / name for name, draw in PLOTS.items() if draw(result, folder / name)]
    parts = ["# Benchmark report"]
    for kind in found:
        parts.append(f"## {kind.capitalize()}\n\n{render(folder, kind)}")
        if kind == "throughput":
            parts += [f"![{path.stem}]({path.name})" for path in written]
    report = folder / REPORT
    report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [report, *written]


def _block(mark: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {mark}:([\w./-]+) -->\n).*?(<!-- /{mark}:\2 -->)", re.DOTALL)


def fill(text: str, mark: str, content: Callable[[str], str]) -> str:
    """A text with the content of its blocks ``<!-- mark:NAME -->`` made anew from their names.

    Raises:
        ValueError: a block that is not closed.
    """
    block = _block(mark)
    opened = len(re.findall(rf"<!-- {mark}:", text))
    closed = len(block.findall(text))
    if opened != closed:
        raise ValueError(f"{opened} {mark} blocks are opened, {closed} are closed by their own name")
    return block.sub(lambda match: f"{match[1]}{content(match[2])}\n{match[3]}", text)


def filled(text: str, results: Path) -> str:
    """A README with its blocks filled from the results.

    A block ``bench:NAME`` takes its numbers from the folder itself, ``bench:FOLDER/NAME`` from a folder in it
    (results of another device).

    Raises:
        ValueError: an unknown block, or one that is not closed.
    """

    def content(name: str) -> str:
        folder, _, name = name.rpartition("/")
        return render(results / folder, name)

    return fill(text, "bench", content)


def check_readme(readme: Path = README, results: Path = RESULTS) -> bool:
    """Whether the README says what the results say."""
    text = readme.read_text(encoding="utf-8")
    fresh = filled(text, results)
    if text == fresh:
        return True
    block = _block("bench")
    stale = [old[2] for old, new in zip(block.finditer(text), block.finditer(fresh), strict=True) if old[0] != new[0]]
    print(f"{readme.name} is stale in {', '.join(stale)}; run python -m bench report --readme")
    return False


def write_readme(readme: Path = README, results: Path = RESULTS) -> None:
    """Fill the README's blocks from the results."""
    text = readme.read_text(encoding="utf-8")
    fresh = filled(text, results)
    if fresh != text:
        readme.write_text(fresh, encoding="utf-8")


def run(folder: Path, readme: bool, check: bool) -> bool:
    """Do what was asked for; returns False if a check failed."""
    if check:
        return check_readme()
    written = write_folder(folder)
    if written:
        print(f"wrote {', '.join(path.name for path in written)} to {os.path.relpath(folder)}")
    else:
        print(f"no results in {os.path.relpath(folder)}: run python -m bench first")
    if readme:
        write_readme()
        print(f"filled {README.name}")
    return True
