# The plan of a scale, carried out: runs with their measurements -> pages -> index.
#
#   snakemake                                  what is missing, and what is older than its notebook, configs or records
#   snakemake --config scale=gpu               another scale
#   snakemake reports/smoke/01_convergence.html
#   snakemake --profile profiles/slurm         each run a job of a cluster
#
# The flags that make it go on after a failure or a kill are in profiles/default. What is missing is known from the plan
# (ecmoe.study.plan) and from what lies in reports/<scale>; a record is never an output of a rule, since Snakemake removes
# the outputs of a job that fails. `make report` draws all pages again after a change of the package.
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ecmoe import paths
from ecmoe.files import check_known
from ecmoe.study import engine, plan, speed
from ecmoe.study.parameters import check_scale, parameter_files

SCALE = str(config.get("scale", "smoke"))
TRAIN = str(config.get("train_missing", True)).lower() in ("true", "1", "yes")
try:
    check_known("--config has no key", config, ["scale", "train_missing", "runs"])
    check_scale(SCALE)
    GPUS, PLACES = engine.places()
except ValueError as error:
    sys.exit(f"error: {error}")
ECMOE = f"{shlex.quote(sys.executable)} -m ecmoe"
REPORTS = f"reports/{SCALE}"
ATTEMPTS = 3

# Rules name a page as its file; notebooks and configs keep their own names.
NAMES = {
    paths.page_name(path.stem): path.stem
    for path in sorted(Path("notebooks").glob("*.ipynb"))
    if Path(f"configs/{path.stem}.yaml").exists()
}
PAGES = {name: f"{REPORTS}/{name}.html" for name in NAMES}
RUNS, DONE, MISSING = {}, {}, set()  # page -> names of runs; -> their files; names of runs
for page, stem in NAMES.items():
    try:
        planned = plan.plan(SCALE, [stem])
    except (ValueError, OSError):  # the page itself says what is wrong, the others are made
        planned = []
    RUNS[page] = [one.name for one in planned]
    DONE[page] = [str(file) for one in planned for file in engine.files(one, SCALE) if file.exists()]
    if PAGES[page] in sys.argv or not set(PAGES.values()) & set(sys.argv):  # of the pages that are asked for
        MISSING |= {one.name for one in planned if engine.lacks(one, SCALE)}

MISSING = set(str(config["runs"]).split(",")) if "runs" in config else MISSING  # what `ecmoe runs --train` asks for
MISSING = [one.name for one in plan.sound(SCALE)[0] if one.name in MISSING]  # in the order of configs/order.yaml

# What is timed: at scale gpu on a GPU alone.
TIMED = {"01_convergence", "08_step_time"}  # pages that show it
try:
    TIMES = [str(file) for file in speed.files(SCALE)] if TIMED & set(NAMES) else []
except (ValueError, OSError):
    TIMES = []
# Several runs side by side on a GPU are done sooner than one after the other.
CORES = workflow.cores or 2
if "place" not in workflow.global_resources:  # --resources place=2 says otherwise
    workflow.register_resource("place", GPUS * PLACES or CORES)
AT_ONCE = workflow.global_resources["place"].value
# A file that says to Snakemake that a job has ended. The record is the truth; these are gone at the end.
MARKER = str(paths.cache() / "engine" / SCALE / "{batch}.done")
BENCH = MARKER.replace("{batch}", "bench")
MEASURE = TRAIN and (SCALE == "smoke" or GPUS) and not all(map(os.path.exists, TIMES))
# A process takes seconds to start, so on one machine it does several runs; at smoke, where these take seconds too, its whole
# share. On a cluster each run is a job.
MOST = 1 if workflow.nodes else len(MISSING) if SCALE == "smoke" else 4
SIZE = max(1, min(MOST, math.ceil(len(MISSING) / AT_ONCE)))
NAMED = [MISSING[i : i + SIZE] for i in range(0, len(MISSING), SIZE)]
BATCHES = {batch[0] if len(batch) == 1 else f"batch-{i}": batch for i, batch in enumerate(NAMED)}
MARKERS = {name: MARKER.replace("{batch}", batch) for batch, names in BATCHES.items() for name in names}
# A marker says that a job has ended, to this call alone: the next one asks the records again. A page that lacks something
# rests on a newer file, too: Snakemake doesn't make what is missing in between for an output that is there.
ASKED = Path(BENCH).with_name("asked")
if workflow.is_main_process:
    shutil.rmtree(ASKED.parent, ignore_errors=True)
    ASKED.parent.mkdir(parents=True)
    ASKED.write_text(str(time.time_ns()))  # it compares the content, too


def sources(name):
    """The notebook of a page, and its YAML files."""
    stem = NAMES[name]
    return [f"notebooks/{stem}.ipynb", *map(os.path.relpath, parameter_files(stem, SCALE))]


def odd(file):
    """Would Snakemake take such a name for a pattern?"""
    return set(file) & set("{}<>")


def files(name):
    """The YAML files of a page, with the flag of each."""
    return [word for file in sources(name)[1:] for word in ("-f", file)]


def results(name):
    """What a page shows: markers of what is made before it, and files of what is there."""
    made = {MARKERS[run] for run in RUNS[name] if run in MISSING} if TRAIN else set()
    if NAMES[name] in TIMED:
        made |= {BENCH} if MEASURE else {file for file in TIMES if os.path.exists(file)}
    asked = any(file in (BENCH, *MARKERS.values()) for file in made)
    repeats = [str(file) for file in Path(REPORTS, "repeats").glob("*.json")]
    return DONE[name] + sorted(made) + sorted(repeats) + [str(ASKED)] * asked


localrules: all, trained, index
ruleorder: bench > run


rule all:
    input:
        list(PAGES.values()),  # each by name: a page that failed is missing though the index was made
        f"{REPORTS}/index.html",
    params:
        runs=f"{ECMOE} runs --scale {SCALE} --missing --check" if TRAIN and MISSING else "true",
        times=TIMES if MEASURE else ["."],
    shell:
        "{params.runs} && ls {params.times:q} > /dev/null"


rule trained:
    input:
        sorted(set(MARKERS.values())),


rule index:
    input:
        list(PAGES.values()),
    output:
        f"{REPORTS}/index.html",
    shell:
        "{ECMOE} index {SCALE} --reports {REPORTS}"


rule page:
    input:
        lambda wildcards: [file for file in sources(wildcards.name) if not odd(file)],
        lambda wildcards: results(wildcards.name),
    output:
        REPORTS + "/{name}.html",
    wildcard_constraints:
        name="|".join(map(re.escape, NAMES)) or "-",
    params:
        notebook=lambda wildcards: sources(wildcards.name)[0],
        changed=lambda wildcards: [os.stat(file).st_mtime_ns for file in sources(wildcards.name) if odd(file)],
        files=lambda wildcards: files(wildcards.name),
    shell:
        "{ECMOE} report {params.notebook:q} {output:q} {params.files:q} --no-train"


rule bench:
    output:
        touch(BENCH),
    threads: CORES if GPUS else 1
    resources:
        place=AT_ONCE if GPUS else 1,  # nothing beside it
    shell:
        "{ECMOE} bench all --scale {SCALE} || true"  # pages show the gap, and `all` says so


rule run:
    # Its runs may fail in the end: pages then show a gap, and `all` says so.
    output:
        touch(MARKER),
    wildcard_constraints:
        batch="[^/]+",
    params:
        names=lambda wildcards: BATCHES.get(wildcards.batch, [wildcards.batch]),
        places=PLACES,
    priority: lambda wildcards: list(reversed(BATCHES)).index(wildcards.batch) + 1 if wildcards.batch in BATCHES else 0
    retries: ATTEMPTS - 1
    threads: max(1, CORES // AT_ONCE)
    resources:
        attempt=lambda wildcards, attempt: attempt,
        # One that found no memory beside others comes again with a GPU to itself, then with all of them.
        place=lambda wildcards, attempt: min([1, PLACES, GPUS * PLACES or 1][attempt - 1], AT_ONCE),
    shell:
        "ECMOE_SHARING={params.places} {ECMOE} run {params.names:q} --scale {SCALE}"
        " || test $? -eq 2 -o {resources.attempt} -ge {ATTEMPTS}"  # another try would find the same config


onsuccess:
    shutil.rmtree(Path(BENCH).parent, ignore_errors=True)


onerror:
    # Something failed: the others are done, and the index says which one is missing.
    subprocess.run([sys.executable, "-m", "ecmoe", "index", SCALE, "--reports", REPORTS])
    for page in sorted(Path(REPORTS).glob("*.failed.html")):
        print(f"failed: {page.name.removesuffix('.failed.html')}, see {page}", file=sys.stderr)
