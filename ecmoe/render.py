"""From notebooks to pages: run them by papermill, render them by nbconvert, list them in an index.

A page is one file: no script, no request, formulas as MathML, code folded away.
"""

from __future__ import annotations

import ast
import difflib
import html
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nbformat
import yaml
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from ecmoe import paths
from ecmoe.report import math_html
from ecmoe.scoreboard import verdict_folder

_HERE = Path(__file__).parent
_SCOREBOARD = "12_scoreboard"


class ParameterError(ValueError):
    """A parameter that the notebook doesn't have, or that can't be what was meant."""


class ReportError(RuntimeError):
    """A notebook that failed; names notebook, cell and error."""


class _ThisPython(AsyncKernelManager):
    """Kernels of the running interpreter: an installed `python3` kernel may be another one's."""

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


# Running


def execute(
    notebook: str | Path,
    out_html: str | Path,
    parameter_files: Iterable[str | Path] = (),
    *,
    parameters: Mapping[str, Any] | None = None,
    train_missing: bool | None = None,
    progress: bool = True,
) -> Path:
    """Run a notebook with the parameters of YAML files and render it; returns the page's path.

    Args:
        parameter_files: later ones win, key by key; below `base`, key by key too.
        parameters: win over the files. train_missing: the notebook's parameter of that name.
        progress: a line per cell, and what the notebook writes to stderr, to stderr.

    Raises:
        ParameterError: an unknown key, before anything runs.
        ReportError: a cell failed. The page, with the error on top, is then
            `<name>.failed.html`, so that the page asked for is not taken for done.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    notebook, out_html = Path(notebook), Path(out_html)
    values = merge_parameters(parameter_files) | dict(parameters or {})
    if train_missing is not None:
        values["train_missing"] = train_missing
    source = nbformat.read(notebook, as_version=4)
    check_parameters(source, values, notebook.name)
    out_html.parent.mkdir(parents=True, exist_ok=True)
    _forget_verdicts(notebook.stem, str(values.get("scale", "")))
    failed_html = out_html.with_suffix(".failed.html")
    total = len(source.cells) + 1  # papermill adds the cell with the parameters

    def say(cell: Any, cell_index: int, **_: Any) -> None:
        if progress and cell.cell_type == "code":
            print(f"[{notebook.stem}] cell {cell_index + 1}/{total}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        executed = Path(folder) / notebook.name
        try:
            papermill.execute_notebook(
                notebook,
                executed,
                values,
                kernel_name="python3",
                language="python",
                cwd=notebook.resolve().parent,  # as in JupyterLab
                progress_bar=False,
                start_timeout=180,
                kernel_manager_class=_ThisPython,
                on_cell_start=say,
                stderr_file=sys.stderr if progress else None,
            )
        except PapermillExecutionError as failure:
            what = f"{failure.ename}: {failure.evalue}"
            where = f"{notebook.name}, cell {failure.cell_index + 1}"
            error = {"where": where, "what": what, "cell": failure.cell_index + 1}
            render(executed, failed_html, error=error)
            raise ReportError(f"{where} failed: {what} (see {failed_html})") from None
        except Exception as failure:  # the kernel died, such as for want of memory
            if executed.exists():
                what = f"{type(failure).__name__}: {failure}"
                error = {"where": notebook.name, "what": what, "cell": None}
                render(executed, failed_html, error=error)
            raise ReportError(
                f"{notebook.name} failed: {type(failure).__name__}: {failure}"
            ) from failure
        render(executed, out_html)
    failed_html.unlink(missing_ok=True)
    return out_html


def merge_parameters(files: Iterable[str | Path]) -> dict[str, Any]:
    """The parameters of YAML files: later ones win; `base`, a run's keys, is merged key by key."""
    merged: dict[str, Any] = {}
    for file in files:
        try:
            values = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ParameterError(f"parameter file {str(file)!r} can't be read: {error}") from error
        if not isinstance(values, dict):
            raise ParameterError(f"parameter file {str(file)!r} must hold `key: value` lines")
        base = (merged.get("base") or {}) | (values.get("base") or {})
        merged |= values | ({"base": base} if base else {})
    return merged


def check_parameters(notebook: Any, values: Mapping[str, Any], name: str) -> None:
    """Every key must be in the notebook's parameters cell; a number must not be text (`1e-3`)."""
    known = notebook_parameters(notebook)
    if values and not known:
        raise ParameterError(f"{name} has no cell tagged `parameters`, but is given {list(values)}")
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise ParameterError(f"{name} has no parameter {key!r} (given: {value!r}): {hint}")
        if isinstance(known[key], (int, float)) and isinstance(value, (str, bool)) != isinstance(
            known[key], bool
        ):
            raise ParameterError(
                f"{name}: {key}={value!r} must be a {type(known[key]).__name__}; YAML takes 1e-3 for text "
                "(write 1.0e-3) and no for false"
            )


def notebook_parameters(notebook: Any) -> dict[str, Any]:
    """Names in the parameters cell -> their defaults, None where a default is no literal.

    Read by Python's own parser: papermill's misses names whose comment has a `=`, or `int | None`.
    """
    found: dict[str, Any] = {}
    for cell in notebook.cells:
        if "parameters" not in cell.metadata.get("tags", []):
            continue
        for line in ast.parse(cell.source).body:
            targets = (
                line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
            )
            for target in targets:
                if isinstance(target, ast.Name):
                    try:
                        found[target.id] = ast.literal_eval(line.value)
                    except (ValueError, TypeError):
                        found[target.id] = None
    return found


def _forget_verdicts(notebook: str, scale: str) -> None:
    """What an earlier execution found must not outlive one that fails."""
    if scale:
        (verdict_folder(scale) / f"{notebook}.json").unlink(missing_ok=True)


# Rendering


def render(
    ipynb: str | Path,
    out_html: str | Path,
    error: Mapping[str, Any] | None = None,
    footer: str = "",
) -> Path:
    """Render an executed notebook as a page, written by rename.

    Args:
        error: shown on top: {"where": text, "what": text, "cell": number or None}.
    """
    notebook = nbformat.read(ipynb, as_version=4)
    _write(Path(out_html), page_html(notebook, error, footer))
    return Path(out_html)


def page_html(notebook: Any, error: Mapping[str, Any] | None = None, footer: str = "") -> str:
    """An executed notebook as a page of HTML."""
    notebook.cells = [
        c for c in notebook.cells if "papermill-error-cell-tag" not in c.metadata.get("tags", [])
    ]
    toc: list[dict[str, Any]] = []
    markdown = MarkdownWithMath(renderer=_Markdown(toc))
    title = description = ""
    for number, cell in enumerate(notebook.cells, 1):
        cell.page = {"number": number, "opens": False}
        if cell.cell_type == "markdown":
            cell.page["html"] = markdown.render(cell.source)
            if not title and (heading := re.search(r"^#\s+(.+)$", cell.source, re.M)):
                title, cell.page["opens"] = heading[1].strip(), True
                paragraph = re.search(r"<p>(.*?)</p>", cell.page["html"], re.S)
                description = _text(paragraph[1]) if paragraph else ""
        elif cell.cell_type == "code":
            tags = cell.metadata.get("tags", [])
            names = {
                "parameters": "parameters and their defaults",
                "injected-parameters": "parameters of this report",
            }
            cell.page["label"] = next((names[tag] for tag in tags if tag in names), "code")
            cell.page["failed"] = bool(error) and error["cell"] == number
            _join_streams(cell)
    page = {
        "title": _text(title) or "Report",
        "description": description,
        "toc": [heading for heading in toc if heading["level"] in (2, 3)],
        "css": _css(),
        "error": error,
        "footer": footer or "Made from a notebook; this page sends no request and runs no script.",
    }
    priority = ["text/html", "image/png", "text/plain"]
    exporter = HTMLExporter(
        config=Config({"NbConvertBase": {"display_data_priority": priority}}),
        template_name="template",
        extra_template_basedirs=[str(_HERE)],
    )
    return exporter.from_notebook_node(notebook, {"page": page})[0]


class _Markdown(IPythonRenderer):
    """Markdown with $formulas$ as MathML, and headings that the table of contents can link to."""

    def __init__(self, toc: list[dict[str, Any]]) -> None:
        super().__init__(escape=False, exclude_anchor_links=True)
        self.toc = toc

    def heading(self, text: str, level: int, **attrs: Any) -> str:
        plain = re.sub(r"[^\w]+", "-", _text(text).lower()).strip("-") or "section"
        taken = sum(entry["plain"] == plain for entry in self.toc)
        name = f"{plain}-{taken + 1}" if taken else plain
        self.toc.append(
            {"id": name, "plain": plain, "level": level, "html": re.sub(r"</?a[^>]*>", "", text)}
        )
        return f'<h{level} id="{name}">{text}</h{level}>\n'

    def block_math(self, body: str) -> str:
        return math_html(body.strip(), "block")

    def inline_math(self, body: str) -> str:
        return math_html(body.strip())

    def latex_environment(self, name: str, body: str) -> str:
        return math_html(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")


def _join_streams(cell: Any) -> None:
    """One log per cell, however many pieces its lines came in, after what the cell shows."""
    outputs, logs = [], []
    for output in cell.outputs:
        is_log = output.output_type == "stream" and output.name == "stderr"
        (logs if is_log else outputs).append(output)
    if logs:
        logs[0].text = "".join(output.text for output in logs)
    cell.outputs = outputs + logs[:1]


def _css() -> str:
    code = {
        style: HtmlFormatter(style=style, nobackground=True).get_style_defs(".highlight")
        for style in ("default", "github-dark")
    }
    dark = f"@media (prefers-color-scheme: dark) {{\n{code['github-dark']}\n}}"
    return "\n".join(
        [code["default"], dark, (_HERE / "template" / "style.css").read_text(encoding="utf-8")]
    )


def _text(markup: str) -> str:
    """Markup without its tags, on one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", markup)).replace("`", "").split())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# The index


def index(scale: str, reports: str | Path | None = None) -> Path:
    """Write `index.html`: the scoreboard's page, with a list of all pages that are there.

    Args:
        scale: smoke, gpu or paper. reports: the folder; default: reports/<scale>.
    """
    folder = Path(reports) if reports else paths.root() / "reports" / scale
    entries = []
    for path in sorted(folder.glob("[0-9]*.html")):
        text = path.read_text(encoding="utf-8")
        failed = path.name.endswith(".failed.html")
        if failed and path.with_name(path.name.replace(".failed.html", ".html")).exists():
            continue
        title, about = (
            _first(text, r"<title>(.*?)</title>"),
            _first(text, r'<meta name="description" content="(.*?)"'),
        )
        about = _first(text, r'<meta content="(.*?)" name="description"') or about
        mark = ' <strong class="failed">failed</strong>' if failed else ""
        link = f'<a href="{html.escape(path.name)}">{title or html.escape(path.stem)}</a>'
        entries.append(f"<li>{link}{mark}<small>{about}</small></li>")
    listing = (
        f'<nav class="pages" aria-label="Reports"><h2 id="reports">Reports at scale {html.escape(scale)}</h2>'
        f"<ul>{''.join(entries) or '<li>none yet</li>'}</ul></nav>"
    )
    scoreboard = folder / f"{_SCOREBOARD}.html"
    if scoreboard.exists():
        text = scoreboard.read_text(encoding="utf-8")
    else:
        cell = nbformat.v4.new_markdown_cell(
            f"# Reports at scale {scale}\n\nThe scoreboard is not made yet."
        )
        text = page_html(nbformat.v4.new_notebook(cells=[cell]))
    _write(folder / "index.html", text.replace("<!-- pages -->", listing, 1))
    return folder / "index.html"


def _first(text: str, pattern: str) -> str:
    found = re.search(pattern, text, re.S)
    return found[1].strip() if found else ""
