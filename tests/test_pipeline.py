"""The real Snakefile over tiny notebooks: what is remade, what is not, what a failure and a kill leave."""

import html
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml

from ecmoe.files import write_json, write_text
from ecmoe.study import engine, plan
from ecmoe.study.parameters import merge_parameters, page_parameters, parameter_files
from tests.report.notebooks import declared

CHECKOUT = Path(__file__).parents[1]
RAN = "with open('../ran.txt', 'a') as file:\n    file.write({name!r} + '\\n')"
# The first execution never ends: it waits to be killed.
WAITS = """
import pathlib, time
if not pathlib.Path("../started").exists():
    pathlib.Path("../started").touch()
    time.sleep(600)
"""


NO_CLAIMS = "level: 0.95\nleast_seeds: 3\npower: 0.8\nmargins: {}\namendments: []\nclaims: {}\n"


def write_notebook(folder: Path, name: str, code: str = "") -> None:
    cells = [
        nbformat.v4.new_markdown_cell(f"# Page {name}"),
        nbformat.v4.new_code_cell(
            'scale: str = "?"\nseeds: list = []\nbase: dict = {}\ntrain_missing: bool = True\nvalue: int = 0',
            metadata={"tags": ["parameters"]},
        ),
        nbformat.v4.new_code_cell(RAN.format(name=name) + "\nprint('value is', value)"),
        nbformat.v4.new_code_cell(code),
        nbformat.v4.new_markdown_cell("It reads `value`."),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "notebooks" / f"{name}.ipynb")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(CHECKOUT / "Snakefile", folder)
    shutil.copytree(CHECKOUT / "profiles", folder / "profiles")
    (folder / "notebooks").mkdir()
    (folder / "configs" / "scale").mkdir(parents=True)
    (folder / "configs/scale/smoke.yaml").write_text("scale: smoke\nseeds: [0]\nbase: {steps: 1}\n")
    (folder / "configs/arms.yaml").write_text("EC: {}\n")
    (folder / "configs/protocol.yaml").write_text(NO_CLAIMS)
    for name, code in (("00_a", ""), ("01_b", WAITS), ("02_c", "")):
        write_notebook(folder, name, code)
        (folder / f"configs/{name}.yaml").write_text("value: 1\n")
    return folder


def start(project: Path, *arguments: str) -> subprocess.Popen:
    cores = [] if "--dry-run" in arguments else ["--cores", "2"]  # README names none: the profiles do
    command = [sys.executable, "-m", "snakemake", *cores, *arguments]
    return subprocess.Popen(
        command,
        cwd=project,
        env=os.environ | {"ECMOE_HOME": str(project), "ECMOE_CONFIGS": str(project / "configs")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def snakemake(project: Path, *arguments: str) -> tuple[int, str, list[str]]:
    """Exit code, output, and the notebooks that were executed."""
    (project / "ran.txt").unlink(missing_ok=True)
    process = start(project, *arguments)
    output, _ = process.communicate(timeout=200)
    ran = (project / "ran.txt").read_text().split() if (project / "ran.txt").exists() else []
    return process.returncode, output, sorted(ran)


def page(project: Path, name: str) -> Path:
    return project / "reports/smoke" / f"{name}.html"


def test_pipeline_from_a_kill_to_a_failure(project):
    # One story, in order: every step starts where the last one ended.
    process = start(project)
    began = time.time()
    while not ((project / "started").exists() and page(project, "00_a").exists()):
        assert process.poll() is None and time.time() - began < 120, process.communicate()[0]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not page(project, "01_b").exists()

    code, output, ran = snakemake(project)
    assert code == 0, output
    assert "01_b" in ran  # goes on where it was
    for name in ("00_a", "01_b", "02_c", "index"):
        assert page(project, name).exists()
    assert "value is 1" in page(project, "01_b").read_text()
    assert "01_b.html" in page(project, "index").read_text()

    began = time.time()
    code, output, ran = snakemake(project)
    assert (code, ran) == (0, []), output  # a second call does nothing
    assert time.time() - began < 15

    (project / "configs/01_b.yaml").write_text("value: 2\n")
    code, output, ran = snakemake(project)
    assert (code, ran) == (0, ["01_b"]), output  # what depends on it, and nothing else
    assert "value is 2" in page(project, "01_b").read_text()

    write_notebook(project, "00_a", "raise ValueError('the moon is blue')")
    (project / "configs/01_b.yaml").write_text("value: 3\n")
    code, output, ran = snakemake(project)
    assert code != 0
    assert "00_a.ipynb, cell" in output and "the moon is blue" in output
    assert "failed: 00_a" in output
    assert "01_b" in ran  # the others still finish
    assert "value is 3" in page(project, "01_b").read_text()
    assert "the moon is blue" in page(project, "00_a.failed").read_text()
    index = page(project, "index").read_text()
    assert "00_a.failed.html" in index and "01_b.html" in index

    code, output, ran = snakemake(project, "--dry-run", "--quiet", "host")
    assert "Missing output files: reports/smoke/00_a.html" in output  # it will be tried again

    write_notebook(project, "00_a")
    code, output, ran = snakemake(project)
    assert (code, ran) == (0, ["00_a"]), output
    assert not page(project, "00_a.failed").exists()  # a failed page is made again


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--config", "scale=../scale/smoke"], "scale='../scale/smoke': must be one of smoke"),
        (["--config", "scale=$(touch hacked)"], "scale='$(touch hacked)': must be one of smoke"),
        (["--config", "scael=gpu"], "--config has no key 'scael': did you mean scale?"),
        (["reports/smoke/09_x.html"], "rule to produce reports/smoke/09_x.html"),
    ],
)
def test_what_there_is_not_is_named(project, asked, said):
    code, output, ran = snakemake(project, *asked)
    assert code != 0 and said in output and "Traceback" not in output
    assert not ran and not (project / "hacked").exists()


@pytest.fixture
def study(tmp_path, tiny_config) -> Path:
    """A page that rests on two runs, of which one can't be trained, beside pages with all that can be wrong."""
    shutil.copy(CHECKOUT / "Snakefile", tmp_path)
    shutil.copytree(CHECKOUT / "profiles", tmp_path / "profiles")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "configs" / "scale").mkdir(parents=True)
    base = tiny_config(steps=2, eval_every=2).to_dict()
    base = {key: base[key] for key in base if key not in ("seed", "router")}
    (tmp_path / "configs/scale/smoke.yaml").write_text(yaml.safe_dump({"scale": "smoke", "seeds": [0], "base": base}))
    (tmp_path / "configs/protocol.yaml").write_text(NO_CLAIMS)
    (tmp_path / "configs/arms.yaml").write_text("EC: {}\nLost: {data: absent/text.txt}\n")
    pages = {
        "01_runs": "arms: [EC, Lost]\nmeasures: {losses: {arms: [EC], pools: [sequence]}}",
        "02_$(touch hacked) {x} <y> 'z'": "value: 1",
        "04_no_json": "value: 1",
        "05_no_yaml": "value: [1",
        "06_unknown_arm": "arms: [ECC]\nvalue: 1",
    }
    for name, text in pages.items():
        code = f"from ecmoe.study.load import load\nload({name!r}, globals())"
        write_notebook(tmp_path, name, code if name == "06_unknown_arm" else "")
        (tmp_path / f"configs/{name}.yaml").write_text(text + "\n")
    (tmp_path / "notebooks/04_no_json.ipynb").write_text("{")
    return tmp_path


def test_a_dry_run_lists_what_would_be_made_and_leaves_a_pipeline_that_runs_alone(study, monkeypatch):
    monkeypatch.setenv("ECMOE_CONFIGS", str(study / "configs"))
    (one, lost) = plan.plan("smoke", ["01_runs"])
    running = study / ".cache/engine/smoke/batch-0.done"  # of a pipeline
    write_text(running, "")
    write_json(study / f"reports/smoke/runs/{lost.name}.json", {"summary": {"status": "finished"}}, sealed=True)
    code, output, ran = snakemake(study, "-n")
    assert (code, ran) == (0, []) and running.exists() and not (study / "runs").exists(), output
    assert re.findall(r"train or measure:((?:\n  .+)+)", output) == [f"\n  01_runs EC s0  {one.name}  missing"]
    pages = re.findall(r"^Job \d+: draw reports/smoke/(.+)\.html$", output, re.MULTILINE)
    assert len(pages) == 5 and {"01_runs", "04_no_json"} < set(pages) and "write reports/smoke/index.html" in output
    write_json(study / f"reports/smoke/runs/{one.name}.json", {"summary": {"status": "finished"}}, sealed=True)
    output = snakemake(study, "--dry-run", "reports/smoke/01_runs.html")[1]
    assert f"01_runs EC s0  {one.name}  to measure: {one.measures[0].name}\n" in output
    assert output.count("Job ") == 2 and "draw reports/smoke/01_runs.html" in output


def test_a_scale_may_train_only_where_that_is_asked(study):
    scale = study / "configs/scale/smoke.yaml"
    scale.write_text(scale.read_text() + "train_missing: false\n")
    asked = [], ["--config", "train_missing=true"], ["--config", "train_missing=false"]
    trained = ["train or measure:" in snakemake(study, "-n", *more)[1] for more in asked]
    assert trained == [False, True, False]


def test_a_profile_for_clusters_keeps_the_flags_of_the_default_one():
    """Snakemake takes one of them; cores and latency are of the machine."""
    default, slurm = (
        yaml.safe_load((CHECKOUT / f"profiles/{name}/config.yaml").read_text()) for name in ("default", "slurm")
    )
    own = {"cores", "latency-wait"}
    assert {key: slurm.get(key) for key in default if key not in own} == {
        k: v for k, v in default.items() if k not in own
    }
    assert slurm["latency-wait"] > default["latency-wait"] and "cores" not in slurm


def test_whatever_is_wrong_is_named_in_the_end_and_stops_nothing_else(study):
    code, output, ran = snakemake(study)
    assert code != 0 and not (study / "hacked").exists(), output
    assert ran == sorted(["01_runs", "02_$(touch", "hacked)", "{x}", "<y>", "'z'", "06_unknown_arm"]), output
    odd = "02_-24--28-touch-20-hacked-29--20--7b-x-7d--20--3c-y-3e--20--27-z-27-"
    for name in ("01_runs", odd, "index"):
        assert page(study, name).exists(), output
    for name in ("04_no_json", "05_no_yaml", "06_unknown_arm"):
        assert f"failed: {name}, see" in output and f"{name}.failed.html" in page(study, "index").read_text()
    assert "no arm 'ECC': did you mean EC?" in html.unescape(page(study, "06_unknown_arm.failed").read_text())
    assert "absent/text.txt" in output  # of the run that failed
    assert len(list((study / "reports/smoke/runs").glob("*.json"))) == 1
    assert len(list((study / "reports/smoke/measures").glob("*/losses-*.json"))) == 1
    shown = page(study, "01_runs").stat().st_mtime

    (study / "configs/arms.yaml").write_text("EC: {}\nLost: {router: dense}\n")  # now it can be trained
    code, output, ran = snakemake(study, "reports/smoke/01_runs.html")
    assert (code, ran) == (0, ["01_runs"]), output
    assert (
        len(list((study / "reports/smoke/runs").glob("*.json"))) == 2 and page(study, "01_runs").stat().st_mtime > shown
    )
    assert not list((study / ".cache/engine").rglob("*.done"))
    code, output, ran = snakemake(study, "reports/smoke/01_runs.html")
    assert (code, ran) == (0, []), output
    (study / "configs/06_unknown_arm.yaml").write_text("arms: [EC]\nseeds: [1]\nvalue: 1\n")
    on_slurm = "--workflow-profile", "profiles/slurm", "--dry-run", "--quiet", "host"
    code, output, _ = snakemake(study, *on_slurm, "--", "reports/smoke/06_unknown_arm.html")
    assert code == 0 and re.search(r"rule run:(\n .+)+mem_mb=32000.+ runtime=240.+ gpu=1", output), output


def test_a_process_does_several_runs_and_the_first_of_the_plan_begin(study, monkeypatch, capfd):
    """A process takes seconds to start, a run of smoke fewer. What Snakemake would do is read from its dry run."""
    monkeypatch.setenv("ECMOE_HOME", str(study))
    monkeypatch.setenv("ECMOE_CONFIGS", str(study / "configs"))
    monkeypatch.setattr(engine, "CHECKOUT", study)
    (study / "profiles/default/config.yaml").write_text("dry-run: true\nprintshellcmds: true\n")
    (study / "configs/01_runs.yaml").write_text("arms: [EC, Lost]\nseeds: [3, 0, 2, 1]\n")
    (study / "configs/order.yaml").write_text("- [Lost]\n- [EC]\n")
    planned = plan.plan("smoke", ["01_runs"])
    names = [one.name for one in planned]
    assert [one.arms + (one.seed,) for one in planned] == [(arm, seed) for arm in ("Lost", "EC") for seed in range(4)]
    for side_by_side in (1, 4):
        engine.train(planned, "smoke", jobs=side_by_side)
        jobs = re.findall(r"priority: (\d+)\n(?s:.+?) -m ecmoe run (.+) --scale smoke", "".join(capfd.readouterr()))
        by_priority = sorted(
            jobs, key=lambda job: -int(job[0])
        )  # which Snakemake starts first, of those that are ready
        share = len(names) // side_by_side
        assert [shell.split() for _, shell in by_priority] == [names[i : i + share] for i in range(0, 8, share)]


@pytest.mark.parametrize("trains", [True, False])
def test_runs_share_gpus_and_what_is_timed_has_them_alone(trains, tmp_path, monkeypatch):
    """The plan of this checkout, as Snakemake would carry it out on two GPUs; where nothing is to be trained, nothing of it."""
    shutil.copy(CHECKOUT / "Snakefile", tmp_path)
    shutil.copytree(CHECKOUT / "profiles", tmp_path / "profiles")
    (tmp_path / "configs").symlink_to(CHECKOUT / "configs")
    (tmp_path / "notebooks").mkdir()
    pages = ["01_convergence", "02_load_balance", "03_capacity_factor"]
    codes = ('shown = "C1", "C9"', "", 'shown = "01_convergence"\nfrom ecmoe.study import plan, speed')
    for name, code in zip(pages, codes, strict=True):
        write_notebook(tmp_path, name, code=code)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("ECMOE_SLOTS", "3")
    (tmp_path / "reports/gpu/repeats").mkdir(parents=True)
    (tmp_path / "reports/gpu/repeats/a.json").touch()
    asked = ["--cores", "12", "--config", "scale=gpu", f"train_missing={trains}", "--dry-run", "--printshellcmds"]
    code, output, _ = snakemake(tmp_path, *asked, "--quiet", "host")
    assert code == 0, output
    jobs = re.findall(r"^rule (\w+):\n((?: .+\n)+)Shell command: (.+)", output, re.MULTILINE)
    named = {rule: (about, shell) for rule, about, shell in jobs}
    reads = {re.search("name=(.+)", about)[1]: about.split("output:")[0] for rule, about, _ in jobs if rule == "page"}
    assert set(named) == {"all", "index", "page"} | ({"run", "bench"} if trains else set())
    assert ("ecmoe runs --scale gpu --missing --check" in named["all"][1]) == trains
    assert [".done" in reads[name] for name in pages] == [trains] * 3
    rest_on = ("reports/gpu/repeats/a.json", "configs/protocol.yaml")  # of a verdict
    assert all(file in reads[name] for name in pages for file in rest_on)
    given = {
        name: ["configs/scale/gpu.yaml", f"configs/{name}.yaml", f"configs/scale/gpu/{name}.yaml"] for name in pages
    }
    given = {name: [file for file in files if (CHECKOUT / file).exists()] for name, files in given.items()}
    assert {shell.split(" -m ")[1] for rule, _, shell in jobs if rule == "page"} == {
        f"ecmoe report notebooks/{name}.ipynb reports/gpu/{name}.html -f {' -f '.join(files)} --no-train"
        for name, files in given.items()
    }
    assert all(f"reports/gpu/{name}.html" in named["index"][0].split("output:")[0] for name in pages)  # it comes last
    assert ["bench.done" in reads[name] for name in pages] == [trains, False, trains]  # C9 is about time, too
    if not trains:
        return
    assert "place=6" in named["bench"][0] and "threads: 12" in named["bench"][0]
    assert "ecmoe bench all --scale gpu || true" in named["bench"][1]
    runs = sorted(
        (-int(re.search(r"priority: (\d+)", about)[1]), about, shell) for rule, about, shell in jobs if rule == "run"
    )
    wanted = [one.name for one in plan.plan("gpu") if not set(pages).isdisjoint(one.pages)]
    batches = [
        re.search(r"ECMOE_SHARING=3 .+ -m ecmoe run (.+) --scale gpu \|\| test \$\? -eq 2 -o 1 -ge 3$", shell)[
            1
        ].split()
        for *_, shell in runs
    ]
    assert sum(batches, []) == wanted and {len(some) for some in batches[:-1]} == {4}  # in order, four a process
    assert all("place=1" in about and "threads: 2" in about for _, about, _ in runs)  # three on each GPU at once
    marked = {
        re.search(r"[\w-]+\.done", about)[0]: set(names) for (_, about, _), names in zip(runs, batches, strict=True)
    }
    claims = yaml.safe_load((CHECKOUT / "configs/protocol.yaml").read_text())["claims"]
    parts = claims["C1"]["parts"] + claims["C9"]["parts"]
    arms = set(np.hstack([part[key] for part in parts for key in "ab" if key in part]))
    own = {name: {one.name for one in plan.plan("gpu", [name])} for name in pages}
    compared = {one.name for one in plan.plan("gpu") if arms & set(one.arms)}
    shown = {
        "01_convergence": own["01_convergence"] | compared,  # some by page 02 alone
        "02_load_balance": own["02_load_balance"],
        "03_capacity_factor": own["03_capacity_factor"] | own["01_convergence"],
    }
    assert compared & own["02_load_balance"] - own["01_convergence"]
    for name in pages:
        waits = set(re.findall(r"[\w-]+\.done", reads[name])) - {"bench.done"}
        assert waits == {marker for marker, names in marked.items() if names & shown[name]}, name


def test_every_notebook_has_its_config():
    """The Snakefile takes notebooks that have a config: one without would be left out in silence."""
    notebooks = {path.stem for path in (CHECKOUT / "notebooks").glob("*.ipynb")}
    configs = {path.stem for path in (CHECKOUT / "configs").glob("[0-9]*.yaml")}
    assert notebooks == configs and "01_convergence" in notebooks
    assert yaml.safe_load((CHECKOUT / "profiles/default/config.yaml").read_text())["keep-going"] is True


@pytest.mark.parametrize("scale", ["smoke", "gpu"])
@pytest.mark.parametrize("notebook", sorted(CHECKOUT.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_every_notebook_takes_what_the_pipeline_gives(notebook, scale, monkeypatch):
    """The pipeline's parameters and its --no-train, beside what the notebook declares, pass its check."""
    monkeypatch.setattr("ecmoe.study.parameters._CHECKED", set())
    values = merge_parameters(parameter_files(notebook.stem, scale)) | {"train_missing": False}
    assert page_parameters(notebook.stem, declared(nbformat.read(notebook, as_version=4)) | values) == values
