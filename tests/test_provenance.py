"""Provenance: the commit is ours or unknown; the digest of the code follows what is computed, and nothing else."""

import math
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ecmoe import provenance


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package within a folder that is, or becomes, a repository."""

    def copy(where: str):
        place = tmp_path / where / "ecmoe"
        shutil.copytree(provenance.PACKAGE, place, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(provenance, "PACKAGE", place)
        provenance.code_digest.cache_clear()
        return place

    monkeypatch.delenv("ECMOE_COMMIT", raising=False)
    yield copy
    provenance.code_digest.cache_clear()


def git(folder, *arguments):
    name = ("-c", "user.name=x", "-c", "user.email=x@x")
    done = subprocess.run(["git", "-C", str(folder), *name, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_another_repositorys_commit_is_not_ours(package, tmp_path):
    package(".venv/site-packages")
    assert provenance.commit() == "unknown"
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "x")
    assert provenance.commit() == "unknown"


def test_our_commit_says_whether_files_differ_from_it(package, tmp_path, monkeypatch):
    place = package(".")
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "x")
    assert provenance.commit() == "unknown"  # nothing of it is in the repository
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-m", "y")
    head = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as within a hook of another repository
    (place / "of_ones_own.py").touch()  # which no commit has
    assert provenance.commit() == head
    (place / "cli/__init__.py").write_text("")
    assert provenance.commit() == head + "+"


def test_the_digest_of_the_code_follows_what_is_computed(package):
    place = package("copy")
    before = provenance.code_digest()

    def after(*changes):
        for name, old, new in changes:
            path = place / name
            text = path.read_text()
            assert old in text
            path.write_text(text.replace(old, new, 1))
        provenance.code_digest.cache_clear()
        return provenance.code_digest()

    nothing = [
        ("cli/__init__.py", "import", "import os\nimport"),
        ("training/optimizer.py", "import math", "# a comment\n\nimport math"),
        ("training/lit.py", '"""', '"""Other words: '),
        ("model/attention.py", ": Tensor", ": torch.Tensor"),
        ("config.py", "    router: str = key(", "    router: object = key("),
    ]
    assert after(*nothing) == before
    changed = after(("training/optimizer.py", "math.sqrt(", "1 * math.sqrt("))
    assert changed != before
    assert after(("routers.py", "1_000_000", "1_000_001")) not in (before, changed)


def test_every_file_that_decides_is_in_the_digest_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    files = [name if name.endswith(".py") else f"{name}/in/a.py" for name in provenance.DECIDES]
    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (told,) = re.findall("The code in (.+) decides the numbers", guide)
    assert re.findall(r"`([\w.]+)/?`", told) == list(provenance.DECIDES)

    def digest(**changed):
        for name in (*files, "cli/a.py", "data/b.txt"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(changed.get(name, f"x = 1  # {name}\n"))
        provenance.code_digest.cache_clear()
        return provenance.code_digest()

    before = digest()
    assert len(before) == 12 and len({digest(**{name: "x = 2"}) for name in files} | {before}) == 1 + len(files)
    for same in ("x: int = 1", '"""Words."""\nx = 1', "y: int\nx = 1", "x = (\n  1\n)"):
        assert (digest(**{files[3]: same}) == before) == (same[:6] != "x: int")  # an assignment with a type is another
    assert len({digest(**{files[3]: f"x: int = {value}"}) for value in (1, 2)}) == 2  # of which the value counts
    assert digest(**{"cli/a.py": "x = 2", "data/b.txt": "y"}) == before
    defined = [
        digest(**{files[0]: text})
        for text in ("def f(a: int) -> int:\n  return a", 'def f(a):\n  "Words."\n  return a', "def f(b): return b")
    ]
    assert defined[0] == defined[1] != defined[2]
    (tmp_path / "model/in/a.py").rename(tmp_path / "model/in/b.py")
    provenance.code_digest.cache_clear()
    assert provenance.code_digest() != before  # a name counts
    of_cli = provenance.code_digest(("cli",))
    (tmp_path / "cli/a.py").write_text("x = 3")
    provenance.code_digest.cache_clear()
    assert provenance.code_digest(("cli",)) != of_cli != provenance.code_digest()
    provenance.code_digest.cache_clear()


def test_a_copy_without_its_history_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("ECMOE_COMMIT", "abc")
    assert provenance.commit() == "abc"
    monkeypatch.delenv("ECMOE_COMMIT")

    def no_git(command, **_):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert provenance.commit() == "unknown"


def test_a_machine_is_told_by_its_kind_and_libraries_by_their_versions(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert provenance.device_name() == "CPU (riscv64, 3 cores)"
    assert provenance.versions("pytest") == {"pytest": pytest.__version__, "python": sys.version.split()[0]}


def test_peak_rates_are_found_in_a_devices_full_name(monkeypatch):
    for kind, rate in provenance.PEAK_BF16.items():
        assert provenance.peak_flops(f"NVIDIA {kind} 80GB HBM3") == rate  # not that of another, such as L4 in L40S
    tera = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "B200": 2250}  # of the vendor's data sheets
    assert {kind: 1e12 * rate for kind, rate in tera.items()} == provenance.PEAK_BF16
    assert math.isnan(provenance.peak_flops("CPU (x86_64, 2 cores)"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA L40S")
    assert provenance.device_name() == "NVIDIA L40S" and provenance.peak_flops() == 362e12  # this one's
