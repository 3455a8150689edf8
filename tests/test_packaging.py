"""Files that must agree: versions, pins, configs, notebooks, commands, style."""

import ast
import contextlib
import gc
import glob
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import ecmoe
from ecmoe.config import RunConfig
from ecmoe.study.parameters import merge_parameters, parameter_files
from ecmoe.study.plan import of_page
from tests.report.notebooks import declared

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
STUDY = [Requirement(line) for line in PROJECT["dependencies"] + EXTRAS["study"]]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)(?: ;.*)?$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
}
SCALES = sorted(path.stem for path in (ROOT / "configs/scale").glob("*.yaml"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def tracked() -> list[Path]:
    """Files of the project; in a copy without its history, all but what tools left."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        paths = [ROOT / name for name in listed.stdout.splitlines()]
    else:
        paths = [p for p in ROOT.rglob("*") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file()]


# Versions and pins


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert ecmoe.__version__ == citation["version"] == newest
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text() and len((ROOT / "LICENSE").read_text()) > 10_000


def test_pins_lie_in_the_ranges():
    for requirement in [*STUDY, *map(Requirement, EXTRAS["dev"])]:
        if requirement.name == "ecmoe":
            assert requirement.extras == {"study"}  # dev is everything
            continue
        pin = PINS[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement} but constraints.txt has {pin}"


def test_hooks_before_a_commit_take_the_tested_versions():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {hook["id"] for repo in repos for hook in repo["hooks"]} == {"ruff-check", "ruff-format", "nbstripout"}
    assert f"v{PINS['ruff']}" in {repo["rev"] for repo in repos if "ruff" in repo["repo"]}


def test_malicious_lightning_is_excluded():
    lightning = next(r for r in STUDY if r.name == "lightning")
    assert not any(lightning.specifier.contains(bad) for bad in ("2.6.2", "2.6.3"))
    assert Version(PINS["lightning"]) >= Version("2.6.4") and PINS["pytorch-lightning"] == PINS["lightning"]


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_everything_that_gets_installed_is_pinned(python):
    seen, todo = set(), [(name, "") for name in ("ecmoe",)] + [("ecmoe", "dev")]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            needed = requires(name) or []
        except PackageNotFoundError:  # for another Python or platform; that it is pinned is checked below
            continue
        for requirement in map(Requirement, needed):
            markers = {"python_version": python, "python_full_version": f"{python}.0", "extra": extra}
            if requirement.marker is None or requirement.marker.evaluate(markers):
                todo += [(canonicalize_name(requirement.name), e) for e in ("", *requirement.extras)]
    # torch names the versions of CUDA's libraries itself.
    cuda = re.compile(r"nvidia-|cuda-|triton$")
    missing = {name for name, _ in seen if not cuda.match(name)} - {"ecmoe"} - set(PINS)
    assert not missing, f"constraints.txt lacks {sorted(missing)}"


def test_conda_takes_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *packages, pip = environment["dependencies"]
    assert pip == {"pip": ["-c constraints.txt", "-e .[dev]"]}
    python = next(p for p in packages if p.startswith("python="))
    supported = Requirement(f"python{PROJECT['requires-python']}").specifier
    assert supported.contains(f"{python.removeprefix('python=')}.0")
    assert supported.contains("3.11.0") and not supported.contains("3.13.0")


def test_imports_are_declared():
    declared = {canonicalize_name(requirement.name) for requirement in STUDY}
    # imported name -> distribution, and what comes with a declared one
    names = {"yaml": "pyyaml", "sklearn": "scikit-learn", "PIL": "pillow", "IPython": "ipykernel", "pygments": "nbconvert",
             "jupyter_client": "ipykernel", "traitlets": "ipykernel", "nbclient": "papermill", "markupsafe": "nbconvert",
             "bs4": "nbconvert"}  # fmt: skip
    optional = {"triton", "quack", "scattermoe", "liger_kernel"}
    for path in (ROOT / "ecmoe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for module in {m.split(".")[0] for m in modules} - set(sys.stdlib_module_names) - optional - {"ecmoe"}:
                assert canonicalize_name(names.get(module, module)) in declared, f"{path.name} imports {module}"


LIGHT = """
import sys
sys.modules.update(dict.fromkeys({absent}))  # as if not installed
import torch
from ecmoe import MoE, RunConfig, build_model
from ecmoe.config import ROUTERS
from ecmoe.routing import ExpertChoice

MoE(ExpertChoice(8, 4), 8, 16)(torch.randn(2, 8, 8)).sum().backward()
tiny = RunConfig(layers=2, d_model=8, d_ff=8, heads=2, num_experts=4, sequence_length=16, batch_size=4)
for router in ROUTERS:
    build_model(tiny.replace(router=router))(torch.randint(256, (4, 16)), task_ids=torch.arange(4)).sum().backward()
build_model(tiny.replace(data="digits"))(torch.randn(4, 1, 8, 8)).sum().backward()
try:
    from ecmoe import run_or_load
except ModuleNotFoundError as error:
    print(error)
sys.argv = ["ecmoe", "train"]
from ecmoe.__main__ import main
main()
"""


def test_light_install_builds_and_runs_models_and_says_what_the_rest_needs():
    light = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    heavy = {canonicalize_name(requirement.name) for requirement in STUDY} - light - {"filelock"}  # torch brings it
    absent = {name for name, owners in packages_distributions().items() if heavy & set(map(canonicalize_name, owners))}
    assert {"lightning", "numpy", "pandas", "safetensors", "sklearn", "typer"} <= absent
    flags = ["-W", "error", "-W", "ignore:Failed to initialize NumPy"]  # torch's own, where it is alone
    ran = subprocess.run(
        [sys.executable, *flags, "-c", LIGHT.format(absent=sorted(absent))], capture_output=True, text=True
    )
    hint = "isn't installed; it comes with the extra 'study': pip install '.[study]'"
    assert ran.stdout.startswith("ecmoe.run_or_load: ") and ran.stdout.split()[1] in absent
    assert ran.returncode == 2 and hint in ran.stdout and ran.stderr.startswith("error: ") and hint in ran.stderr, ran


def test_what_is_public_is_found_and_a_missing_package_is_named(monkeypatch):
    assert {"MoE", "RunConfig", "ConfigError", "build_model", "causal_routing", "track", "run_or_load", "load_model",
            "__version__"} == set(dir(ecmoe))  # fmt: skip
    assert all(getattr(ecmoe, name).__name__ == name for name in dir(ecmoe) if name != "__version__")
    with pytest.raises(AttributeError, match="module 'ecmoe' has no attribute 'MoF'"):
        _ = ecmoe.MoF
    monkeypatch.setitem(sys.modules, "ecmoe.training.run", None)  # as if it weren't installed
    with pytest.raises(ModuleNotFoundError, match="ecmoe.run_or_load: ecmoe.training.run isn't installed") as error:
        _ = ecmoe.run_or_load
    assert error.value.name == "ecmoe.training.run"


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("name", ["MoE", "run_or_load"])
def test_no_garbage_is_collected_during_an_import(monkeypatch, collects, name):
    seen = []

    def load(module):
        seen.append(gc.isenabled())
        return importlib.import_module({"ecmoe.training.run": "nowhere"}.get(module, module))

    monkeypatch.setattr(ecmoe, "import_module", load)
    (gc.enable if collects else gc.disable)()
    try:
        with contextlib.suppress(ModuleNotFoundError):
            getattr(ecmoe, name)
        assert seen == [False] and gc.isenabled() == collects
    finally:
        gc.enable()


def test_what_training_imports_is_never_searched_for_garbage():
    script = "import gc, ecmoe; ecmoe.run_or_load; print(gc.get_freeze_count(), gc.isenabled())"
    frozen, enabled = subprocess.check_output([sys.executable, "-c", script], text=True).split()
    assert int(frozen) > 100_000 and enabled == "True"


# Configs and notebooks


@pytest.mark.parametrize("scale", SCALES)
def test_scale_is_a_valid_run(scale):
    values = yaml.safe_load((ROOT / f"configs/scale/{scale}.yaml").read_text())
    assert values["scale"] == scale and set(values) <= {"scale", "seeds", "base", "train_missing"}
    assert RunConfig.from_dict(values["base"])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_config_resolves_to_valid_parameters(notebook, scale):
    values, code = merge_parameters(parameter_files(notebook.stem, scale)), nbformat.read(notebook, as_version=4)
    quoted = {name for cell in code.cells for name in re.findall(r'"(\w+)"', cell.source)}
    assert set(values) <= {"base", "seeds", "arms", "vary", "measures", "train_missing", *declared(code), *quoted}
    assert of_page(notebook.stem, scale) or "arms" not in values


def test_every_config_belongs_to_a_notebook():
    names = {path.stem for path in NOTEBOOKS}
    stray = {p.stem for p in (ROOT / "configs").glob("*.yaml")} | {
        p.stem for p in (ROOT / "configs/scale").glob("*/*.yaml")
    }
    assert stray - {"arms", "order", "protocol"} == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stripped_short_and_has_parameters(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert len(notebook.cells) <= 12
    lines = [line for cell in code for line in cell.source.splitlines()]
    assert max(len(cell.source.splitlines()) for cell in code) <= 25 and max(map(len, lines)) <= 120  # as wide as Lab
    opening = notebook.cells[0]
    assert opening.cell_type == "markdown" and opening.source.startswith("# ")
    (parameters,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    for line in parameters.source.splitlines():
        if line and not line.startswith("#"):
            # papermill's --help-notebook loses a help comment with a `=`, and a type with a `|`.
            assert re.fullmatch(r"\w+: [\w\[\], ]+ = .+  # [^=|]+", line), line
    assert "scale" in declared(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_papermill_sees_every_parameter(path):
    from papermill.inspection import _infer_parameters

    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.papermill = {}  # as papermill's own loader adds
    for cell in notebook.cells:
        cell.metadata.tags = cell.metadata.get("tags", [])
    seen = {parameter.name: parameter for parameter in _infer_parameters(notebook)}
    assert set(seen) == set(declared(notebook))
    assert all(parameter.help for parameter in seen.values())


def test_every_file_of_the_package_is_installed():
    """Also the empty one that tells type checkers to read its types (PEP 561)."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["ecmoe"]
    package = ROOT / "ecmoe"
    installed = {package / name for pattern in data for name in glob.glob(pattern, root_dir=package, recursive=True)}
    other = {path for path in tracked() if path.is_relative_to(package) and path.suffix not in (".py", ".pyc")}
    assert package / "py.typed" in other <= installed


# Commands and style


def test_commands_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = re.findall(r"```.*?```|`[^`\n]+`", (ROOT / "README.md").read_text(), re.DOTALL)
    named = set(re.findall(r"(?m)(?:^|`|=\S+ )make (?:[A-Z_]+=\S+ )*([a-z-]+)", "\n".join(code)))
    assert {"reproduce", "test"} <= named <= targets
    assert (ROOT / ".ci/run").read_text().endswith("exec make test\n")
    assert {"reproduce", "test", "report", "check", "lab", "wheelhouse"} <= targets
    assert (ROOT / ".ci/run").stat().st_mode & 0o100


def test_make_says_which_python_it_needs(tmp_path):
    make = ["make", "-C", str(ROOT), "check-python"]
    wrong = tmp_path / "python3"
    wrong.write_text("#!/bin/sh\nexit 1\n")
    wrong.chmod(0o755)
    for python, said in ((str(wrong), "is not Python 3.11 or 3.12"), ("no-python", "was found")):
        refused = subprocess.run([*make, f"PYTHON={python}"], capture_output=True, text=True)
        assert refused.returncode != 0 and said in refused.stdout
    subprocess.run([*make, f"PYTHON={sys.executable}"], check=True, capture_output=True)


@pytest.fixture
def made(tmp_path):
    """A folder with all that make looks at, set up; `made(*words)` runs make there."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/.installed").touch()
    command = ["make", "-C", tmp_path, f"PYTHON={sys.executable}"]
    alone = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}  # without what was said to a make that runs these tests
    return lambda *words: subprocess.run([*command, *words], capture_output=True, text=True, env=alone)


SETUP, ENGINE = "-m pip install", '.venv/bin/snakemake --cores 3 --config "scale=$SCALE"'
# What is asked of make -> what it runs, in order, and what it must not. Ends of lines count.
MAKES = {
    "reproduce": ([ENGINE + ";"], [SETUP, "train_missing"]),
    "report": ([f"{ENGINE} train_missing=false --forceall;"], [SETUP]),
    "test": (["-m pytest -n 3 --dist worksteal\n"], [SETUP, "--quick"]),
    "check": (["ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy\n", "-m pytest -n 3 --dist worksteal --quick\n"], [SETUP]),
    "lab PORT=1234": (["jupyter lab --ip 127.0.0.1 --port 1234", "pre_save_hook=ecmoe.report.lab.as_written ", "notebooks\n"], [SETUP]),
    "lab": (["--port 8888 "], [SETUP]),
    "help": (["(now: smoke)"], [SETUP]),
    "help SCALE=gpu": (["(now: gpu)"], [SETUP]),
    "-B test": ([" -m venv  .venv\n", f".venv/bin/python {SETUP} ", "  -c constraints.txt -e '.[dev]'\n", "touch .venv/.installed\n", "-m pytest"],
                ["grep", "--no-index"]),
    "-B test WHEELHOUSE=there TORCH=system": (
        [" -m venv --system-site-packages .venv\n", "grep -Ev '^(torch|triton|setuptools)==' constraints.txt > .venv/pins.txt\n",
         f"{SETUP} ", "--no-index --find-links there -c .venv/pins.txt -e '.[dev]'\n"], ["-c constraints.txt"]),
    "wheelhouse": (["cp constraints.txt .wheelhouse/pins.txt\n", "-m pip wheel ", "--wheel-dir .wheelhouse  -r .wheelhouse/pins.txt\n"], [SETUP]),
    "wheelhouse TORCH=system": (
        ["grep -Ev '^(torch|triton)==' constraints.txt > .wheelhouse/pins.txt\n", "--no-deps -r .wheelhouse/pins.txt\n", "TORCH=system"], [SETUP]),
}  # fmt: skip


@pytest.mark.parametrize("words", MAKES)
def test_make_does_what_is_said_of_it_and_no_more(words, made):
    ran, (wanted, never) = made("--dry-run", "JOBS=3", *words.split()).stdout, MAKES[words]
    ends = [ran.find(part) for part in wanted]
    assert -1 not in ends and ends == sorted(ends) and not [part for part in never if part in ran], ran


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt"])
@pytest.mark.parametrize("target", ["reproduce", "report", "test", "check", "lab"])
def test_what_is_installed_is_installed_anew_where_it_changed(file, target, made, tmp_path):
    os.utime(tmp_path / ".venv/.installed", (2, 2))
    assert SETUP not in made("--dry-run", target).stdout
    os.utime(tmp_path / file, (3, 3))
    assert SETUP in made("--dry-run", target).stdout


@pytest.mark.parametrize("target", ["reproduce", "report"])
def test_make_names_the_index_that_is_there_whatever_failed(tmp_path, target, made):
    engine, index = tmp_path / ".venv/bin/snakemake", tmp_path / "reports/gpu/index.html"
    engine.write_text("#!/bin/sh\nexit 3\n")
    engine.chmod(0o755)
    none = made(target, "SCALE=gpu")
    assert none.returncode == 2 and str(index) not in none.stdout
    index.parent.mkdir(parents=True)
    index.touch()
    named = made(target, "SCALE=gpu")
    assert named.returncode == 2 and f"{index}\n" in named.stdout


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_has_nothing_to_say(command):
    checked = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_no_file_names_a_machine():
    home = re.compile(rb"(?<![\w.])(/home/[a-z]|/root/|/Users/[A-Za-z]|/work/|[A-Z]:\\Users)")
    found = [path for path in tracked() if path != Path(__file__) and home.search(path.read_bytes())]
    assert not found
