"""Execute a notebook with papermill, and render it as a page."""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from traitlets.config import Config

from ecmoe.files import ConfigError
from ecmoe.report.render import render
from ecmoe.study.parameters import merge_parameters, merged
from ecmoe.study.progress import terminal


class _ThisPython(AsyncKernelManager):
    """Start kernels with the running interpreter: an installed `python3` kernel may use another one."""

    asked: ClassVar[BaseException | None] = None  # to end, by a signal

    async def _async_is_alive(self) -> bool:  # asked every second while the kernel starts or a cell runs
        if self.asked and not self.shutting_down:
            raise DeadKernelError("asked to end")  # papermill shuts the kernel down, and raises it
        return await super()._async_is_alive()

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        command += ["--log-level=50"]  # silences ipykernel's log, not the notebook's output
        return KernelSpec(argv=command, env=terminal(), display_name="Python 3", language="python")


@contextmanager
def _patient() -> Iterator[None]:
    """Within the context, Ctrl-C or SIGTERM ends the kernel, then the context; a second one ends it at once."""

    # The first raises nothing here: an exception would be lost in a callback whose exceptions Python ignores, such as
    # the one by which asyncio forgets a task.
    def ask(number: int, _: Any) -> None:
        if _ThisPython.asked:
            raise _ThisPython.asked
        _ThisPython.asked = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # which SIGINT has in a script's background jobs
            signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        asked, _ThisPython.asked = _ThisPython.asked, None
        if asked:
            raise asked


def execute(
    notebook: str | Path,
    out_html: str | Path,
    parameter_files: Iterable[str | Path] = (),
    *,
    parameters: Mapping[str, Any] | None = None,
) -> Path:
    """Run a notebook, render it, and return the page's path. Progress (a line per cell, and on a terminal a bar while
    one trains) and the notebook's stderr go to stderr.

    parameter_files: YAML files; later files override, key by key, also within `base`. parameters: override the files. A page's
    notebook checks them in its first cell, by `load` or `page_parameters`.

    Raises a ConfigError if `out_html` is a folder or doesn't end in .html; or if a file or the notebook can't be read, or a cell
    fails, and then writes `<name>.failed.html`, with the error on top, instead of the page."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns about parameters that only a page's YAML has
    notebook, out_html = Path(notebook), Path(out_html)
    if out_html.is_dir():
        raise ConfigError(f"{out_html} is a folder: name the page in it, such as {out_html / notebook.stem}.html")
    if out_html.suffix != ".html":  # a notebook in its place would be overwritten
        raise ConfigError(f"{out_html}: the name of a page must end in .html, such as {out_html.with_suffix('.html')}")
    failed_html = out_html.with_suffix(".failed.html")

    def fail(executed: Any, what: str, where: str = notebook.name, cell: int | None = None) -> None:
        if _ThisPython.asked:  # it was ended, and hasn't failed
            return
        try:
            render(executed, failed_html, notebook, {"where": where, "what": what, "cell": cell})
        except OSError as error:  # such as a full disk, which must not hide what is wrong with the notebook
            print(f"{failed_html} can't be written: {error}", file=sys.stderr, flush=True)

    try:
        values = merged(merge_parameters(parameter_files), parameters or {})
        try:
            source = nbformat.read(notebook, as_version=4)
        except Exception as error:  # nbformat raises many kinds of errors for invalid files
            what = f"{notebook} can't be read ({type(error).__name__}: {error})"
            raise ConfigError(f"{what}: it must be a notebook, such as notebooks/01_convergence.ipynb") from error
    except ConfigError as error:  # the failed page is listed in index.html
        if notebook.exists():
            title = nbformat.v4.new_markdown_cell(f"# {notebook.stem}")
            fail(nbformat.v4.new_notebook(cells=[title]), str(error))
        raise
    total = len(source.cells) + bool(values)  # papermill adds a cell with the parameters

    def say(cell: Any, cell_index: int, **_: Any) -> None:
        if cell.cell_type == "code":
            print(f"[{notebook.stem}] cell {cell_index + 1}/{total}", file=sys.stderr, flush=True)

    # The kernel communicates over Unix sockets, so that no port is open. They lie in this folder, because parallel kernels would
    # share Jupyter's default, the working folder; and in /tmp if possible, because a socket's path is limited to some 100 characters.
    place = "/tmp" if os.access("/tmp", os.W_OK) else None
    with _patient(), tempfile.TemporaryDirectory(prefix="ecmoe-", dir=place) as folder:
        executed = Path(folder) / "executed.ipynb"
        sockets = Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/kernel"}})
        try:
            papermill.execute_notebook(
                source,  # not its path, as papermill would format {names} in a path
                executed,
                values,
                kernel_name="python3",
                language="python",
                cwd=notebook.resolve().parent,  # as JupyterLab does
                progress_bar=False,
                start_timeout=180,
                kernel_manager_class=_ThisPython,
                config=sockets,
                on_cell_start=say,
                stderr_file=sys.stderr,
            )
        except PapermillExecutionError as failure:
            what, cell = f"{failure.ename}: {failure.evalue}", failure.cell_index + 1
            where = f"{notebook.name}, cell {cell}"
            fail(nbformat.read(executed, as_version=4), what, where, cell)
            raise ConfigError(f"{where} failed: {what} (see {failed_html})") from None
        except Exception as failure:  # the kernel died, for example out of memory
            what = f"{type(failure).__name__}: {failure}"
            if executed.exists():
                fail(nbformat.read(executed, as_version=4), what)
            raise ConfigError(f"{notebook.name} failed: {what}") from failure
        render(nbformat.read(executed, as_version=4), out_html, notebook)
        failed_html.unlink(missing_ok=True)
    return out_html
