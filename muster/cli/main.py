"""The `muster` command. Errors are one line on standard error and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated

import typer

from muster.cli import broker, emulate, pki, presence, releases, simulate
from muster.cli.options import Json, Place, where
from shared.errors import UserError

app = typer.Typer(
    name="muster",
    help="Fine-tune a language model across a fleet of edge GPUs, re-planned every round.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"muster {installed_version('muster')}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    url: Annotated[str, typer.Option(envvar="MUSTER_URL", help="Address of the coordinator's HTTP API.")] = "",
    token_file: Annotated[
        str, typer.Option(envvar="MUSTER_TOKEN_FILE", help="File that holds the API's bearer token.")
    ] = "",
    config: Annotated[str, typer.Option(help="Settings file of a coordinator on this machine.")] = "",
    version: Annotated[  # noqa: ARG001 - its callback answers
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Where the coordinator is: without options, the one that runs on this machine."""
    context.obj = Place(url, token_file, config)


@app.command(epilog="Example: [bold]muster submit job.toml --wait[/bold]")
def submit(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Job file (TOML).")],
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow the job until it ends; exit code 1 if it fails.")
    ] = False,
    patience: Annotated[
        float, typer.Option(min=0.0, help="With --wait: seconds for which a coordinator that is away is waited for.")
    ] = 600.0,
    json: Json = False,
) -> None:
    """Queue a job. Every fault of its file is reported at once."""
    from muster.cli import jobs

    jobs.submit(where(context), file, wait=wait, patience_s=patience, as_json=json)


@app.command(name="list", epilog="Example: [bold]muster list[/bold]")
def list_jobs(context: typer.Context, json: Json = False) -> None:
    """List all jobs."""
    from muster.cli import jobs

    jobs.list_jobs(where(context), as_json=json)


@app.command(epilog="Example: [bold]muster show demo-3f2a1c --round 2[/bold]")
def show(
    context: typer.Context,
    job: Annotated[str, typer.Argument(help="Id of the job.")],
    round: Annotated[int, typer.Option(help="Round to show device by device; 0: the last one.")] = 0,
    json: Json = False,
) -> None:
    """Show a job: its rounds, and of one round the plan with its reasons against what came of it."""
    from muster.cli import jobs

    jobs.show(where(context), job, round, as_json=json)


@app.command(epilog="Example: [bold]muster cancel demo-3f2a1c[/bold]")
def cancel(context: typer.Context, job: Annotated[str, typer.Argument(help="Id of the job.")]) -> None:
    """Cancel a job."""
    from muster.cli import jobs

    jobs.cancel(where(context), job)


@app.command(epilog="Example: [bold]muster resume demo-3f2a1c[/bold]")
def resume(context: typer.Context, job: Annotated[str, typer.Argument(help="Id of the job.")]) -> None:
    """Go on with a paused job."""
    from muster.cli import jobs

    jobs.resume(where(context), job)


@app.command(epilog="Example: [bold]muster export demo-3f2a1c ./adapter[/bold]")
def export(
    context: typer.Context,
    job: Annotated[str, typer.Argument(help="Id of the job.")],
    folder: Annotated[Path, typer.Argument(help="Folder to make.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="The whole model, the adapter added to its weights.")
    ] = False,
    base: Annotated[str, typer.Option(help="With these: the base here, if not as the adapter names it.")] = "",
    ratio: Annotated[
        float | None,
        typer.Option(min=0.0, max=0.99, help="Of a job that prunes: a smaller model, this share of its units gone."),
    ] = None,
    device_class: Annotated[
        str, typer.Option("--device-class", help="The same, as small as it is on devices of this class.")
    ] = "",
    data: Annotated[str, typer.Option(help="With these two: JSONL file of rows to measure the smaller model on.")] = "",
) -> None:
    """Fetch a finished job's adapter: a folder that PeftModel.from_pretrained loads."""
    from muster.cli import jobs

    jobs.export(
        where(context), job, folder, merged=merged, base=base, ratio=ratio, device_class=device_class, data=data
    )


@app.command(
    epilog="Examples: [bold]muster devices edge-01[/bold] · [bold]muster devices --record day.jsonl --for 86400[/bold]"
)
def devices(
    context: typer.Context,
    device: Annotated[str, typer.Argument(help="Id of a device to show in full, its GPUs one by one.")] = "",
    json: Json = False,
    record: Annotated[
        Path | None,
        typer.Option(
            help="Write what the devices tell of load and links to this new file, until Ctrl-C: a recording for "
            "muster simulate --replay. With an id: of that device alone."
        ),
    ] = None,
    for_s: Annotated[float, typer.Option("--for", min=0.0, help="With --record: seconds; 0: until Ctrl-C.")] = 0.0,
) -> None:
    """List the devices with their load, as the coordinator sees them now; show one in full; or record them."""
    if json and record is not None:
        raise UserError("--json prints the devices as they are now: it does not go with --record")
    if for_s and record is None:
        raise UserError("--for says how long to record: it goes with --record")
    if record is not None:
        from muster.cli import recording

        recording.record(where(context), record, device, for_s)
    else:
        from muster.cli import jobs

        jobs.devices(where(context), device, as_json=json)


@app.command(epilog="Example: [bold]muster forget edge-07[/bold]")
def forget(context: typer.Context, device: Annotated[str, typer.Argument(help="Id of the device.")]) -> None:
    """Take a device out of the fleet. Stop it and revoke its certificate first: otherwise it comes back."""
    from muster.cli import jobs

    jobs.forget(where(context), device)


app.command(epilog=releases.EPILOG)(releases.release)
app.command(epilog=emulate.EPILOG)(emulate.emulate)
app.command(epilog=simulate.EPILOG)(simulate.simulate)
app.command(epilog=presence.EPILOG)(presence.presence)
app.add_typer(pki.app)
app.add_typer(broker.app)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. 0: done; 1: the job or run failed; 2: the operator has to change something."""
    try:
        code = app(args=None if argv is None else list(argv), standalone_mode=False)
        return code if isinstance(code, int) else 0
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except typer.Exit as leave:
        return leave.exit_code
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # Typer's usage errors, with the exit code and message of its own standalone mode in one line. Without a message
        # nothing was asked, and the help is shown already.
        if hasattr(error, "format_message"):
            if message := " ".join(error.format_message().split()):
                print(f"error: {message}", file=sys.stderr)
            return 2
        raise


if __name__ == "__main__":
    sys.exit(main())
