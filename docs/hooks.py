"""What MkDocs cannot do by itself: pages from elsewhere, generated pages, notebooks, formulas.

- Texts that lie where readers of the repository look for them (`HERE`) become pages too, and links
  between files of the repository links between pages.
- The reference is written by `reference.py`, from what it describes.
- Notebooks are run, every time, and shown with what they answered; one that fails ends the build.
- Formulas become MathML, which browsers read without any script.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor

import reference

ROOT = Path(__file__).parent.parent
HERE = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "deploy/README.md": "deploy.md",
    "deploy/wireguard/README.md": "wireguard.md",
    "docker/README.md": "docker.md",
    "benchmarks/paper/README.md": "paper.md",
}
_LINK = re.compile(r"(!?)\[([^\]\[]*(?:\[[^\]]*\][^\]\[]*)*)\]\(([^)\s]+)\)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Pages that the navigation does not name come last in "Operations"."""
    named = set(_names(config.nav))
    [operations] = [part["Operations"] for part in config.nav or () if "Operations" in part]
    for path in sorted(Path(config.docs_dir).glob("*.md")):
        if path.name not in named:
            operations.append(path.name)
    return config


def _names(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [
        name for part in (nav.values() if isinstance(nav, dict) else nav) for name in _names(part)
    ]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    for source, page in HERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for page, write in reference.PAGES.items():
        files.append(File.generated(config, page, content=write()))
    for path in sorted(Path(config.docs_dir).glob("notebooks/*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=_run(path)))
    return files


def _run(path: Path) -> str:
    """A notebook as a page, with what its cells answer now."""
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    exporter = MarkdownExporter(preprocessors=[ExecutePreprocessor(timeout=300)])
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"path": str(ROOT)}})
    said = page.replace("![png](", "![What the cell above draws](")
    return f"{said}\n\n[This page as a notebook]({path.name})\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository lead to their pages; those that are no page are names."""
    site = {name: source for source, name in HERE.items()}
    name = page.file.src_uri
    folder = posixpath.dirname(site.get(name, f"docs/{name}"))

    def lead(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        path, _, anchor = target.partition("#")
        if picture or not path or re.match(r"[a-z]+:", target):
            return link[0]
        source = posixpath.normpath(posixpath.join(folder, path))
        to = HERE.get(source) or source.removeprefix("docs/")
        if to != name.replace(".md", ".ipynb"):  # only its own page offers the notebook itself
            to = to.replace(".ipynb", ".md")
        if files.get_file_from_path(to) is None:
            return text
        there = posixpath.relpath(to, posixpath.dirname(name) or ".")
        return f"[{text}]({there}{f'#{anchor}' if anchor else ''})"

    return _LINK.sub(lead, markdown)


def on_page_content(html_: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML; of those on a line of their own a narrow window scrolls what is wider."""

    def formula(found: re.Match[str]) -> str:
        text = html.unescape(found[3]).replace(r"\mathbb R", "ℝ")  # browsers know no mathvariant
        if found[2] == "(":
            return convert(text)
        shown = convert(text, display="block")
        return f'<div style="overflow-x: auto; margin: 1em 0" tabindex="0">{shown}</div>'

    return _FORMULA.sub(formula, html_)
