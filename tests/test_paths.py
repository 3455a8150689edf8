from pathlib import Path

from ecmoe import paths


def test_home_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMOE_HOME", str(tmp_path))
    assert paths.root() == tmp_path.resolve()
    assert paths.runs() == paths.root() / "runs"
    assert paths.cache() == paths.root() / ".cache"
    assert paths.records("gpu") == paths.root() / "reports" / "gpu" / "runs"


def test_checkout_is_found_from_any_folder(tmp_path, monkeypatch):
    package = tmp_path / "checkout" / "ecmoe" / "paths.py"
    monkeypatch.setattr(paths, "__file__", str(package))
    monkeypatch.delenv("ECMOE_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    assert paths.root() == Path.cwd()  # an installed package: no checkout
    package.parent.mkdir(parents=True)
    (package.parents[1] / "pyproject.toml").touch()
    assert paths.root() == package.parents[1].resolve()


def test_resolve_prefers_the_working_folder(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
        (folder / "a.txt").touch()
    (home / "b.txt").touch()
    monkeypatch.setenv("ECMOE_HOME", str(home))
    monkeypatch.chdir(here)
    assert paths.resolve("a.txt").resolve() == here / "a.txt"
    assert paths.resolve("b.txt").resolve() == home / "b.txt"
    assert paths.resolve(here / "c.txt") == here / "c.txt"
