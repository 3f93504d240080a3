"""The rules of issuing and revoking: pure, with a clock of their own."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muster.pki import register as rules
from muster.pki.register import Entry, Reason, Register, Role, Terms, Wanted
from shared.errors import UserError

NOW = datetime.datetime(2030, 1, 1, 12, tzinfo=datetime.timezone.utc)
FOREVER = NOW + datetime.timedelta(days=3650)
EMPTY = Register(fleet="f1")


def day(number: float) -> datetime.datetime:
    return NOW + datetime.timedelta(days=number)


def issued(
    register: Register, name: str, at: float, *, key: str = "", role: Role = "device", renew: bool = False
) -> Register:
    """With one certificate more, as the authority would do it."""
    hosts = ("broker",) if role == "server" else ()
    wanted = Wanted(name=name, role=role, hosts=hosts, key=key or f"key of {name}", renew=renew)
    rules.admit(register, wanted, day(at))
    return rules.add(register, wanted, f"{len(register.entries) + 1:x}", day(at), FOREVER)[0]


def revoked(register: Register, name: str, at: float, reason: Reason = "key_compromise") -> Register:
    return rules.revoke(register, name, day(at), reason)[0]


ONE = issued(EMPTY, "edge-01", 0)


@pytest.mark.parametrize(
    ("register", "wanted", "told"),
    [
        (EMPTY, Wanted(name="Edge 1", role="device", key="k"), "name 'Edge 1': use 2 to 63 of"),
        (EMPTY, Wanted(name="broker-1", role="server", key="k"), "a server needs the names that clients reach it by"),
        (EMPTY, Wanted(name="c" * 60, role="coordinator", key="k"), "a coordinator's name has 59 characters at most"),
        (EMPTY, Wanted(name="edge-01", role="device", hosts=("x",), key="k"), "--host is for servers"),
        (ONE, Wanted(name="edge-01", role="coordinator", key="k"), "given to a device; a coordinator needs another"),
        (revoked(ONE, "edge-01", 1), Wanted(name="edge-01", role="reader", key="k"), "given to a device"),
        (ONE, Wanted(name="edge-02", role="device", key="key of edge-01"), "its key is edge-01's too"),
        (revoked(ONE, "edge-01", 1), Wanted(name="edge-01", role="device", key="key of edge-01"), "key was revoked"),
        (revoked(ONE, "edge-01", 1), Wanted(name="edge-02", role="device", key="key of edge-01"), "edge-01's too"),
        (ONE, Wanted(name="edge-01", role="device", key="other"), "a certificate until 2030-04-01: revoke that"),
        (ONE, Wanted(name="edge-02", role="device", key="k", renew=True), "edge-02: nothing to renew"),
        (revoked(ONE, "edge-01", 1), Wanted(name="edge-01", role="device", key="k", renew=True), "nothing to renew"),
    ],
)  # fmt: skip
def test_what_must_not_be_issued_is_refused(register: Register, wanted: Wanted, told: str) -> None:
    with pytest.raises(UserError, match=told.replace("(", r"\(")):
        rules.admit(register, wanted, day(2))


def test_what_may_be_issued() -> None:
    again = Wanted(name="edge-01", role="device", key="key of edge-01", renew=True)
    rules.admit(ONE, again, day(60))  # renewed with the same key
    rules.admit(ONE, Wanted(name="edge-01", role="device", key="key of edge-01"), day(91))  # it has expired
    rules.admit(revoked(ONE, "edge-01", 1), Wanted(name="edge-01", role="device", key="new"), day(2))
    both = issued(ONE, "edge-01", 60, renew=True)
    old_gone, gone = rules.revoke(both, "edge-01", day(61), "superseded", only_old=True)
    assert [entry.serial for entry in gone] == ["1"]
    rules.admit(old_gone, again, day(62))  # the key of what was merely replaced is good


@pytest.mark.parametrize(
    ("hosts", "wanted"),
    [
        (["Broker.Example", "10.0.0.1", "broker.example"], ("broker.example", "10.0.0.1")),
        (["2001:0db8::0001"], ("2001:db8::1",)),
    ],
)
def test_hosts_have_one_form(hosts: list[str], wanted: tuple[str, ...]) -> None:
    assert rules.checked_hosts(hosts) == wanted


@pytest.mark.parametrize(
    "host", ["", "*.example", "a b", "-a", "a..b", "a" * 64, "a_b", "x/y", "a.", "1.2.3.4/8", "a\n"]
)
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(UserError, match="neither a host name nor an address"):
        rules.checked_hosts([host])


@pytest.mark.parametrize(
    "terms",
    [Terms(rotate_days=90), Terms(certificate_days=30), Terms(certificate_days=400, authority_days=365)],
)
def test_terms_under_which_nothing_is_renewed_in_time_are_refused(terms: Terms) -> None:
    with pytest.raises(UserError, match="days: rotation at"):
        rules.check_terms(terms)


def test_a_certificate_lasts_90_days_and_never_longer_than_its_authority() -> None:
    (entry,) = ONE.entries
    assert entry.not_after == day(90)
    assert entry.not_before == NOW - rules.SKEW
    wanted = Wanted(name="edge-02", role="device", key="k")
    short = rules.add(ONE, wanted, "2", NOW, day(30))[1]
    assert short.not_after == day(30)
    with pytest.raises(UserError, match="the authority itself expires at"):
        rules.add(ONE, wanted, "2", NOW, day(0.9))


def test_what_is_older_than_60_days_is_due_and_the_expired_too() -> None:
    fleet = issued(issued(ONE, "edge-02", 10), "coord-1", 59, role="coordinator")
    assert [entry.name for entry in rules.due(fleet, day(59.99))] == []
    assert [entry.name for entry in rules.due(fleet, day(60))] == ["edge-01"]
    assert [entry.name for entry in rules.due(fleet, day(95))] == ["edge-01", "edge-02"]
    renewed = issued(fleet, "edge-01", 60, key="new", renew=True)
    assert [entry.name for entry in rules.due(renewed, day(70))] == ["edge-02"]
    gone = revoked(renewed, "edge-02", 70)
    assert rules.due(gone, day(100)) == [entry for entry in gone.entries if entry.name == "none"]


def test_an_expired_device_that_was_taken_out_is_not_renewed() -> None:
    assert rules.due(ONE, day(100)) == list(ONE.entries)
    assert rules.due(revoked(ONE, "edge-01", 100), day(101)) == []


def test_states_as_the_list_shows_them() -> None:
    both = issued(ONE, "edge-01", 60, key="new", renew=True)
    old, new = both.entries
    at = {"replaced": 61, "expired": 90}
    assert {state: rules.state_of(both, old, day(number)) for state, number in at.items()} == {s: s for s in at}
    assert [rules.state_of(both, new, day(number)) for number in (61, 120, 150)] == ["good", "due", "expired"]
    gone = revoked(both, "edge-01", 62)
    assert {rules.state_of(gone, entry, day(63)) for entry in gone.entries} == {"revoked"}


def test_a_revocation_takes_all_of_a_name_and_is_done_once() -> None:
    both = issued(issued(ONE, "edge-01", 60, key="new", renew=True), "edge-02", 60)
    changed, found = rules.revoke(both, "edge-01", day(61), "key_compromise")
    assert [entry.serial for entry in found] == ["1", "2"]
    assert [entry.name for entry in changed.entries if entry.revoked_at is None] == ["edge-02"]
    again, more = rules.revoke(changed, "edge-01", day(62), "superseded")
    assert (again, more) == (changed, [])
    with pytest.raises(UserError, match="edge-09: no certificate of this name"):
        rules.revoke(both, "edge-09", day(61), "superseded")


def test_a_suspension_is_taken_back_and_lets_nobody_enrol_meanwhile() -> None:
    both = issued(issued(ONE, "edge-01", 60, key="new", renew=True), "edge-02", 60)
    held = revoked(both, "edge-01", 61, rules.HOLD)
    assert [rules.state_of(held, entry, day(62)) for entry in held.entries] == ["suspended", "suspended", "good"]
    assert [entry.name for entry in rules.listed(held, day(62))] == ["edge-01", "edge-01"]
    assert "edge-01" not in [entry.name for entry in rules.due(held, day(200))]
    for key in ("new", "a third"):
        with pytest.raises(UserError, match="edge-01: it is suspended: muster pki resume edge-01, or revoke it"):
            issued(held, "edge-01", 62, key=key)
    again, found = rules.resume(held, "edge-01")
    assert [entry.serial for entry in found] == ["1", "2"]
    assert again == both
    with pytest.raises(UserError, match="edge-02: it is not suspended"):
        rules.resume(held, "edge-02")


def test_a_revocation_of_a_suspended_name_is_for_good() -> None:
    gone = revoked(revoked(ONE, "edge-01", 1, rules.HOLD), "edge-01", 2)
    assert [(entry.reason, entry.revoked_at) for entry in gone.entries] == [("key_compromise", day(2))]
    assert revoked(gone, "edge-01", 3, rules.HOLD) == gone
    with pytest.raises(UserError, match="edge-01: it is not suspended"):
        rules.resume(gone, "edge-01")


def test_the_list_forgets_what_has_expired_anyway() -> None:
    gone = revoked(ONE, "edge-01", 1)
    assert [entry.serial for entry in rules.listed(gone, day(90.9))] == ["1"]
    assert rules.listed(gone, day(91)) == []
    assert rules.listed(ONE, day(1)) == []


@given(st.lists(st.integers(min_value=0, max_value=2_000_000), min_size=1, max_size=30))
def test_each_list_is_newer_than_the_one_before_and_none_is_from_the_future(pauses_us: list[int]) -> None:
    register, moment, before = EMPTY, NOW, None
    for number, pause in enumerate(pauses_us, start=1):
        moment += datetime.timedelta(microseconds=pause)
        register = rules.next_list(register, moment)
        assert register.crl_number == number
        assert register.crl_from is not None and register.crl_until is not None
        assert before is None or register.crl_from >= before + datetime.timedelta(seconds=1)
        assert register.crl_from <= moment < register.crl_until
        assert register.crl_from.microsecond == 0
        before = register.crl_from


def test_a_list_is_not_written_by_a_clock_that_is_behind() -> None:
    """It would begin after now, and a broker refuses everyone while its list is not yet valid."""
    listed = rules.next_list(EMPTY, NOW)
    rules.next_list(listed, NOW - datetime.timedelta(minutes=4))
    with pytest.raises(UserError, match="set this machine's clock"):
        rules.next_list(listed, NOW - datetime.timedelta(minutes=6))


def test_names_of_a_role_are_those_in_force() -> None:
    fleet = issued(issued(ONE, "coord-2", 0, role="coordinator"), "coord-1", 0, role="coordinator")
    assert rules.names(fleet, "coordinator") == ["coord-1", "coord-2"]
    assert rules.names(revoked(fleet, "coord-2", 1), "coordinator") == ["coord-1"]
    assert rules.current(fleet, "edge-09") is None
    assert isinstance(rules.current(fleet, "edge-01"), Entry)
