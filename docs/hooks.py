"""What makes a site of the repository's pages: mkdocs calls these functions (`hooks` in mkdocs.yml).

The pages are read in the repository too, so their links lead to its files. Here a link to a file that is a page of the
site leads there, a picture comes along, and of a link to any other file the text stays. A link to nothing is left for
mkdocs to complain of.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "bench/NOTES.md": "notes.md",
    "bench/README.md": "bench.md",
    "bench/results/report.md": "report.md",
    "examples/README.md": "examples.md",
}
"""Pages of the repository outside of docs/, and their names on the site."""
PICTURES = (".png", ".svg")
LINK = re.compile(r"\]\((?!https?://|mailto:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]+)?\)")
FENCE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
"""Code, in blocks and in lines: nothing is changed there."""
OPTIONS = "<!-- options -->"


def in_site(path: Path) -> str | None:
    """The name on the site of a page or picture of the repository, or None."""
    name = path.relative_to(ROOT).as_posix()
    if name in PAGES:
        return PAGES[name]
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"pictures/{name.replace('/', '-')}" if path.suffix in PICTURES else None


def on_files(files: Files, *, config: Any) -> Files:
    """Add the repository's other pages, and the pictures that they and those of docs/ show."""
    sources = [*DOCS.glob("*.md"), *(ROOT / name for name in PAGES)]
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    shown = set()
    for source in sources:
        for link in LINK.finditer(source.read_text(encoding="utf-8")):
            path = (source.parent / link["path"]).resolve()
            if path.suffix in PICTURES and path.is_file() and not path.is_relative_to(DOCS):
                shown.add(path)
    for path in sorted(shown):
        files.append(File.generated(config, str(in_site(path)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Lead links to pages of the site, fill in the table of options, and leave out what only tests read."""
    folder = Path(page.file.abs_src_path).parent

    def led(link: re.Match[str]) -> str:
        path = (folder / link["path"]).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            return link[0]
        name = in_site(path)
        if name is None:
            return "](nowhere)"
        return f"]({posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or '.')}{link['anchor'] or ''})"

    parts = FENCE.split(markdown.replace(OPTIONS, options_table()))
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"<!--.*?-->\n?", "", parts[index], flags=re.DOTALL)
    # Links have code in their texts, so they are found with the code in place. What looks like one inside of code
    # leads to no file, and stays.
    text = LINK.sub(led, "".join(parts))
    return re.sub(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\(nowhere\)", r"\1", text)


def on_page_content(html: str, *, page: Any, config: Any, files: Files) -> str:
    """Formulas as MathML, which browsers draw without a script; names in docstrings as links."""

    def drawn(formula: re.Match[str]) -> str:
        latex = formula["latex"].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        return convert(latex, display="block" if formula["tag"] == "div" else "inline")

    def linked(role: re.Match[str]) -> str:
        name = role["name"].lstrip("~")
        link = f'<a href="#{name}"><code>{name.removeprefix("rvsm_kernels.")}</code></a>'
        return link if f'id="{name}"' in html else f"<code>{name}</code>"

    html = html.replace("::</p>", ":</p>")  # reStructuredText's mark of a block of code
    html = re.sub(r":(?:py:)?(?:class|func|meth|mod|attr|data|exc):<code>(?P<name>[^<]+)</code>", linked, html)
    pattern = r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>'
    return re.sub(pattern, drawn, html, flags=re.DOTALL)


def options_table() -> str:
    """The options of param groups as Markdown tables, from the one table of the package."""
    sys.path.insert(0, str(ROOT))
    try:
        from rvsm_kernels.method import options
    finally:
        sys.path.remove(str(ROOT))
    parts = {
        "The splitting, of all optimizers": options.SPLIT_OPTIONS,
        "The step of `RVSM`": (*options.SGD_OPTIONS, options.UNIT_NORM),
        "The step of `RVSMAdamW`": options.ADAMW_OPTIONS,
        "What weights and states are stored in, of `RVSM` and `RVSMAdamW`": options.PRECISION_OPTIONS,
    }
    lines = []
    for title, rows in parts.items():
        lines += ["", f"**{title}**", "", "| option | default | meaning |", "|---|---|---|"]
        lines += [f"| `{row.name}` | `{row.default!r}` | {row.doc.replace('|', chr(92) + '|')} |" for row in rows]
    return "\n".join(lines)
