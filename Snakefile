# Carry out the plan of a scale: runs with their measurements -> pages -> index.
#
#   snakemake                                  make what is missing or older than its notebook, configs or records
#   snakemake -n                               only list what that would be; with --quiet host, in Snakemake's details
#   snakemake --config scale=gpu               the same at another scale
#   snakemake reports/smoke/01_convergence.html
#   snakemake --workflow-profile profiles/slurm   submit each run as a cluster job
#
# profiles/default holds the flags for continuing after a failed or killed job. Missing runs are found by comparing the plan
# (ecmoe.study.plan) with the files in reports/<scale>. Records are not outputs of rules, because Snakemake deletes the outputs
# of failed jobs. `make report` draws all pages again, for example after a change of the package.
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from snakemake.settings.enums import Quietness

from ecmoe import paths
from ecmoe.files import check_known
from ecmoe.study import engine, plan, speed
from ecmoe.study.parameters import check_scale, merge_parameters, parameter_files
from ecmoe.study.protocol import protocol

SCALE = str(config.get("scale", "smoke"))
try:
    check_known("--config has no key", config, ["scale", "train_missing", "runs"])
    check_scale(SCALE)
    if set("{}") & set(str(paths.root())):  # Snakemake would read a wildcard
        raise ValueError(f"{paths.root()}: must have no braces in its path: move the checkout, or set ECMOE_HOME")
    usual = merge_parameters([paths.configs() / "scale" / f"{SCALE}.yaml"]).get("train_missing", True)
    TRAIN = str(config.get("train_missing", usual)).lower() in ("true", "1", "yes")
    GPUS, PLACES = engine.places()
    PLAN = plan.sound(SCALE)[0]
except ValueError as error:
    sys.exit(f"error: {error}")
ECMOE = f"{shlex.quote(sys.executable)} -m ecmoe"
REPORTS = f"reports/{SCALE}"
ATTEMPTS = 3
DRY_RUN = workflow.output_settings.dryrun

# Name of a page's file, used in rules -> name of its notebook and configs.
NAMES = {
    paths.page_name(path.stem): path.stem
    for path in sorted(Path("notebooks").glob("*.ipynb"))
    if Path(f"configs/{path.stem}.yaml").exists()
}
PAGES = {name: f"{REPORTS}/{name}.html" for name in NAMES}


def shown_by(stem):
    """Return the runs that a page shows: those of its own plan, and of the pages and claims that its notebook names in its code; and
    whether it shows timings."""
    code = Path(f"notebooks/{stem}.ipynb").read_text(encoding="utf-8")
    pages = [other for other in NAMES.values() if other == stem or rf"\"{other}\"" in code]
    claims = [claim for id, claim in protocol().claims.items() if rf"\"{id}\"" in code]
    compared = [of_seed for claim in claims for of_seed in claim.runs(SCALE, PLAN).values()]
    runs = plan.sound(SCALE, pages)[0] + [one for of_seed in compared for one in of_seed.values()]
    timed = re.search(r"ecmoe\.study(\.| import .*\b)(cost|speed)\b", code) or any(claim.timed for claim in claims)
    return runs, timed


RUNS, DONE = {}, {}  # page -> names of the runs that it shows; page -> their result files that exist
TIMED, MISSING = set(), set()  # pages that show timings; names of missing runs
for page, stem in NAMES.items():
    try:
        planned, (shown, timed) = plan.plan(SCALE, [stem]), shown_by(stem)
    except (ValueError, OSError):  # making the page will report the error; the other pages are still made
        planned, shown, timed = [], [], False
    RUNS[page] = {one.name for one in shown}
    DONE[page] = {str(file) for one in shown for file in engine.files(one, SCALE) if file.exists()}
    if timed:
        TIMED.add(page)
    if PAGES[page] in sys.argv or not set(PAGES.values()) & set(sys.argv):  # of the requested pages, by default all
        MISSING |= {one.name for one in planned if engine.lacks(one, SCALE)}

MISSING = set(str(config["runs"]).split(",")) if "runs" in config else MISSING  # as `ecmoe runs --train` passes them
LACK = {
    one.name: f"\n  {one.pages[0]} {one.arms[0]} s{one.seed}  {one.name}  {engine.lacks(one, SCALE)}"
    for one in PLAN  # in the order of configs/order.yaml
    if one.name in MISSING
}
MISSING = list(LACK)

# Timing files; at scales other than smoke they are measured on a GPU only.
try:
    TIMES = [str(file) for file in speed.files(SCALE)] if TIMED else []
except (ValueError, OSError):
    TIMES = []
# Several runs that share a GPU finish sooner than the same runs one by one. A "place" is one run's slot.
CORES = workflow.global_resources["_cores"].value or 2  # a cluster has none
if "place" not in workflow.global_resources:  # `--resources place=2` overrides it
    workflow.register_resource("place", GPUS * PLACES or CORES)
AT_ONCE = workflow.global_resources["place"].value
# A marker file tells Snakemake that a job has ended, whether or not its runs succeeded: the records show that. Deleted at the end.
# A dry run has a folder of its own, since the pipeline may be running meanwhile.
MARKER = str(paths.cache() / "engine" / (f"{SCALE}-dry-run" if DRY_RUN else SCALE) / "{batch}.done")
BENCH = MARKER.replace("{batch}", "bench")
MEASURE = TRAIN and (SCALE == "smoke" or GPUS) and not all(map(os.path.exists, TIMES))
# Starting a process takes seconds, so on one machine each job does up to four runs; at smoke, where runs take seconds too, the
# missing runs are divided evenly among the jobs. On a cluster each run is a job.
MOST = 1 if workflow.nodes else len(MISSING) if SCALE == "smoke" else 4
SIZE = max(1, min(MOST, math.ceil(len(MISSING) / AT_ONCE)))
NAMED = [MISSING[i : i + SIZE] for i in range(0, len(MISSING), SIZE)]
BATCHES = {batch[0] if len(batch) == 1 else f"batch-{i}": batch for i, batch in enumerate(NAMED)}
MARKERS = {name: MARKER.replace("{batch}", batch) for batch, names in BATCHES.items() for name in names}
# Markers hold for this call only; the next call checks the records again. Pages that wait for a job also depend on the file `asked`,
# which is always newer: otherwise Snakemake wouldn't make missing intermediate files for a page that exists.
ASKED = Path(BENCH).with_name("asked")
if workflow.is_main_process:
    shutil.rmtree(ASKED.parent, ignore_errors=True)
    ASKED.parent.mkdir(parents=True)
    ASKED.write_text(str(time.time_ns()))  # unique, because Snakemake also compares the content


# A dry run lists jobs, about which profiles/default is quiet, with a line for each.
LISTS = DRY_RUN and workflow.output_settings.quiet == {Quietness.RULES, Quietness.PROGRESS}
if LISTS:
    workflow.output_settings.quiet.remove(Quietness.RULES)
    workflow.output_settings.quiet.add(Quietness.REASON)


def listed(text):
    """Return a job's line in the list of a dry run; None elsewhere."""
    return text if LISTS else None


def sources(name):
    """Return the notebook of a page and its YAML files."""
    stem = NAMES[name]
    return [f"notebooks/{stem}.ipynb", *map(os.path.relpath, parameter_files(stem, SCALE))]


def odd(file):
    """Return whether Snakemake would read a file's name as a pattern; such files are tracked by their time of modification."""
    return set(file) & set("{}<>")


def results(name):
    """Return the inputs of a page besides its sources: existing results, and markers of jobs that must end first."""
    made = {MARKERS[run] for run in RUNS[name] if run in MARKERS} if TRAIN else set()
    if name in TIMED:
        made |= {BENCH} if MEASURE else {file for file in TIMES if os.path.exists(file)}
    asked = any(file in (BENCH, *MARKERS.values()) for file in made)
    judged_by = {os.path.relpath(paths.configs() / "protocol.yaml"), *map(str, Path(REPORTS, "repeats").glob("*.json"))}
    return sorted(DONE[name] | made | judged_by) + [str(ASKED)] * asked


localrules: all, trained, index
ruleorder: bench > run


rule all:
    message:
        listed("check that nothing is missing")
    input:
        list(PAGES.values()),  # not only the index, which is made even if a page has failed
        f"{REPORTS}/index.html",
    params:
        runs=f"{ECMOE} runs --scale {SCALE} --missing --check" if TRAIN and MISSING else "true",
        times=TIMES if MEASURE else ["."],
    shell:
        "{params.runs} && ls {params.times:q} > /dev/null"


rule trained:
    message:
        listed("end when these runs have ended")
    input:
        sorted(set(MARKERS.values())),


rule index:
    message:
        listed("write {output}")
    input:
        list(PAGES.values()),
    output:
        f"{REPORTS}/index.html",
    shell:
        "{ECMOE} index --scale {SCALE} --reports {REPORTS}"


rule page:
    message:
        listed("draw {output}")
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
        files=lambda wildcards: [word for file in sources(wildcards.name)[1:] for word in ("-f", file)],
    shell:
        "{ECMOE} report {params.notebook:q} {output:q} {params.files:q} --no-train"


rule bench:
    message:
        listed(f"time {', '.join(os.path.relpath(file) for file in TIMES if not os.path.exists(file))}")
    output:
        touch(BENCH),
    threads: CORES if GPUS else 1
    resources:
        place=AT_ONCE if GPUS else 1,  # on a GPU nothing else runs meanwhile
    shell:
        "{ECMOE} bench all --scale {SCALE} || true"  # after a failure pages show a gap, and rule `all` fails


rule run:
    # If runs fail in all attempts, the job still succeeds: pages show gaps, and rule `all` fails.
    message:
        listed("train or measure:{params.lack}")
    output:
        touch(MARKER),
    wildcard_constraints:
        batch="[^/]+",
    params:
        names=lambda wildcards: BATCHES.get(wildcards.batch, [wildcards.batch]),
        lack=lambda wildcards: "".join(LACK[name] for name in BATCHES.get(wildcards.batch, ())),
        places=PLACES,
    priority: lambda wildcards: list(reversed(BATCHES)).index(wildcards.batch) + 1 if wildcards.batch in BATCHES else 0
    retries: ATTEMPTS - 1
    threads: max(1, CORES // AT_ONCE)
    resources:
        attempt=lambda wildcards, attempt: attempt,
        # A failed job may have run out of GPU memory: the second attempt gets a GPU of its own, the third all GPUs.
        place=lambda wildcards, attempt: min([1, PLACES, GPUS * PLACES or 1][attempt - 1], AT_ONCE),
    shell:
        "ECMOE_SHARING={params.places} {ECMOE} run {params.names:q} --scale {SCALE}"
        " || test $? -eq 2 -o {resources.attempt} -ge {ATTEMPTS}"  # 2: invalid config, a retry can't help


onsuccess:
    shutil.rmtree(Path(BENCH).parent, ignore_errors=True)


onerror:
    # Write the index even though a page failed; it shows which.
    subprocess.run([sys.executable, "-m", "ecmoe", "index", "--scale", SCALE, "--reports", REPORTS])
    for page in sorted(Path(REPORTS).glob("*.failed.html")):
        print(f"failed: {page.name.removesuffix('.failed.html')}, see {page}", file=sys.stderr)
