"""`ecmoe bench layer | step | profile | auto`; `all`, which needs the plan of a study, is added by the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ecmoe.bench.rows import OF_LAYER, SIZES
from ecmoe.files import one_line

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(no_args_is_help=True, help="Time the layer, a training step, or all that the page of speed shows.")

SIZE = "default: 0.1B/64E on a GPU, small on a CPU"
Repeats = Annotated[int, typer.Option(min=2, help="of each row; medians count")]
Compiled = Annotated[bool, typer.Option("--compile", help="under torch.compile too")]
Output = Annotated[Path | None, typer.Option("--json", help="keep the table as JSON")]
LEAST = {"layers": 2, "vocab_size": 257}  # of sizes; of others 1


def sized(keys: Iterable[str]) -> Callable[[Callable], Callable]:
    """Decorate a command: its `**sizes` become an option for each of these keys."""

    def decorate(command: Callable) -> Callable:
        *own, _ = inspect.signature(command, eval_str=True).parameters.values()
        sizes = []
        for key in keys:
            flag = "--tokens" if key == "n" else f"--{key.replace('_', '-')}"
            command.__annotations__[key] = kind = Annotated[
                int | None, typer.Option(flag, min=LEAST.get(key, 1), help=SIZE)
            ]
            sizes.append(inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        command.__signature__ = inspect.Signature(sizes + own)  # type: ignore[attr-defined]
        return command

    return decorate


@app.command()
@sized(OF_LAYER)
def layer(
    capacity_factor: Annotated[float, typer.Option(help="c; k is n c / e")] = 2.0,
    repeats: Repeats = 15,
    compiled: Compiled = False,
    dykstra: Annotated[bool, typer.Option("--dykstra", help="cap by the paper's solver too, which is slow")] = False,
    output: Output = None,
    **sizes: int | None,
) -> None:
    """The MoE layer beside its floor, the six matrix products that it can't do without, and beside its rivals."""
    with one_line():
        from ecmoe.bench.layer import bench_layer

        options = {"repeats": repeats, "compiled": compiled, "dykstra": dykstra}
        show(bench_layer(**sizes, capacity_factor=capacity_factor, **options), output)


@app.command()
def auto(
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="each of these; default: 512 to 131,072")] = None,
    d_model: Annotated[list[int] | None, typer.Option(min=1, help="with each of these; default: 256 to 4096")] = None,
    num_experts: Annotated[int, typer.Option(min=1)] = 32,
    repeats: Repeats = 9,
    compiled: Compiled = False,
    output: Output = None,
) -> None:
    """What a run gets beside the plain path, size by size: it must never be slower."""
    with one_line():
        from ecmoe.bench.layer import bench_auto

        sizes = [{"n": n, "d_model": d} for d in d_model or AUTO_WIDTHS for n in tokens or AUTO_TOKENS]
        show(bench_auto(sizes, num_experts=num_experts, compiled=compiled, repeats=repeats), output)


AUTO_TOKENS, AUTO_WIDTHS = (512, 2048, 8192, 32_768, 131_072), (256, 512, 1024, 2048, 4096)


@app.command()
@sized(SIZES["cpu"])
def step(repeats: Repeats = 15, compiled: Compiled = False, output: Output = None, **sizes: int | None) -> None:
    """A whole training step, expert choice against token choice."""
    with one_line():
        from ecmoe.bench.step import bench_step

        show(bench_step(repeats=repeats, compiled=compiled, **sizes), output)


@app.command()
@sized(SIZES["cpu"])
def profile(compiled: Compiled = False, output: Output = None, **sizes: int | None) -> None:
    """Where the time of EC-CF2's training step goes, by kind of work."""
    with one_line():
        from ecmoe.bench.profile import bench_profile

        show(bench_profile(compiled=compiled, **sizes), output)


def show(table: pd.DataFrame, output: Path | None = None) -> None:
    """Print what was measured, and where; and keep it in a file."""
    from ecmoe.bench.clock import save, shown

    if output:
        save(table, output)
    typer.echo(" ".join(f"{key}={value}" for key, value in table.attrs["setting"].items()))
    typer.echo(shown(table.drop(columns="samples_ms", errors="ignore")))
    if table.attrs.get("agreement"):
        typer.echo("\nrelative distance from the plain path in float32, one choice of tokens:")
        typer.echo(shown(table.attrs["agreement"]))
    if table.attrs.get("absent"):
        typer.echo("\nnot measured, since not there or not possible:\n" + "\n".join(table.attrs["absent"]))
