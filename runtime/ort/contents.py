"""Whether a model file still calls the condensed operators, read from its bytes.

Owns the mark that exported files carry, and the count of the nodes that compute sparsely. Tools around ONNX put the
bodies of functions in the place of calls, or rename functions and their callers: the file then computes the same,
densely. A process that serves does not import ``onnx`` to find out: of an ONNX file only the names of the nodes are
read and everything else is skipped by its length; in an ORT file, whose layout is ONNX Runtime's own, the operators'
names are looked for. It must not know sessions.
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from srigl_fx.runtime.ort import abi

MARK = ("srigl_fx.condensed", "1")  # a key and its value among a file's metadata: equal in all files, so that two merge
_LENGTH_DELIMITED = 2
_SKIPPED = {1: 8, 5: 4}  # bytes of fixed64 and fixed32
# Field numbers of onnx.proto3.
_MODEL_GRAPH, _GRAPH_NODE = 7, 1
_NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_TEXTS = (_NODE_OPERATOR, _NODE_DOMAIN)
_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS = 6, 11


@dataclass(frozen=True, kw_only=True)
class CondensedCalls:
    """The nodes of a file that are of the operators' domain.

    Attributes:
        sparse: How many call an operator of the library; in an ORT file, how many operators are called.
        renamed: The other names in the domain: functions that a tool renamed, which no library knows.
    """

    sparse: int
    renamed: tuple[str, ...] = ()

    def lost(self) -> str:
        """What a file that was exported sparse has lost, as the end of a sentence; "" where it has lost nothing.

        Example:
            >>> CondensedCalls(sparse=3).lost(), CondensedCalls(sparse=0).lost()
            ('', 'no condensed layer is left in it')
        """
        if self.renamed:
            return f"a tool has renamed its condensed layers ({', '.join(self.renamed[:3])})"
        return "" if self.sparse else "no condensed layer is left in it"


def condensed_calls(path: Path) -> CondensedCalls:
    """Count the nodes of a file that ONNX Runtime has read, those in branches and loops included.

    Raises:
        ValueError: The file is no ONNX file and no ORT file.
        OSError: It cannot be read.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        names = abi.operator_names()
        if data[4:8] == b"ORTM":
            return CondensedCalls(sparse=sum(data.find(_flat_string(name)) >= 0 for name in names))
        called = [
            operator
            for graph in _messages(data, 0, len(data), (_MODEL_GRAPH,))
            for domain, operator in _nodes(data, *graph)
            if domain == abi.DOMAIN
        ]
    renamed = dict.fromkeys(name for name in called if name not in (*names, *abi.NO_LAYERS))
    return CondensedCalls(sparse=sum(name in names for name in called), renamed=tuple(renamed))


def _flat_string(text: str) -> bytes:
    """A string as FlatBuffers, the form of ORT files, stores it."""
    return struct.pack("<I", len(text)) + text.encode() + b"\0"


def _nodes(data: mmap.mmap, start: int, stop: int) -> Iterator[tuple[str, str]]:
    """Domain and operator of each node of the graph in ``data[start:stop]``, and of the graphs inside its nodes."""
    for node in _messages(data, start, stop, (_GRAPH_NODE,)):
        texts = {number: data[begin:end].decode() for number, begin, end in _fields(data, *node) if number in _TEXTS}
        yield texts.get(_NODE_DOMAIN, ""), texts.get(_NODE_OPERATOR, "")
        for attribute in _messages(data, *node, (_NODE_ATTRIBUTE,)):
            for graph in _messages(data, *attribute, (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS)):
                yield from _nodes(data, *graph)


def _messages(data: mmap.mmap, start: int, stop: int, numbers: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Where the fields with these numbers begin and end."""
    return ((begin, end) for number, begin, end in _fields(data, start, stop) if number in numbers)


def _fields(data: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Number, begin and end of each field of the protobuf message in ``data[start:stop]`` that has a length."""
    position = start
    while position < stop:
        key, position = _varint(data, position, stop)
        number, kind = key >> 3, key & 7
        if kind == _LENGTH_DELIMITED:
            size, position = _varint(data, position, stop)
            yield number, position, min(position + size, stop)
            position += size
        elif kind in _SKIPPED:
            position += _SKIPPED[kind]
        elif kind == 0:
            _, position = _varint(data, position, stop)
        else:
            raise ValueError("no protobuf message")


def _varint(data: mmap.mmap, position: int, stop: int) -> tuple[int, int]:
    """The number that starts at ``position``, seven bits a byte, and where it ends."""
    value = shift = 0
    while position < stop and shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("no protobuf message")
