"""`ecmoe bench`: take timings on this machine, by ecmoe/bench/; ecmoe/study/speed.py says which ones pages need."""

import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ecmoe import paths
from ecmoe.config import CHOICES, ConfigError
from ecmoe.files import assignments, check_known

bench = typer.Typer(
    no_args_is_help=True, help="Time the layer, a training step, all that page 08 shows of one GPU, or several GPUs."
)
TIMED = {
    "layer": "Time the MoE layer, its floor (the six matrix products that it needs at least), and other implementations.",
    "auto": "Time the implementation that a run chooses against plain PyTorch, for several sizes.",
    "step": "Time a whole training step, expert choice against token choice.",
    "profile": "Show where the time of EC-CF2's training step goes, by kind of work.",
}
Sizes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="key=value, such as n=4096 (of auto: num_experts=16); default: 0.1B/64E on a GPU, small on a CPU"
    ),
]
Json = Annotated[Path | None, typer.Option("--json", help="also save the table as JSON")]
for _name, _help in TIMED.items():

    @bench.command(_name, help=_help)
    def _timed(context: typer.Context, changes: Sizes = None, output: Json = None) -> None:
        from ecmoe.study import speed

        job = speed.job(context.info_name, **assignments(changes))
        try:
            table = job()
        except RuntimeError as error:  # torch has no type of its own for a CPU's memory
            if "memory" not in str(error):
                raise
            sizes = ", ".join(changes or ["the default sizes"])
            raise ConfigError(
                f"{sizes}: don't fit into this device's memory, lower one of n, d_model, d_ff, num_experts"
            ) from error
        _show(table, output)


def _of_this_machine(scale: str) -> str:
    from ecmoe.study import speed

    scale = scale or ("gpu" if speed.may("gpu") else "smoke")
    if not speed.may(scale):
        raise ConfigError(f"--scale {scale}: its timings need a GPU, and this machine has none: use --scale smoke")
    return scale


Scale = Annotated[
    str, typer.Option(callback=_of_this_machine, show_default=False, help="sizes; default: gpu with CUDA, else smoke")
]
Out = Annotated[Path | None, typer.Option(help="folder to write to; default: reports/SCALE/bench")]


@bench.command("all")
def bench_all(
    scale: Scale = "",
    only: Annotated[str, typer.Option(help="parts to measure, by name or prefix: layer,step")] = "",
    out: Out = None,
    force: Annotated[bool, typer.Option("--force", help="measure again parts that exist")] = False,
) -> None:
    """Time all that page 08 shows of one GPU, and the steps of page 01's arms. Each part is saved at once; one that
    fails stops no other."""
    import torch

    from ecmoe.study import speed

    known = speed.jobs(**speed.plan(scale))
    asked = list(filter(None, only.split(","))) or [""]  # the empty prefix fits all
    starts = tuple(start for start in asked if start not in known)
    wanted = {name: job for name, job in known.items() if name in asked or name.startswith(starts)}
    if not wanted:
        raise ConfigError(f"--only {only}: no such part; there are {', '.join(known)}")
    into, failed = out or paths.results(scale, "bench"), False
    typer.echo(f"{', '.join(wanted)} -> {into}")
    if torch.cuda.is_available() and len(wanted) > 1:  # a process each: memory is freed, and a crash contained
        command = [sys.executable, "-m", "ecmoe", "bench", "all", "--scale", scale, "--out", str(into)]
        command += ["--force"] * force
        raise typer.Exit(int(any([subprocess.run([*command, "--only", name]).returncode for name in wanted])))
    for name, job in wanted.items():
        path = into / f"{name}.json"
        if path.exists() and not force:
            typer.echo(f"{name}: exists already (--force measures it again)")
            continue
        try:
            typer.echo(f"\n{name}:")
            _show(job(), path)
        except Exception as error:  # go on with the other parts
            failed = True
            typer.echo(f"{name}: {type(error).__name__}: {error}", err=True)
    raise typer.Exit(int(failed))


@bench.command("scaling")
def bench_scaling(
    scale: Scale = "",
    devices: Annotated[list[int] | None, typer.Option(min=1, help="GPUs, repeatable; default: as page 08")] = None,
    strategy: Annotated[list[str] | None, typer.Option(help="strategy, repeatable: ddp, fsdp2, ep")] = None,
    pool: Annotated[list[str] | None, typer.Option(help="tokens that compete, repeatable: rank, batch")] = None,
    repeats: Annotated[int, typer.Option(min=2, help="timed samples of ten steps; the median counts")] = 5,
    only: Annotated[str, typer.Option(help="parts to measure")] = "training,layers,losses",
    out: Out = None,
) -> None:
    """Time training on one GPU and on several with each strategy, and layers whose experts are distributed over GPUs;
    compare the losses of one model on one GPU and on several. Each row is saved as soon as it is measured."""
    import torch

    from ecmoe.bench import across, scaling
    from ecmoe.study import speed

    given = {"devices": devices, "strategies": strategy, "pools": pool}
    asked = speed.scaling(scale) | {key: value for key, value in given.items() if value}
    layers, base, into = asked.pop("layers"), asked["base"], out or paths.results(scale, "bench")
    there = torch.cuda.device_count() or max(asked["devices"])
    several, how = sorted(many for many in asked["devices"] if 1 < many <= there), (strategy or ["ddp"])[0]
    tables: dict[str, Callable[[], Iterable[Any]]] = {
        "training": lambda: scaling.bench_scaling(**asked, repeats=repeats),
        "layers": lambda: across.bench_across(layers, several, repeats=repeats),
        "losses": lambda: (scaling.bench_losses(base, most, how) for most in several[-1:]),
    }
    parts = only.split(",")
    check_known("--strategy", strategy or (), CHOICES["strategy"])
    check_known("--pool", pool or (), CHOICES["pool"])
    check_known("--only", parts, tables)
    for part in parts:
        for table in tables[part]():
            _show(table, into / ("scaling.json" if part == "training" else f"scaling-{part}.json"))


def _show(table: Any, output: Path | None = None) -> None:
    """Print a DataFrame of timings with its setting, and save it if `output` is given."""
    from ecmoe.bench.clock import save

    try:
        if output:
            save(table, output)
    finally:  # print the table even if it can't be saved
        typer.echo(" ".join(f"{key}={value}" for key, value in table.attrs["setting"].items()))
        rows = table.drop(columns="samples_ms", errors="ignore").dropna(axis=1, how="all")
        typer.echo(rows.to_string(index=False, float_format="{:.4g}".format, na_rep=""))
        if table.attrs.get("absent"):
            typer.echo("\nnot measured (not installed, or not possible here):\n" + "\n".join(table.attrs["absent"]))
