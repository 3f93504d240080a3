"""Performs what the session machine asks for a release, and turns the outcomes into events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from typing_extensions import assert_never

from edge_daemon import protocol
from edge_daemon.adapters.releases import Broken, Full, Gone
from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev

if TYPE_CHECKING:
    from edge_daemon.runtime import Runtime

Command = cmd.CheckRelease | cmd.StageRelease | cmd.Evaluate | cmd.ActivateRelease | cmd.DropRelease | cmd.TidyReleases


@dataclass(frozen=True)
class Placed:
    """Work on a release's files is through, off the loop; `event` goes into the machine."""

    event: ev.AnyEvent


class Placer:
    """Carries out commands about releases. What reads or writes whole files goes off the loop."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def perform(self, command: Command) -> None:
        """Carry out one command; every one may be repeated after a crash."""
        folder = self._runtime.ports.store.releases
        match command:
            case cmd.CheckRelease():
                self._off(command, folder.check, ev.ReleaseChecked)
            case cmd.StageRelease():
                self._off(command, lambda content: folder.stage(content, command.release), ev.ReleaseStaged)
            case cmd.Evaluate():
                self._evaluate(command)
            case cmd.ActivateRelease():
                self._activate(command.release)
            case cmd.DropRelease():
                folder.drop(command.release)
            case cmd.TidyReleases():
                folder.tidy(command.releases)
            case _:
                assert_never(command)

    def _off(
        self,
        command: cmd.CheckRelease | cmd.StageRelease,
        work: Callable[[Path], None],
        done: type[ev.ReleaseChecked | ev.ReleaseStaged],
    ) -> None:
        runtime, release = self._runtime, command.release
        content = runtime.ports.store.blobs.path(command.sha)

        def problem(fault: Literal["broken", "gone", "disk"], reason: str) -> Placed:
            return Placed(ev.ReleaseProblem(now=runtime.ports.clock(), release=release, reason=reason, fault=fault))

        def place() -> Placed:
            if content is None:
                return problem("gone", "its content vanished from the disk")
            try:
                work(content)
            except Broken as error:
                return problem("broken", str(error))
            except (Full, OSError, MemoryError) as error:
                return problem("disk", str(error) or type(error).__name__)
            return Placed(done(now=runtime.ports.clock(), release=release))

        runtime.ports.offload(place)

    def _activate(self, release: str) -> None:
        runtime = self._runtime
        try:
            runtime.ports.store.releases.activate(release)
        except (Gone, Full) as error:
            fault: Literal["gone", "disk"] = "gone" if isinstance(error, Gone) else "disk"
            problem = ev.ReleaseProblem(now=runtime.ports.clock(), release=release, reason=str(error), fault=fault)
            runtime.step(problem)
            return
        runtime.step(ev.ReleaseActivated(now=runtime.ports.clock(), release=release))

    def _evaluate(self, order: cmd.Evaluate) -> None:
        runtime, wanted = self._runtime, order.release
        store, policy = runtime.ports.store, runtime.settings.policy
        runtime.ports.trainer.tell(
            protocol.Evaluate(
                release=wanted.id, folder=str(store.releases.folder(wanted.id)), kind=wanted.kind,
                previous=str(store.releases.folder(order.previous)) if order.previous else "", task=wanted.task,
                base=wanted.base, base_path=order.base_path, base_digest=wanted.base_digest, source=order.source,
                bits=order.bits, seed=wanted.seed, data_path=order.data_path, hold_out=order.hold_out,
                share=order.share, trained_on=order.trained_on, rows=order.rows, hub=policy.hub,
                bases_dir=str(store.bases), disk_reserve=policy.disk_reserve_bytes, digests_path=str(store.digests),
            )
        )  # fmt: skip
