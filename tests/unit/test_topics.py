"""Topics: names that come back as they were parsed, and an ACL that follows the declarations."""

from __future__ import annotations

import pytest

from shared import topics
from shared.transport.memory_broker import matches

PARTS = {"device": "dev-1", "coordinator": "coord-1", "sha": "a" * 64, "index": 7}


@pytest.mark.parametrize("topic", topics.ALL, ids=lambda topic: topic.pattern)
def test_a_name_is_parsed_back(topic: topics.Topic) -> None:
    parsed = topics.parse(topic.name("fleet1", **PARTS))
    assert parsed is not None
    assert parsed.topic is topic
    assert parsed.fleet == "fleet1"
    for part in ("device", "coordinator", "sha", "index"):
        if f"{{{part}}}" in topic.pattern:
            assert getattr(parsed, part) == PARTS[part]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "muster/v1/f1",
        "muster/v2/f1/fleet/round",
        "muster/v1/f1/fleet/other",
        "muster/v1/f1/device/dev-1",
        "muster/v1/f1/device/dev-1/state/more",
        "muster/v1/f1/device/dev-1/up/chunk/aa/x1",
        "muster/v1/f1/device/dev-1/up/chunk/aa/1234567890",
        "muster/v1/f1/device/dev-1/sideways/chunk/aa/1",
    ],
)
def test_a_foreign_name_means_nothing(name: str) -> None:
    assert topics.parse(name) is None


def test_a_name_needs_its_parts() -> None:
    with pytest.raises(KeyError):
        topics.ASSIGN.name("f1")


def test_a_device_is_subscribed_to_each_topic_of_the_coordinator_exactly_once() -> None:
    filters = [name for name, _ in topics.device_filters("f1", "dev-1")]
    for topic in topics.ALL:
        taken = sum(matches(name, topic.name("f1", **PARTS)) for name in filters)
        assert taken == (1 if topic.publisher == "coordinator" or topic is topics.STATE else 0), topic.pattern


def test_the_coordinator_is_subscribed_to_each_topic_of_a_device_exactly_once() -> None:
    filters = [name for name, _ in topics.coordinator_filters("f1")]
    for topic in topics.ALL:
        taken = sum(matches(name, topic.name("f1", **PARTS)) for name in filters)
        assert taken == (topic.publisher == "device" and topic is not topics.UP_STEP), topic.pattern


def test_the_top_worker_has_the_steps_and_nothing_else() -> None:
    filters = [name for name, _ in topics.top_filters("f1")]
    text = topics.acl("f1", ["coord-1"])
    for topic in topics.ALL:
        name = topic.name("f1", **PARTS)
        assert any(matches(one, name) for one in filters) == (topic is topics.UP_STEP), topic.pattern
        assert allowed(text, "coord-1-top", "write", name) == (topic is topics.DOWN_STEP), topic.pattern
        if topic is topics.UP_STEP or "{device}" in topic.pattern:
            assert allowed(text, "coord-1-top", "read", name) == (topic is topics.UP_STEP), topic.pattern


def allowed(text: str, user: str, access: str, name: str) -> bool:
    """What mosquitto makes of an ACL file, by its manual."""
    section, found = "", False
    for line in text.splitlines():
        words = line.split()
        if not words or words[0] == "#":
            continue
        if words[0] == "user":
            section = words[1]
        elif (words[0] == "pattern" or section == user) and matches(words[2].replace("%u", user), name):
            if words[1] == "deny":
                return False  # wherever it stands
            found = found or words[1] in (access, "readwrite")
    return found


def test_acl_gives_a_device_its_own_topics_and_nobody_elses() -> None:
    text = topics.acl("f1", ["coord-1"], readers=["board"], gates=["gate-1"])
    for topic in topics.ALL:
        own = topic.name("f1", **PARTS)
        other = topic.name("f1", **{**PARTS, "device": "dev-2"})
        assert allowed(text, "dev-1", "write", own) == (topic.publisher == "device"), topic.pattern
        reads = topic.publisher == "coordinator" or topic is topics.STATE
        assert allowed(text, "dev-1", "read", own) == reads, topic.pattern
        if "{device}" in topic.pattern:
            assert not allowed(text, "dev-1", "write", other)
            assert not allowed(text, "dev-1", "read", other)


def test_acl_lets_the_coordinator_read_all_and_write_its_part() -> None:
    text = topics.acl("f1", ["coord-1", "coord-2"])
    for user, other in (("coord-1", "coord-2"), ("coord-2", "coord-1")):
        for topic in topics.ALL:
            name = topic.name("f1", **{**PARTS, "coordinator": user})
            own = topic.publisher == "coordinator" and topic is not topics.DOWN_STEP
            writes = own or topic in (topics.STATE, topics.INFO)
            assert allowed(text, user, "read", name)
            assert allowed(text, user, "write", name) == writes, topic.pattern
        assert not allowed(text, user, "write", topics.COORD_STATE.name("f1", coordinator=other))


def test_acl_of_a_dashboard_only_reads_its_fleet() -> None:
    text = topics.acl("f1", ["coord-1"], readers=["board"])
    for topic in topics.ALL:
        steps = topic in (topics.UP_STEP, topics.DOWN_STEP)
        assert allowed(text, "board", "read", topic.name("f1", **PARTS)) != steps, topic.pattern
        assert not allowed(text, "board", "read", topic.name("f2", **PARTS))
        assert not allowed(text, "board", "write", topic.name("f1", **PARTS))
    assert "board" not in topics.acl("f1", ["coord-1"])


def test_acl_of_a_health_gate_reads_presence_alone() -> None:
    text = topics.acl("f1", ["coord-1"], gates=["gate-1"])
    for topic in topics.ALL:
        name = topic.name("f1", **PARTS)
        of_all = topic.publisher == "coordinator" and "{device}" not in topic.pattern
        assert allowed(text, "gate-1", "read", name) == (of_all or topic in topics.GATE_READS), topic.pattern
        assert not allowed(text, "gate-1", "write", name)


@pytest.mark.parametrize("user", ["coord-1", "board", "gate-1"])
def test_acl_makes_no_device_of_who_is_something_else(user: str) -> None:
    text = topics.acl("f1", ["coord-1"], readers=["board"], gates=["gate-1"])
    for topic in topics.ALL:
        if "{device}" in topic.pattern:
            own = topic.name("f1", **{**PARTS, "device": user})
            assert not allowed(text, user, "write", own), topic.pattern
            assert not allowed(text, user, "read", own), topic.pattern
