"""`muster simulate`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

EPILOG = "Example: [bold]muster simulate --devices 40 --strategy legend --rounds 20[/bold]"
DATA = (
    "Folder with train.jsonl.gz, test.jsonl.gz and labels.json, or the name of one in the folder MUSTER_DATA; or "
    "docstrings: those of the installed packages."
)
REPLAY = (
    "A recording of a fleet: of muster devices --record, or the telemetry.jsonl of muster emulate. What other programs "
    "take of a device comes from it and, where it tells, the link; speed and memory too with --profile recorded."
)


def simulate(
    devices: Annotated[
        int, typer.Option(min=0, max=10_000, help="How many virtual devices; 0: 80, or all that were recorded.")
    ] = 0,
    profile: Annotated[
        str,
        typer.Option(
            help="Kind of fleet: jetson, jetson-roomy, jetson-short, equal, equal-roomy, pair; devices as `muster "
            "emulate` has: emulated-mixed, emulated-light, emulated-equal, emulated-tiny; recorded: those of --replay."
        ),
    ] = "jetson",
    data: Annotated[str, typer.Option(help=DATA)] = "docstrings",
    job: Annotated[Path | None, typer.Option(help="Job file; without it examples/simulate.toml.")] = None,
    strategy: Annotated[str, typer.Option(help="Planner, in place of the job file's.")] = "",
    aggregator: Annotated[str, typer.Option(help="Aggregator, in place of the job file's.")] = "",
    rounds: Annotated[int, typer.Option(min=0, help="Rounds, in place of the job file's; 0: as it says.")] = 0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the devices, the shares and the job, in place of the job's.")
    ] = None,
    alpha: Annotated[
        float, typer.Option(min=0.0, help="Skew of the labels: Dirichlet(alpha); 0: shares at random.")
    ] = 1.0,
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="A base model by name; repeatable.")
    ] = None,
    lm: Annotated[
        Path | None, typer.Option(help="Texts that the base gpt2-small is trained on; without it MUSTER_DATA/lm.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the report; without it runs/<job>-<time>.")] = None,
    replay: Annotated[Path | None, typer.Option(help=REPLAY)] = None,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Let planners know the devices' true speeds: the price of not knowing.")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=0, max=64, help="Processes that compute gradients; 0: this one. Results are the same.")
    ] = 2,
) -> None:
    """Try a strategy on many virtual devices: virtual time, real planning, real gradients; then a report."""
    from muster.testbed.simulate import Simulation, run

    asked = Simulation(
        devices=devices, profile=profile, data=data, job=job, strategy=strategy, aggregator=aggregator, rounds=rounds,
        seed=seed, alpha=alpha, models=tuple(model or ()), lm=lm, out=out, replay=replay, oracle=oracle,
        workers=workers,
    )  # fmt: skip
    raise typer.Exit(run(asked, command=shlex.join(["muster", *sys.argv[1:]])))
