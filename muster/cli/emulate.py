"""`muster emulate`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

EPILOG = (
    "Examples: [bold]muster emulate[/bold] (the demo) · "
    "[bold]muster emulate --devices 6 --data ./tickets --job tickets.toml --out runs/tickets[/bold]"
)


def emulate(
    devices: Annotated[int, typer.Option(min=1, max=200, help="How many devices.")] = 4,
    profile: Annotated[str, typer.Option(help="Kind of fleet: mixed, light, equal or tiny.")] = "mixed",
    data: Annotated[
        str,
        typer.Option(
            help="Folder with train.jsonl.gz, test.jsonl.gz and labels.json, or the name of one in the folder "
            "MUSTER_DATA; or docstrings: those of the installed packages."
        ),
    ] = "docstrings",
    job: Annotated[Path | None, typer.Option(help="Job file; without it the demo's.")] = None,
    strategy: Annotated[str, typer.Option(help="Planner, in place of the job file's.")] = "",
    aggregator: Annotated[str, typer.Option(help="Aggregator, in place of the job file's.")] = "",
    alpha: Annotated[
        float, typer.Option(min=0.0, help="Skew of the labels: Dirichlet(alpha); 0: shares at random.")
    ] = 1.0,
    by_field: Annotated[str, typer.Option(help="Deal the rows out by this field instead.")] = "",
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="A base model by name; repeatable.")
    ] = None,
    lm: Annotated[
        Path | None, typer.Option(help="Texts that the base gpt2-small is trained on; without it MUSTER_DATA/lm.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the report; without it runs/<job>-<time>.")] = None,
    secure: Annotated[
        bool, typer.Option("--secure", help="As a real fleet: a certificate for each program, mutual TLS, access list.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the devices' and the coordinator's folders.")] = False,
    agent: Annotated[str, typer.Option(help="torch, or numpy: the small agent for least squares.")] = "torch",
    rounds: Annotated[int, typer.Option(min=0, help="Rounds, in place of the job file's; 0: as it says.")] = 0,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the shares and the job, in place of the job's.")] = None,
) -> None:
    """Run a whole fleet on this machine: broker, coordinator and unequal devices as real processes; then a report."""
    from muster.testbed.emulate import Emulation, run

    asked = Emulation(
        devices=devices, profile=profile, data=data, job=job, strategy=strategy, aggregator=aggregator,
        alpha=alpha, by_field=by_field, models=tuple(model or ()), out=out, keep=keep,
        agent=agent, rounds=rounds, seed=seed, lm=lm, secure=secure,
    )  # fmt: skip
    raise typer.Exit(run(asked, command=shlex.join(["muster", *sys.argv[1:]])))
