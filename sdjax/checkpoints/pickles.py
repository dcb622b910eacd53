"""Reads a pickle as data: the stack machine of the format, without any instruction that imports or calls.

A pickle is a program. `pickle.Unpickler`, however restricted, still imports, calls and sets attributes, and allocates
what the program names. This machine has the same stack, marks and memo, but what a program builds by calling
becomes an inert `Call`, what it imports a `Global`, and the numbers outside the pickle a `Persistent`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from typing import Any, NamedTuple

MAX_SIZE = 1 << 24  # bytes; a full SD 1.x training checkpoint has about 1 MB of pickle beside its numbers
# An instruction is one byte and can make an object of some 70. That checkpoint has a tenth of this many.
MAX_INSTRUCTIONS = 1 << 21


class Global(NamedTuple):
    """The name of a class or function, "module.name"; nothing is imported."""

    name: str


class Call:
    """What would have been the result of a call. A later state, item or attribute given to it is dropped."""

    __slots__ = ("arguments", "function")

    def __init__(self, function: Any, arguments: Any) -> None:
        self.function = function
        self.arguments = arguments

    @property
    def name(self) -> str:
        """Of the function, or an empty string where that is itself something built."""
        return self.function.name if isinstance(self.function, Global) else ""


class Persistent(NamedTuple):
    """A reference to something stored outside the pickle."""

    key: Any


class PickleError(ValueError):
    """The bytes are not a pickle that the machine can follow."""


def loads(data: bytes) -> Any:
    """The value of a pickle: None, numbers, strings, bytes, lists, tuples, dicts, `Call`, `Global`, `Persistent`.

    `collections.OrderedDict()` is a dict. Keys of dicts other than strings, bytes and numbers are dropped with their
    values: to hash a nested tuple recurses. Sets become lists.

    Raises:
      PickleError: whatever is wrong with the bytes.
    """
    if len(data) > MAX_SIZE:
        raise PickleError(f"a pickle of {len(data)} bytes; at most {MAX_SIZE} are read")
    try:
        return _run(pickletools.genops(data))
    except PickleError:
        raise
    # Opcodes that meet an empty stack, another type, an unknown memo, or arguments that are cut off.
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise PickleError(f"not a well-formed pickle ({type(error).__name__}: {error})") from error


# Opcodes whose argument is the value they push.
LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_LIST": list, "EMPTY_SET": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _run(program: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for count, (opcode, argument, _) in enumerate(program):
        name = opcode.name
        if count == MAX_INSTRUCTIONS:
            raise PickleError(f"more than {MAX_INSTRUCTIONS} instructions")
        if name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            place = len(memo) if name == "MEMOIZE" else argument
            if place >= 2**32:
                raise PickleError(f"a memo of the number {place:.3g}")
            memo[place] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in TUPLES:
            count = TUPLES[name]
            if len(stack) < count:
                raise PickleError("a tuple of more than the stack holds")
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("LIST", "FROZENSET"):
            stack.append(since_mark())
        elif name == "DICT":
            stack.append(_set_items({}, since_mark()))
        elif name == "SETITEM":
            key, value = stack[-2:]
            del stack[-2:]
            _set_items(stack[-1], [key, value])
        elif name == "SETITEMS":
            items = since_mark()
            _set_items(stack[-1], items)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else since_mark()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
        elif name == "GLOBAL":
            stack.append(Global(".".join(argument.split(" ", 1))))
        elif name == "STACK_GLOBAL":
            module, attribute = stack[-2:]
            stack[-2:] = [Global(f"{module}.{attribute}" if type(module) is type(attribute) is str else "")]
        elif name in ("REDUCE", "NEWOBJ"):
            function, arguments = stack[-2:]
            stack[-2:] = [_call(function, arguments)]
        elif name == "NEWOBJ_EX":
            function, arguments, _ = stack[-3:]
            stack[-3:] = [_call(function, arguments)]
        elif name == "INST":
            arguments = tuple(since_mark())
            stack.append(_call(Global(".".join(argument.split(" ", 1))), arguments))
        elif name == "OBJ":
            function, *rest = since_mark()
            stack.append(_call(function, tuple(rest)))
        elif name == "BUILD":
            stack.pop()
            if not stack:
                raise PickleError("a state for nothing")
        elif name in ("PERSID", "BINPERSID"):
            stack.append(Persistent(argument if name == "PERSID" else stack.pop()))
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP":
            # The format lets POP take back a mark.
            if marks and marks[-1] == len(stack):
                marks.pop()
            else:
                stack.pop()
        elif name == "POP_MARK":
            since_mark()
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):  # EXT1 ...: a registry of ours; NEXT_BUFFER: buffers outside
            raise PickleError(f"the opcode {name} does not occur in a checkpoint")
    raise PickleError("it has no end")


def _call(function: Any, arguments: Any) -> Any:
    if isinstance(function, Global) and function.name == "collections.OrderedDict" and arguments == ():
        return {}
    return Call(function, arguments)


def _set_items(target: Any, items: list[Any]) -> Any:
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str):  # what is read has no others, and others' hashes can be made to be alike
                target[key] = value
    return target
