"""The scene with the real agent: devices that train a tiny BERT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest

from muster.testbed.broker import free_port
from muster.testbed.fleet import DeviceSpec, Fleet
from tests.faults.scene import DEVICES, Scene

pytest.importorskip("torch")
from tests.training.tiny_models import colour_rows, make_bert, write_jsonl  # noqa: E402 - it needs torch


class RealScene(Scene):
    """The scene with the torch agent on a BERT of two layers. What the job is, its `text` says."""

    names: ClassVar[Sequence[str]] = DEVICES

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.marker = self.folder / "killed"
        self.victim = self.folder / "victim"
        write_jsonl(self.folder / "held.jsonl", colour_rows(24, seed=99))
        devices = [
            DeviceSpec(
                name,
                data={"colours": write_jsonl(self.folder / f"{name}.jsonl", colour_rows(48, seed=seed))},
                # One thread: the same bytes on a machine of any size.
                settings={"policy": {"foreign_limit": 1000.0}, "agent": {"threads": 1}, **self.settings},
            )
            for seed, name in enumerate(self.names)
        ]
        self.fleet = Fleet(
            self.folder / "fleet",
            devices,
            {"tiny": make_bert(self.folder / "tiny")},
            limits=False,
            commands={name: [part.format(scene=self) for part in command] for name, command in self.commands.items()},
            coordinator={"api": {"port": free_port()}, "waits": {"gather_s": 0.3, "retry_s": 1.0}},
        )
