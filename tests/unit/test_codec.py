"""Control messages: what is packed is read back, all else is refused at once, and the bytes stay what they are."""

from __future__ import annotations

import inspect
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, cast, get_args

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts import goldens
from shared import adapter, messages, release_messages
from shared.codec import MAX_MESSAGE_BYTES, pack, unpack
from shared.errors import DecodeError

ROOT = Path(__file__).parent.parent.parent


TYPES = [
    kind
    for module in (messages, release_messages)
    for _, kind in inspect.getmembers(module, inspect.isclass)
    if issubclass(kind, messages.Message) and kind is not messages.Message and kind.__module__ == module.__name__
]

number = st.integers(0, 2**53)
text = st.text(max_size=40)
sha = st.text("0123456789abcdef", min_size=64, max_size=64)


def strategy(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Any value of a struct, from the constraints of its fields."""
    fields = {info.name: info for info in cast(msgspec.inspect.StructType, msgspec.inspect.type_info(kind)).fields}
    fields.pop("schema", None)
    return st.builds(kind, **{name: value(info.type) for name, info in fields.items()})


def value(info: msgspec.inspect.Type) -> st.SearchStrategy[Any]:
    match info:
        case msgspec.inspect.StructType(cls=cls):
            return strategy(cls)
        case msgspec.inspect.IntType(ge=low, le=high):
            return st.integers(-(2**63) if low is None else low, 2**53 if high is None else high)
        case msgspec.inspect.FloatType(gt=above, ge=low, le=high, lt=below):
            most, least = high if below is None else below, low if above is None else above
            return st.floats(least, most, exclude_min=above is not None, exclude_max=below is not None, allow_nan=False)
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.BytesType():
            return st.binary(max_size=40)
        case msgspec.inspect.StrType(pattern=None):
            return text
        case msgspec.inspect.StrType(pattern=str(pattern)):
            return sha if "{64}" in pattern else st.from_regex(pattern, fullmatch=True)
        case msgspec.inspect.LiteralType(values=values):
            return st.sampled_from(values)
        case msgspec.inspect.NoneType():
            return st.none()
        case msgspec.inspect.UnionType(types=types):
            return st.one_of([value(part) for part in types])
        case msgspec.inspect.ListType(item_type=item):
            return st.lists(value(item), max_size=4)
        case msgspec.inspect.TupleType(item_types=items):
            return st.tuples(*[value(item) for item in items])
        case msgspec.inspect.DictType(key_type=key, value_type=item):
            return st.dictionaries(value(key), value(item), max_size=4)
        case _:
            raise AssertionError(f"no strategy for {info}")


any_message = st.one_of([strategy(kind) for kind in TYPES])


@settings(max_examples=300, deadline=None)
@given(message=any_message)
def test_round_trip(message: messages.Message) -> None:
    data = pack(message)
    assert unpack(data, type(message)) == message
    assert pack(unpack(data, type(message))) == data


@settings(max_examples=60, deadline=None)
@given(message=st.one_of([strategy(kind) for kind in get_args(messages.BlobMessage)]))
def test_blob_messages_are_told_apart(message: messages.Message) -> None:
    assert unpack(pack(message), cast(type[Any], messages.BlobMessage)) == message


@settings(max_examples=200, deadline=None)
@given(message=any_message, draw=st.data())
def test_cut_or_longer_bytes_are_refused(message: messages.Message, draw: st.DataObject) -> None:
    data = pack(message)
    cut = draw.draw(st.integers(0, len(data) - 1))
    more = draw.draw(st.binary(min_size=1, max_size=9))
    for broken in (data[:cut], data + more):
        with pytest.raises(DecodeError):
            unpack(broken, type(message))


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9) | st.binary(max_size=3), inner),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200) | plain.map(msgpack.packb), kind=st.sampled_from(TYPES))
def test_foreign_bytes_are_read_or_refused(data: bytes, kind: type[Any]) -> None:
    try:
        assert isinstance(unpack(data, kind), kind)
    except DecodeError as error:
        assert 0 < len(str(error)) <= 200


@settings(max_examples=200, deadline=None)
@given(message=any_message, draw=st.data())
def test_a_damaged_byte_never_raises_anything_else(message: messages.Message, draw: st.DataObject) -> None:
    data = bytearray(pack(message))
    data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        assert isinstance(unpack(bytes(data), type(message)), type(message))
    except DecodeError as error:
        assert str(error)


def state(**fields: object) -> bytes:
    return cast(bytes, msgpack.packb({"schema": 1, "s": "ready", "epoch": 1, **fields}))


REFUSED = {
    "another major": (state(schema=2), "schema 2"),
    "no map": (msgpack.packb([1, 2]), "object"),
    "a missing field": (msgpack.packb({"schema": 1, "s": "ready"}), "epoch"),
    "a wrong type": (state(epoch="1"), "epoch"),
    "a negative number": (state(epoch=-1), "epoch"),
    "a huge number": (state(epoch=2**64 - 1), "epoch"),
    "a true for a number": (state(epoch=True), "epoch"),
    "no such word": (state(s="asleep"), "asleep"),
    "too long a text": (state(version="x" * 1001), "version"),
    "far too long a text": (state(version="x" * 5000), "limits"),
    "bytes for text": (state(version=b"x"), "version"),
    "an extension": (state(version=msgpack.ExtType(5, b"x")), "limits"),
    "a timestamp": (state(version=msgpack.Timestamp(1)), "limits"),
    "pickle": (pickle.dumps({"schema": 1, "s": "ready", "epoch": 1}), "msgpack"),
    "no UTF-8": (b"\x81\xa1\xff\x01", "msgpack"),
    "a list as key": (b"\x81\x91\x01\x01", "msgpack"),
    "nothing": (b"", "msgpack"),
    "a schema too deep to print": (b"\x81\xa6schema" + b"\x91" * 1020 + b"\x90", "type list"),
    "a field too deep to convert": (b"\x81\xa5epoch" + b"\x91" * 1020 + b"\x90", "epoch|Recursion"),
    "a text as schema": (state(schema="1" * 4000), "schema 1{20},"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name: str) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(DecodeError, match=reason):
        unpack(data, messages.DeviceState)


def test_unknown_fields_are_ignored() -> None:
    """A newer minor version may add fields."""
    assert unpack(state(later={"a": [1, 2]}), messages.DeviceState) == messages.DeviceState(s="ready", epoch=1)


@settings(max_examples=50, deadline=None)
@given(ranks=st.dictionaries(text, number, max_size=9), order=st.randoms(use_true_random=False))
def test_equal_maps_give_equal_bytes(ranks: dict[str, int], order: Any) -> None:
    names = list(ranks)
    order.shuffle(names)
    other = {name: ranks[name] for name in names}
    assert pack(messages.Work(ranks=ranks, batch=1, bits=8, steps=1)) == pack(
        messages.Work(ranks=other, batch=1, bits=8, steps=1)
    )


BOMBS = """
import resource, sys
from shared.codec import MAX_MESSAGE_BYTES, unpack
from shared.errors import DecodeError
from shared.messages import DeviceState
limit = MAX_MESSAGE_BYTES
nest, maps = (b"\\x91", b"\\x80")
wide = b"\\xdc\\x10\\x00" + (b"\\xdc\\x00\\x3c" + maps * 60) * 4096
bombs = [
    b"\\xdd\\x00\\x98\\x96\\x80" + maps * 10_000_000,
    b"\\xdd\\xff\\xff\\xff\\xff",
    b"\\xdf\\xff\\xff\\xff\\xff",
    b"\\xdb\\xff\\xff\\xff\\xff",
    b"\\xc6\\xff\\xff\\xff\\xff",
    b"\\xc9\\xff\\xff\\xff\\xff\\x01",
    nest * limit,
    nest * 900 + b"\\x01",
    b"\\x81\\xa1a" * 500 + b"\\x01",
    b"\\xdd\\x00\\x03\\xff\\xfb" + maps * 262_139,
    wide[:limit],
]
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for bomb in bombs:
    try:
        unpack(bomb, DeviceState)
    except DecodeError as error:
        assert "\\n" not in str(error), error
    else:
        sys.exit(f"read {bomb[:20]!r}")
# An unknown field is skipped, and may cost no more.
unpack(b"\\x83\\xa1s\\xa5ready\\xa5epoch\\x01\\xa1x" + wide, DeviceState)
print((peak() - before) // 1024)
"""


def test_bombs_cost_little_memory() -> None:
    """Acceptance case 36: refused, with less than 50 MB more than the process had."""
    done = subprocess.run([sys.executable, "-c", BOMBS], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50


def test_a_message_has_a_limit() -> None:
    with pytest.raises(DecodeError, match="limit"):
        unpack(bytes(MAX_MESSAGE_BYTES + 1), messages.DeviceState)


def read_golden(name: str) -> bytes:
    return bytes.fromhex((ROOT / "tests" / "goldens" / f"{name}.hex").read_text())


def test_every_type_has_a_golden() -> None:
    assert {kind.__name__ for kind in TYPES} == set(goldens.samples())


@pytest.mark.parametrize("name", goldens.samples())
def test_golden_bytes(name: str) -> None:
    message = goldens.samples()[name]
    assert pack(message) == read_golden(f"message-{name}")
    assert unpack(read_golden(f"message-{name}"), type(message)) == message


def test_a_load_of_a_former_device_is_read() -> None:
    """It told what it did not know as nothing; newer ones leave it out."""
    gpu = {"uuid": "GPU-1", "utilization": 0.5, "memory_free": None, "power_w": None, "throttled": None}
    found = unpack(pack({"schema": 1, "epoch": 1, "seq": 2, "cores": 4.0, "gpus": [gpu]}), messages.Load)
    assert found == messages.Load(epoch=1, seq=2, cores=4.0, gpus=[messages.GpuLoad(uuid="GPU-1", utilization=0.5)])


def test_what_a_gpu_does_not_tell_costs_no_bytes() -> None:
    assert pack(messages.GpuLoad(uuid="GPU-1")) == pack({"uuid": "GPU-1"})
    assert pack(messages.HostLoad()) == pack({})
    assert "schema" in msgspec.to_builtins(messages.Load(epoch=1, seq=1)), "a message always says its version"


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
def test_golden_adapter(codec: Any) -> None:
    data = read_golden(f"adapter-{codec}")
    assert adapter.write(goldens.adapter_sample(), codec) == data
    read = adapter.read(data)
    assert read.factors[goldens.LAYER].b.shape == (3, 2)
    assert read.notes == {"aggregator": "fsr"}


@pytest.mark.parametrize("share", [math.nan, math.inf, -0.1, 1.5, "much"])
def test_an_importance_that_is_no_share_is_refused(share: Any) -> None:
    facts = goldens.samples()["Manifest"].facts
    plain = msgspec.to_builtins(facts)
    assert unpack(pack(plain), messages.UpdateFacts) == facts
    with pytest.raises(DecodeError, match="importance"):
        unpack(pack({**plain, "importance": {"q": 0.5, "v": share}}), messages.UpdateFacts)


def test_facts_of_an_older_agent_have_no_importance_and_too_many_are_refused() -> None:
    plain = msgspec.to_builtins(goldens.samples()["Manifest"].facts)
    del plain["importance"]
    assert unpack(pack(plain), messages.UpdateFacts).importance == {}
    with pytest.raises(DecodeError):
        unpack(pack({**plain, "importance": {str(i): 0.0 for i in range(4097)}}), messages.UpdateFacts)
