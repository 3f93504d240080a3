"""The steps of a round of split learning, conducted without tensors or broker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
import pytest

from coordinator.core import split_round as conduct
from coordinator.core.split_round import SplitRound
from shared.steps import Begin, End, Features, Gradient, Hello, Query, Skip
from shared.tensors import WireTensor

WORK = "job-1/1/1"
NOTHING = WireTensor(dtype="f4", shape=[1], data=memoryview(b"\0\0\0\0"))


def hello(run: int, held: Iterable[int] = (0,)) -> Hello:
    return Hello(work=WORK, run=run, held=list(held))


def features(run: int, step: int) -> Features:
    return Features(work=WORK, run=run, step=step, hidden=NOTHING, targets=memoryview(b""))


def said(actions: list[conduct.Action], device: str) -> list[object]:
    return [one.message for one in actions if isinstance(one, conduct.Say) and one.device == device]


def takes(actions: list[conduct.Action]) -> list[tuple[int, tuple[str, ...]]]:
    return [(one.step, one.devices) for one in actions if isinstance(one, conduct.Take)]


def a_round(*devices: str, steps: int = 10, every: int = 2, held: Iterable[int] = (), run: int = 1) -> SplitRound:
    return SplitRound(WORK, devices, steps=steps, every=every, held=held, run=run, step_s=10.0)


def begun(*devices: str, **given: int) -> SplitRound:
    made = a_round(*devices, **given)
    made.start(0.0)
    for device in devices:
        made.on_hello(device, hello(made.run), 0.0)
    assert made.phase == "stepping"
    return made


def do(made: SplitRound, devices: Iterable[str], now: float = 1.0) -> list[conduct.Action]:
    """One step, in which these take part."""
    found: list[conduct.Action] = []
    for device in devices:
        found = made.on_features(device, features(made.run, made.done + 1), now)
    assert takes(found) == [(made.done + 1, tuple(sorted(devices)))]
    after = made.taken(now)
    if made.due_save:
        made.saved({*made.held, made.done})
    return after


def test_a_run_begins_once_all_have_said_what_they_hold() -> None:
    made = a_round("a", "b", held=[2, 4])
    asked = made.start(0.0)
    assert all(said(asked, device) == [Query(work=WORK, run=1)] for device in "ab")
    assert made.on_hello("a", hello(1, [0, 2, 4]), 1.0) == []
    actions = made.on_hello("b", hello(1, [0, 2]), 2.0)
    begin = Begin(work=WORK, run=1, load=2, step=2)
    assert conduct.GoTo(2) in actions and said(actions, "a") == said(actions, "b") == [begin]
    assert made.done == 2 and made.held == {0, 2}, "what is later is void"


def test_batches_follow_what_the_devices_tell_of_their_downloads() -> None:
    asked: list[dict[str, float]] = []

    def regulate(fetched: Mapping[str, float]) -> dict[str, int]:
        asked.append(dict(fetched))
        return {device: int(10 * took) or 3 for device, took in fetched.items()}

    made = SplitRound(WORK, "abc", steps=10, every=2, held=[], run=1, step_s=10.0, regulate=regulate)
    made.start(0.0)
    for device, took in {"a": 0.4, "b": 0.8}.items():
        actions = made.on_hello(device, msgspec.structs.replace(hello(1), fetch_s=took), 0.0)
    actions = made.tick(50.0)
    assert asked == [{"a": 0.4, "b": 0.8, "c": 0.0}], "who may still come is part of the step"
    assert said(actions, "a") == [Begin(work=WORK, run=1, load=0, step=0, batch=4)]
    assert said(actions, "b") == [Begin(work=WORK, run=1, load=0, step=0, batch=8)]
    late = said(made.on_hello("c", msgspec.structs.replace(hello(1), fetch_s=2.0), 51.0), "c")
    assert late == [Begin(work=WORK, run=1, load=0, step=0, batch=3)], "the others are at it: as was reckoned with"
    again = said(made.on_hello("a", hello(1), 52.0), "a")
    assert again == [Begin(work=WORK, run=1, load=0, step=0, batch=4)]


def test_who_holds_nothing_takes_all_back_to_the_start() -> None:
    made = a_round("a", "b", held=[2, 4])
    made.start(0.0)
    made.on_hello("a", hello(1, [0, 2, 4]), 1.0)
    assert conduct.GoTo(0) in made.on_hello("b", hello(1, [0]), 1.0)


def test_a_hello_of_another_run_is_asked_again() -> None:
    made = a_round("a", run=5)
    made.start(0.0)
    assert said(made.on_hello("a", hello(0), 0.1), "a") == [Query(work=WORK, run=5)]
    assert made.phase == "gathering"


def test_the_silent_are_asked_again_and_then_not_waited_for() -> None:
    made = a_round("a", "b")
    made.start(0.0)
    made.on_hello("a", hello(1), 0.5)
    again = made.tick(1.0)
    assert said(again, "a") == [] and said(again, "b") == [Query(work=WORK, run=1)]
    assert made.tick(1.5) == []
    late = 0.5 + conduct.GATHER_STEPS * 10.0
    assert made.phase == "gathering"
    actions = made.tick(late)
    assert said(actions, "a") == [Begin(work=WORK, run=1, load=0, step=0)] and said(actions, "b") == []


def test_a_device_that_will_not_come_is_not_waited_for() -> None:
    made = a_round("a", "b")
    made.start(0.0)
    made.on_hello("a", hello(1), 0.5)
    assert said(made.without(["b"], 0.6), "a") == [Begin(work=WORK, run=1, load=0, step=0)]


def test_a_step_is_taken_once_all_features_are_there() -> None:
    made = begun("a", "b")
    assert made.on_features("a", features(1, 1), 1.0) == []
    assert takes(made.on_features("b", features(1, 1), 2.0)) == [(1, ("a", "b"))]
    assert made.on_features("a", features(1, 1), 2.1) == [], "no second time while it is taken"
    assert made.taken(3.0) == [] and made.done == 1


def test_features_that_come_ahead_are_taken_in_their_step() -> None:
    made = begun("a", "b")
    for device in "ab":
        made.on_features(device, features(1, 1), 1.0)
        made.on_features(device, features(1, 2), 1.0)
    assert takes(made.taken(2.0)) == [(2, ("a", "b"))]


def test_who_is_late_is_left_behind_and_told_which_step_is_next() -> None:
    made = begun("a", "b")
    made.on_features("a", features(1, 1), 1.0)
    assert made.tick(10.9) == []
    assert takes(made.tick(11.0)) == [(1, ("a",))] and made.dropped == 1
    made.taken(11.0)
    do(made, "a", 12.0)
    skip = made.on_features("b", features(1, 1), 13.0)
    assert said(skip, "b") == [Skip(work=WORK, run=1, step=2)]
    assert made.on_features("a", features(1, 3), 13.0) == [], "b is waited for again"
    assert takes(made.on_features("b", features(1, 3), 14.0)) == [(3, ("a", "b"))]


def test_a_lost_gradient_is_sent_again() -> None:
    made = begun("a", "b")
    do(made, "ab")
    assert made.on_features("a", features(1, 1), 2.0) == [conduct.Again("a", 1)]


def test_both_gradients_of_a_device_that_is_two_ahead_may_be_lost() -> None:
    made = begun("a", "b", steps=4)
    for device in "ab":
        made.on_features(device, features(1, 1), 1.0)
        made.on_features(device, features(1, 2), 1.0)
    made.taken(2.0)
    made.taken(2.0)
    assert made.done == 2
    assert made.on_features("a", features(1, 1), 9.0) == [conduct.Again("a", 1)]
    assert made.on_features("a", features(1, 2), 9.0) == [conduct.Again("a", 2)]
    do(made, "ab", 10.0)
    gone = made.on_features("b", features(1, 1), 11.0)
    assert said(gone, "b") == [Skip(work=WORK, run=1, step=3)], "nobody keeps more than can be under way"


def test_a_begin_that_was_lost_is_said_again() -> None:
    made = begun("a", "b")
    assert said(made.on_hello("a", hello(1), 1.0), "a") == [Begin(work=WORK, run=1, load=0, step=0)]


def test_a_new_process_takes_all_back_to_the_last_checkpoint_that_all_hold() -> None:
    made = begun("a", "b", every=2)
    for _ in range(3):
        do(made, "ab")
    actions = made.on_hello("b", hello(0, [0, 2]), 5.0)
    assert made.run == 2 and made.phase == "gathering"
    assert said(actions, "a") == said(actions, "b") == [Query(work=WORK, run=2)]
    made.on_hello("a", hello(2, [0, 2]), 5.1)
    actions = made.on_hello("b", hello(2, [0, 2]), 5.1)
    assert conduct.GoTo(2) in actions and made.done == 2
    stale = made.on_features("a", features(1, 4), 5.2)
    assert said(stale, "a") == [Query(work=WORK, run=2)], "features of an earlier run are worth nothing"
    do(made, "ab", 6.0)
    assert made.done == 3


def test_one_that_comes_back_late_goes_on_alone_from_what_it_holds() -> None:
    made = begun("a", "b", every=2)
    made.without(["b"], 1.0)
    for _ in range(8):
        do(made, "a")
    actions = made.on_hello("b", hello(0, [0, 2]), 5.0)
    assert said(actions, "b") == [Begin(work=WORK, run=1, load=2, step=8)] and made.run == 1
    assert made.on_features("a", features(1, 9), 6.0) == []
    assert takes(made.on_features("b", features(1, 9), 6.0)) == [(9, ("a", "b"))]


def test_refused_features_are_as_if_they_had_not_come() -> None:
    made = begun("a", "b")
    made.on_features("a", features(1, 1), 1.0)
    made.on_features("b", features(1, 1), 1.0)
    made.refuse("b", 1)
    made.taken(2.0)
    assert made.on_features("b", features(1, 1), 3.0) != [conduct.Again("b", 1)]


def test_the_round_ends_after_its_steps_and_says_so_to_whoever_asks() -> None:
    made = begun("a", "b", steps=2)
    do(made, "ab")
    ended = do(made, "ab")
    assert made.phase == "over" and said(ended, "a") == [End(work=WORK, run=1)]
    assert said(made.on_hello("b", hello(1), 9.0), "b") == [End(work=WORK, run=1)]
    assert made.on_features("b", features(1, 2), 9.0) == [conduct.Again("b", 2)], "the last gradient may be lost, too"
    assert made.on_features("b", features(1, 1), 9.0) == [conduct.Again("b", 1)], "and the one before"
    assert said(made.on_features("b", features(2, 1), 9.0), "b") == [End(work=WORK, run=1)]
    assert said(made.on_hello("stranger", hello(1), 9.0), "stranger") == [End(work=WORK, run=1)]


@pytest.mark.parametrize("seed", range(30))
def test_whatever_is_lost_the_steps_come_to_their_end(seed: int) -> None:  # noqa: C901 - a whole world, in one place
    """Devices as the wire has them: they ask again, die and come back; the top dies, too. Many messages are lost."""
    import random

    rng = random.Random(seed)
    steps, every = 12, 3
    made = a_round("a", "b", "c", steps=steps, every=every)
    held = {device: {0} for device in "abc"}
    at: dict[str, int | None] = dict.fromkeys("abc")
    runs = dict.fromkeys("abc", 0)
    counted: list[int] = []
    now, top_held, run = 0.0, {0}, 1
    box = made.start(now)
    while made.phase != "over" and now < 3000.0:
        now += 1.0
        if rng.random() < 0.01:  # the top worker dies
            run += 1_000_000
            made = a_round("a", "b", "c", steps=steps, every=every, held=top_held, run=run)
            box = made.start(now)
        todo = [*box, *made.tick(now)]
        for device in "abc":
            if rng.random() < 0.02:
                at[device], runs[device] = None, 0
            message = hello(runs[device], held[device]) if at[device] is None else None
            if message is not None and rng.random() < 0.7:
                todo += made.on_hello(device, message, now)
            elif at[device] is not None and rng.random() < 0.7:
                todo += made.on_features(device, features(runs[device], (at[device] or 0) + 1), now)
        while todo:
            action = todo.pop(0)
            if isinstance(action, conduct.GoTo):
                assert action.step in top_held
                top_held = {step for step in top_held if step <= action.step}
            if isinstance(action, conduct.Take):
                counted.append(action.step)
                for device in action.devices:
                    if at[device] == action.step - 1 and runs[device] == made.run and rng.random() < 0.8:
                        at[device] = action.step
                        if action.step % every == 0:
                            held[device] = {*held[device], action.step}
                todo += made.taken(now)
                if made.due_save:
                    top_held.add(made.done)
                    made.saved(top_held)
            if isinstance(action, conduct.Say) and rng.random() < 0.7:
                device = action.device
                match action.message:
                    case Query() if action.message.run > runs[device]:
                        runs[device], at[device] = action.message.run, None
                    case Begin() as begin if begin.run >= runs[device]:
                        assert begin.load in held[device]
                        held[device] = {step for step in held[device] if step <= begin.load}
                        runs[device], at[device] = begin.run, begin.step
                    case Skip() as skip if skip.run == runs[device]:
                        at[device] = skip.step
                    case Gradient() | End() | _:
                        pass
            if isinstance(action, conduct.Again) and rng.random() < 0.7:
                at[action.device] = action.step
        box = []
    assert made.phase == "over" and made.done == steps, f"stuck at {made.done} in {made.phase}"
    assert set(counted) == set(range(1, steps + 1))


def test_a_straggler_does_not_take_the_others_to_the_start() -> None:
    made = a_round("a", "b", "c", steps=60, every=10, held=[30, 40, 50])
    made.start(0.0)
    made.on_hello("a", hello(1, [0, 30, 40, 50]), 1.0)
    made.on_hello("b", hello(1, [0, 40, 50]), 1.0)
    actions = made.on_hello("c", hello(1, [0, 10]), 1.0)
    assert conduct.GoTo(50) in actions and made.done == 50
    assert said(actions, "a") == [Begin(work=WORK, run=1, load=50, step=50)]
    assert said(actions, "c") == [Begin(work=WORK, run=1, load=10, step=50)], "from what it holds"


def test_who_is_late_twice_is_no_longer_waited_for() -> None:
    made = begun("a", "b")
    for now in (0.0, 20.0):
        made.on_features("a", features(1, made.done + 1), now)
        assert made.tick(now + 9.0) == []
        assert takes(made.tick(now + 10.0)) == [(made.done + 1, ("a",))]
        made.taken(now + 10.0)
        made.on_features("b", features(1, made.done), now + 15.0)
    assert takes(made.on_features("a", features(1, 3), 40.0)) == [(3, ("a",))], "at once"
    made.taken(40.0)
    made.on_features("b", features(1, 4), 41.0)
    made.taken(41.0)
    assert made.dropped == 2


def test_one_device_takes_the_others_back_twice_at_most() -> None:
    made = begun("a", "b", every=2)
    for _ in range(conduct.PATIENCE):
        do(made, "ab")
        made.on_hello("b", hello(0, [0]), 5.0)
        for device in "ab":
            made.on_hello(device, hello(made.run, [0]), 5.0)
        assert made.done == 0
    do(made, "ab")
    actions = made.on_hello("b", hello(0, [0]), 6.0)
    assert said(actions, "b") == [Begin(work=WORK, run=made.run, load=0, step=1)] and made.phase == "stepping"


def test_a_step_of_which_nothing_was_good_is_still_to_be_done() -> None:
    made = begun("a", "b")
    made.on_features("a", features(1, 1), 1.0)
    made.on_features("b", features(1, 1), 1.0)
    for device in "ab":
        made.refuse(device, 1)
    assert made.untaken(2.0) == [] and made.done == 0
    assert takes(made.on_features("a", features(1, 1), 3.0)) == [(1, ("a",))]


def test_the_last_step_is_saved_and_a_new_process_that_must_finish_ends_with_what_it_holds() -> None:
    made = begun("a", "b", steps=3, every=2)
    for _ in range(2):
        do(made, "ab")
    for device in "ab":
        made.on_features(device, features(1, 3), 1.0)
    made.taken(1.0)
    assert made.phase == "over" and made.due_save, "before the end is said"
    again = a_round("a", "b", held=[2, 4])
    again.start(0.0)
    assert again.end()[0] == conduct.GoTo(4) and again.done == 4


def test_steps_that_one_lacks_cost_the_others_no_more_than_it() -> None:
    made = a_round("a", "b", steps=60, every=5, held=[20, 25, 30])
    made.start(0.0)
    made.on_hello("a", hello(1, [0, 25, 30]), 1.0)
    actions = made.on_hello("b", hello(1, [0, 20]), 1.0)
    assert conduct.GoTo(20) in actions and made.done == 20
    assert said(actions, "a") == [Begin(work=WORK, run=1, load=0, step=20)]


def test_a_worker_that_must_finish_while_it_asks_again_keeps_what_it_has() -> None:
    made = begun("a", "b", every=2)
    for _ in range(3):
        do(made, "ab")
    made.on_hello("b", hello(0, [0, 2]), 5.0)
    assert made.phase == "gathering"
    assert not [one for one in made.end() if isinstance(one, conduct.GoTo)] and made.done == 3
