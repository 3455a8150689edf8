"""The bar of a page that trains is written to the terminal of `ecmoe report`, else it is the notebook's."""

import io
import os
import pty
import sys

import pytest

from ecmoe.study.progress import TERMINAL, progress_bar, terminal


@pytest.fixture
def screen():
    """(what reads as the screen does, up to a text; the name of the terminal)"""
    ours, theirs = pty.openpty()

    def shown(until: str) -> str:
        text = ""
        while until not in text:  # a terminal gives what it has so far
            text += os.read(ours, 10_000).decode()
        return text

    yield shown, os.ttyname(theirs)
    os.close(ours)
    os.close(theirs)


def test_a_bar_is_shown_on_the_terminal_that_is_named(screen, monkeypatch, capfd):
    shown, name = screen
    monkeypatch.setenv(TERMINAL, name)
    with progress_bar(40) as bar:
        bar.update(40)
    assert shown("40/40") and capfd.readouterr() == ("", "")
    with progress_bar(0) as bar:
        assert bar.disable
    monkeypatch.setenv(TERMINAL, name + "gone")
    with progress_bar(0):
        pass  # nothing is opened for nothing


def test_without_a_terminal_it_is_the_notebooks(monkeypatch, capsys):
    monkeypatch.delenv(TERMINAL, raising=False)
    with progress_bar(40) as bar:
        bar.update(40)
    assert "40/40" in capsys.readouterr().err


def test_a_terminal_is_named_where_stderr_goes_to_one(screen, monkeypatch, tmp_path):
    _, name = screen
    with open(name, "w") as there, open(tmp_path / "log", "w") as file:
        for stream, named in ((there, {TERMINAL: name}), (file, {}), (io.StringIO(), {})):
            monkeypatch.setattr(sys, "stderr", stream)
            assert terminal() == named
