# Notebooks to pages: reports/<scale>/<notebook>.html, then the scoreboard and index.html.
#
#   snakemake                                  what is missing or older than its notebook or configs
#   snakemake --config scale=gpu               another scale
#   snakemake reports/smoke/01_convergence.html
#
# The flags that make it go on after a failure or a kill are in profiles/default. A page depends on its
# notebook and its configs only; `make report` redraws all of them after a change of the package. Runs
# are shared and locked one by one (ecmoe.training.once), so pages may ask for the same run at the same time.
import shutil
import sys
from pathlib import Path

from ecmoe.study.parameters import parameter_files

SCALE = config.get("scale", "smoke")
TRAIN = str(config.get("train_missing", True)).lower() in ("true", "1", "yes")
PYTHON = sys.executable
SCOREBOARD = "12_scoreboard"
REPORTS = f"reports/{SCALE}"
NAMES = [p.stem for p in sorted(Path("notebooks").glob("*.ipynb")) if Path(f"configs/{p.stem}.yaml").exists()]
PAGES = [f"{REPORTS}/{name}.html" for name in NAMES]
GPU = shutil.which("nvidia-smi") is not None

if not Path(f"configs/scale/{SCALE}.yaml").exists():
    known = ", ".join(p.stem for p in sorted(Path("configs/scale").glob("*.yaml")))
    sys.exit(f"scale={SCALE}: there is no configs/scale/{SCALE}.yaml; the scales are {known}")


def parameters(name):
    return [str(file) for file in parameter_files(name, SCALE, Path("configs"))]


def command(name):
    """The shell command that makes a page."""
    flags = [f"-f {file}" for file in parameters(name)] + ["--no-train"] * (not TRAIN)
    return f"report notebooks/{name}.ipynb {REPORTS}/{name}.html {' '.join(flags)}"


rule all:
    input:
        PAGES,  # each by name: a page that failed is missing though the index was made
        f"{REPORTS}/index.html",


rule index:
    input:
        PAGES,
    output:
        f"{REPORTS}/index.html",
    shell:
        "{PYTHON:q} -m ecmoe index {SCALE} --reports {REPORTS}"


rule page:
    input:
        notebook="notebooks/{name}.ipynb",
        parameters=lambda wildcards: parameters(wildcards.name),
        # The scoreboard reads the verdicts that the other pages leave.
        pages=lambda wildcards: [p for p in PAGES if SCOREBOARD not in p] if wildcards.name == SCOREBOARD else [],
    output:
        REPORTS + "/{name}.html",
    wildcard_constraints:
        name="[0-9][^/]*",
    params:
        # Snakemake remembers it: a page drawn with gaps is made again when training is allowed.
        command=lambda wildcards: command(wildcards.name),
    # Two pages at a time on CPUs; one at a time on a GPU, by the limit in the profile.
    threads: max(1, (workflow.cores or 2) // 2)
    resources:
        gpu=int(GPU),
    shell:
        "{PYTHON:q} -m ecmoe {params.command}"


onerror:
    # A notebook failed: the others are done, and the scoreboard and the index say which one is missing.
    if SCOREBOARD in NAMES:
        shell("{PYTHON:q} -m ecmoe " + command(SCOREBOARD) + " || true")
    shell("{PYTHON:q} -m ecmoe index {SCALE} --reports {REPORTS} || true")
    for page in sorted(Path(REPORTS).glob("*.failed.html")):
        print(f"failed: {page.name.removesuffix('.failed.html')}, see {page}", file=sys.stderr)
