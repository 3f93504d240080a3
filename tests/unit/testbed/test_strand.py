"""A program of blocking calls runs on the virtual clock, alone, and ends where it is cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from muster.testbed.strand import Strand
from shared.transport.memory_network import MemoryNetwork


class Rig:
    def __init__(self) -> None:
        self.network = MemoryNetwork(0)
        self.seen: list[tuple[float, str]] = []

    def strand(self, program: Callable[[Strand], None]) -> Strand:
        made: list[Strand] = []
        made.append(
            Strand(
                lambda: program(made[0]),
                lambda seconds, call: self.network.schedule(self.network.now + seconds, call),
            )
        )
        return made[0]

    def note(self, what: str) -> None:
        self.seen.append((self.network.now, what))


def test_two_programs_take_turns_as_the_clock_says() -> None:
    rig = Rig()

    def resting(name: str, seconds: float) -> Callable[[Strand], None]:
        def program(strand: Strand) -> None:
            for _ in range(3):
                rig.note(name)
                strand.rest(seconds)

        return program

    one, two = rig.strand(resting("one", 2.0)), rig.strand(resting("two", 3.0))
    one.start()
    two.start()
    rig.network.run_until(100.0)
    assert rig.seen == [(0.0, "one"), (0.0, "two"), (2.0, "one"), (3.0, "two"), (4.0, "one"), (6.0, "two")]
    assert one.ended and two.ended


def test_who_is_woken_goes_on_at_once_and_the_rest_it_began_is_over() -> None:
    rig = Rig()

    def program(strand: Strand) -> None:
        strand.rest(10.0)
        rig.note("woken")
        strand.rest(10.0)
        rig.note("slept")

    strand = rig.strand(program)
    strand.start()
    rig.network.run_until(4.0)
    strand.wake()
    rig.network.run_until(100.0)
    assert rig.seen == [(4.0, "woken"), (14.0, "slept")]


def test_a_cut_program_does_nothing_more_but_what_it_does_at_its_end() -> None:
    rig = Rig()

    def program(strand: Strand) -> None:
        try:
            strand.rest(10.0)
            rig.note("never")
        except Exception:  # noqa: BLE001  # a program that handles all faults
            rig.note("never")
        finally:
            rig.note("end")

    strand = rig.strand(program)
    strand.start()
    strand.cut()
    rig.network.run_until(100.0)
    assert rig.seen == [(0.0, "end")] and strand.ended


def test_what_a_program_raises_its_owner_gets() -> None:
    rig = Rig()

    def program(strand: Strand) -> None:
        strand.rest(1.0)
        raise ValueError("broken")

    strand = rig.strand(program)
    strand.start()
    with pytest.raises(ValueError, match="broken"):
        rig.network.run_until(2.0)
    assert strand.ended
