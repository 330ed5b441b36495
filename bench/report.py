"""``python -m bench report``: Markdown and plots from the JSON, and the README's numbers from it alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import accuracy_tables, tables
from .config import RESULTS, ROOT, MissingPackage, require, shown
from .markdown import NOT_MEASURED
from .results import Result, digest, read_json

README = ROOT / "README.md"
REPORT = "report.md"

_SOURCES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "headline": ("throughput", tables.headline),
    "overview": ("throughput", tables.overview),
    "accuracy-headline": ("accuracy", accuracy_tables.headline),
    **{kind: (kind, render) for kind, render in tables.KINDS.items()},
}
"""Block name to (result file, its table)."""

_SECTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "overview": ("Overview", ("speedup",)),
    "train": ("The main job: handwritten digits", ("train",)),
    "text": ("A language model: a transformer over bytes (`--task text`)", ("text",)),
    "targets": ("The main job with a sparsity asked for (`--task targets`)", ()),
    "accuracy": ("Why not plain magnitude pruning? (`python -m bench accuracy`)", ()),
    "throughput": ("Speed", ("bandwidth",)),
    "floors": ("The floors that the project holds itself to (`python -m bench floors`)", ()),
    "host": ("Host time", ()),
    "memory": ("Memory", ()),
    "sizes": ("Bytes on the disk (`python -m bench sizes`)", ()),
    "latency": ("Time of a smaller network (`python -m bench latency`)", ()),
}
"""Block name to (title, plots under its table): the sections of report.md."""

_PLOTS = {"speedup": "throughput", "bandwidth": "throughput", "train": "train", "text": "text"}
"""Plot to the result file that it is drawn from."""


_COMMANDS = {"text": "train --task text", "targets": "train --task targets"}
"""Result file to the command that makes it, where the two names differ."""


def _result(folder: Path, kind: str, use: Callable[[Result], Any]) -> Any:
    """What a function makes of a result file, or None if there is no such file.

    Raises:
        ValueError: the file does not hold what the function needs; the message names the file.
    """
    path = folder / f"{kind}.json"
    result = read_json(path)
    if result is None:
        return None
    try:
        return use(result)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{shown(path)} is no result of python -m bench {_COMMANDS.get(kind, kind)} ({what})"
        ) from error


def render(folder: Path, name: str) -> str:
    """The text of one block from the results in a folder.

    Raises:
        ValueError: a block name that does not exist, or a result file that holds something else.
    """
    if name not in _SOURCES:
        raise ValueError(f"unknown block bench:{name} (choose one of {', '.join(_SOURCES)})")
    kind, table = _SOURCES[name]
    text = _result(folder, kind, table)
    return NOT_MEASURED if text is None else text


def report_text(folder: Path) -> str:
    """The text of a folder's report.md: a section per result file, with the plots that lie in the folder.

    Raises:
        ValueError: there is no result in the folder, or a file that holds something else.
    """
    if not any((folder / f"{kind}.json").exists() for kind in tables.KINDS):
        raise ValueError(f"no results in {shown(folder)}; run python -m bench first")
    parts = [
        "# Benchmark report",
        "`python -m bench report` writes this file and its plots from the JSON files beside it."
        " bench/README.md says what is measured and how.",
    ]
    for name, (title, plots) in _SECTIONS.items():
        if (folder / f"{_SOURCES[name][0]}.json").exists():
            parts.append(f"## {title}\n\n{render(folder, name)}")
            parts += [f"![{plot}]({plot}.png)" for plot in plots if (folder / f"{plot}.png").exists()]
    return "\n\n".join(parts) + "\n"


def draw(folder: Path) -> list[str]:
    """Draw every plot of a folder anew; returns the names of the files. A plot that has no data is removed.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    require("numpy", "matplotlib")
    from .plots import PLOTS  # matplotlib is needed here only

    drawn = []
    for name, kind in _PLOTS.items():
        path = folder / f"{name}.png"
        if _result(folder, kind, lambda result, name=name, path=path: PLOTS[name](result, path)):
            drawn.append(path.name)
        else:
            path.unlink(missing_ok=True)
    return drawn


def write_folder(folder: Path, plots_needed: bool = False) -> str:
    """Write report.md and the plots beside the JSON of a folder; returns the text of report.md.

    Raises:
        MissingPackage: plots are needed, and matplotlib is not installed.
        ValueError: there is no result in the folder, or a file that holds something else.
    """
    report_text(folder)  # raises before a plot is drawn or removed
    try:
        drawn = draw(folder)
    except MissingPackage as error:
        if plots_needed:
            raise
        drawn = []
        for name in _PLOTS:  # plots of an earlier run would stand beside the tables of this one
            (folder / f"{name}.png").unlink(missing_ok=True)
        print(f"the plots were not drawn, because {error}")
    text = report_text(folder)
    (folder / REPORT).write_text(text, encoding="utf-8")
    print(f"wrote {', '.join([REPORT, *drawn])} to {shown(folder)}")
    return text


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


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"there is no {shown(path)}; run this in a clone of the project") from None


def _drawn_from(result: Result, plot: Path) -> bool:
    """Whether a PNG names the result that it was drawn from."""
    return digest(result).encode() in plot.read_bytes()


def check(readme: Path = README, results: Path = RESULTS) -> bool:
    """Whether the README, report.md and the plots say what the results say. A missing plot makes report.md stale."""
    text = _read(readme)
    fresh = filled(text, results)
    block = _block("bench")
    pairs = zip(block.finditer(text), block.finditer(fresh), strict=True)
    stale = [f"{readme.name} in {old[2]}" for old, new in pairs if old[0] != new[0]]
    report = results / REPORT
    if not report.exists() or report.read_text(encoding="utf-8") != report_text(results):
        stale.append(REPORT)
    for name, kind in _PLOTS.items():
        path = results / f"{name}.png"
        if path.exists() and not _result(results, kind, lambda result, path=path: _drawn_from(result, path)):
            stale.append(path.name)
    if stale:
        print(f"stale: {', '.join(stale)}; run python -m bench report --readme")
    return not stale


def write_committed(readme: Path = README, results: Path = RESULTS) -> None:
    """Write report.md and the plots of the committed results, and fill the README's blocks from them."""
    text = _read(readme)
    write_folder(results, plots_needed=True)
    fresh = filled(text, results)
    if fresh != text:
        readme.write_text(fresh, encoding="utf-8")
    print(f"filled {readme.name}")
