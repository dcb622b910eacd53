"""The stack machine for pickles: the values that pickle gives, and nothing done for those that would do something."""

import collections
import contextlib
import pickle
import pickletools
import random
import struct

import pytest

from sdjax.checkpoints import pickles
from sdjax.checkpoints.pickles import Call, PickleError

PLAIN = [
    None,
    True,
    [1, -1, 255, 256, 65536, 2**31, -(2**40), 2**100, 10**60],
    [0.0, -1.5, 1e300],
    ("", "text", "ümlaut \N{SNOWMAN} \n", "y" * 300),
    ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
    {"a": {"b": [1, {"c": ()}]}},
    list(range(2000)),
    {str(i): i for i in range(2000)},
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values(protocol):
    assert pickles.loads(pickle.dumps(PLAIN, protocol)) == PLAIN


@pytest.mark.parametrize("protocol", [3, 4, 5])  # before, bytes are a call of codecs.encode
def test_bytes(protocol):
    value = [b"", b"bytes", b"x" * 300, {"key": b"1"}, bytearray(b"y") if protocol == 5 else b"y"]
    assert pickles.loads(pickle.dumps(value, protocol)) == value


def test_shared_values_stay_shared():
    inner = [1]
    first, second = pickles.loads(pickle.dumps([inner, inner]))
    assert first is second


def test_cycles():
    loop = []
    loop.append(loop)
    found = pickles.loads(pickle.dumps(loop))
    assert found[0] is found


def test_sets_are_lists_and_ordered_dicts_are_dicts():
    assert sorted(pickles.loads(pickle.dumps({1, 2}, 4))) == [1, 2]
    assert sorted(pickles.loads(pickle.dumps(frozenset({1, 2}), 4))) == [1, 2]
    table = collections.OrderedDict(a=1)
    table.extra = 2  # as state dicts have: pickled by BUILD
    assert pickles.loads(pickle.dumps(table)) == {"a": 1}


def test_keys_that_would_be_hashed_deeply_or_alike_are_dropped():
    assert pickles.loads(pickle.dumps({(1, 2): 3, "a": 4, 1: 5, b"b": 6, 1.5: 7})) == {"a": 4}
    alike = {(2**61 - 1) * i: None for i in range(100)}  # whose hashes are all 0
    assert pickles.loads(pickle.dumps(alike)) == {}
    with pytest.raises(PickleError, match="a memo of the number"):
        pickles.loads(f"Np{2**61 - 1}\n.".encode())


class Reduced:
    """Its pickle calls what it is given."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce_ex__(self, protocol):
        return self.reduced


def hostile(target):
    """Pickles that would each make a file, by every instruction with which a pickle can call or set something."""
    path = str(target)
    touch = f"open({path!r}, 'w')"
    text = b"X" + struct.pack("<I", len(path)) + path.encode()
    mode = b"X\x01\0\0\0w"
    yield pickle.dumps(Reduced(open, (path, "w")), 2)
    yield pickle.dumps(Reduced(open, (path, "w")), 4)
    yield pickle.dumps(Reduced(eval, (touch,)), 0)
    yield pickle.dumps({"state_dict": {"a": Reduced(eval, (touch,))}})
    yield pickle.dumps({(1, Reduced(eval, (touch,))): 1})
    yield b"(S" + repr(path).encode() + b"\nS'w'\ni__builtin__\nopen\n."  # INST
    yield b"(cbuiltins\nopen\n" + text + mode + b"o."  # OBJ
    yield b"\x80\x02cbuiltins\nopen\n" + text + mode + b"\x86\x81."  # NEWOBJ
    yield b"\x80\x04cbuiltins\nopen\n" + text + mode + b"\x86}\x92."  # NEWOBJ_EX
    yield b"\x80\x04\x8c\x08builtins\x8c\x04open\x93" + text + mode + b"\x86R."  # STACK_GLOBAL
    yield b"ccollections\nOrderedDict\n}X\x08\0\0\0__init__cbuiltins\nopen\nsb."  # BUILD on a class
    yield b"cbuiltins\nlen\n(N}X\x04\0\0\0nameX\x01\0\0\0xstb."  # BUILD on a function
    yield b"cos\nsystem\n(S'touch " + path.encode() + b"'\ntR."


@pytest.mark.parametrize("number", range(13))
def test_nothing_is_called(tmp_path, number):
    target = tmp_path / "executed"
    data = list(hostile(target))[number]
    pickletools.dis(data, out=open("/dev/null", "w"))  # noqa: SIM115  each one is well formed
    pickles.loads(data)
    assert not target.exists()
    assert not hasattr(collections.OrderedDict, "name")


def test_calls_are_named():
    call = pickles.loads(pickle.dumps(Reduced(eval, ("1",)), 4))
    assert isinstance(call, Call)
    assert call.name == "builtins.eval"
    assert call.arguments == ("1",)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b".",  # STOP with nothing to return
        b"N",  # no STOP
        b"0.",
        b"R.",
        b"NR.",
        b"\x85.",
        b"N\x86.",
        b"t.",  # TUPLE without a mark
        b"u.",
        b"Nb.",
        b"(o.",
        b"s.",
        b"}Ns.",
        b"(Nd.",  # a dict of one
        b"}(Nu.",
        b"h\x05.",  # an unknown memo
        b"q\x00.",
        b"a.",
        b"Na.",
        b"\x81.",
        b"\x92.",
        b"\x93.",
        b"Q.",
        b"2.",
        b"1.",
        b"\x82\x01.",  # EXT1
        b"\x97.",  # NEXT_BUFFER
        b"B\xff\xff\xff\xff.",  # four gigabytes are announced
        b"\x8e" + b"\xff" * 8 + b".",
        b"\x8b\xff\xff\xff\x7f.",
        b"I" + b"9" * 10000 + b"\n.",
        b"X\x02\0\0\0\xff\xfe.",
        b"S'a\n.",
        b"Fx\n.",
        b"\xff",
    ],
)
def test_malformed(data):
    with pytest.raises(PickleError):
        pickles.loads(data)


def test_memo_index_allocates_nothing():
    assert pickles.loads(b"Nr\xff\xff\xff\xff.") is None  # pickle's own machine makes a table of 4 billion


def test_deep_nesting():
    depth = 100_000
    assert isinstance(pickles.loads(b")" + b"\x85" * depth + b"."), tuple)
    pickles.loads(b"}" + b")" + b"\x85" * depth + b"Ns.")  # as a key of a dict


def test_size_is_limited():
    with pytest.raises(PickleError, match="at most"):
        pickles.loads(b"N" * (pickles.MAX_SIZE + 1))


def test_small_objects_in_great_number_are_limited():
    with pytest.raises(PickleError, match="instructions"):
        pickles.loads(b"}" * (pickles.MAX_INSTRUCTIONS + 1) + b".")


def test_bits_that_flipped_and_ends_cut_off():
    whole = pickle.dumps({"a": PLAIN[:5], "b": Reduced(eval, ("1",)), "c": collections.OrderedDict(a=(1, 2))}, 2)
    for place in range(len(whole)):
        with pytest.raises(PickleError):
            pickles.loads(whole[:place])
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            with contextlib.suppress(PickleError):
                pickles.loads(bytes(damaged))


CONFUSED = [
    b"]q\0(h\0h\0e.",  # a list in itself
    b"}q\0(h\0h\0u.",  # a dict as its own key: dropped
    b"}X\x01\0\0\0aNsX\x01\0\0\0b\x86.",
    b"K\x01K\x02a.",  # an item appended to a number
    b"K\x01K\x02K\x03s.",  # set in a number
    b")K\x02a.",  # in a tuple
    b"cos\nsystem\nK\x02a.",  # in a name
    b"cos\nsystem\n}b.",  # a state for a name
    b"K\x01)R.",  # a number called
    b"X\x01\0\0\0a)\x81.",  # a text as a class
    b"K\x01K\x02\x93.",  # numbers as names
    b"(K\x01K\x02o.",
    b"K\x01K\x02R.",  # no tuple of arguments
    b"ccollections\nOrderedDict\n(K\x01tR.",
    b"K\x01Q.",
    b"(((0t(0t.",
    b"Nq\0K\x05q\0h\0.",  # a memo twice
]


@pytest.mark.parametrize("data", CONFUSED)
def test_confused_types_are_inert(data):
    with contextlib.suppress(PickleError):
        pickles.loads(data)


def test_damaged_bytes():
    rng = random.Random(0)
    whole = pickle.dumps({"a": PLAIN[:7], "b": Reduced(eval, ("1",)), "c": collections.OrderedDict(a=(1, 2))}, 2)
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        with contextlib.suppress(PickleError):
            pickles.loads(bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])]))
