"""The error status of a node that is refused: one line with the node's name and the numbers in question.

Owns how such a line is put together in a buffer of fixed size, ahead of time, where there is no string type. It must
not know what is refused, or why.
"""

from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.ort.primitives import call, inlined, linked, load, load8, stack, store8, text

_MESSAGE_SIZE = 512
_MESSAGE_WORDS = _MESSAGE_SIZE // abi.WORD
_NAME_MARK, _NUMBER_MARK, _MINUS, _ZERO = (ord(mark) for mark in "@%-0")


@inlined
def _append(message: int, length: int, source: int) -> int:
    """Append a C string; what does not fit is cut off."""
    i = 0
    while length < _MESSAGE_SIZE - 1 and load8(source, i) != 0:
        store8(message, length, load8(source, i))
        length += 1
        i += 1
    return length


@inlined
def _append_number(message: int, length: int, number: int) -> int:
    if length >= _MESSAGE_SIZE - 24:
        return length
    if number < 0:
        store8(message, length, _MINUS)
        length += 1
    digits = stack(3)
    rest = number if number < 0 else -number  # negative, because the smallest int64 has no positive
    count = 0
    while rest != 0 or count == 0:
        digit = -(rest % -10)
        store8(digits, count, _ZERO + digit)
        rest = (rest + digit) // 10
        count += 1
    for i in range(count):
        store8(message, length + i, load8(digits, count - 1 - i))
    return length + count


@linked
def refuse(node: int, template: int, name: int, first: int, second: int) -> int:
    """An error status "<operator> node '<name>': <template>", where @ becomes ``name`` and each % a number."""
    message = stack(_MESSAGE_WORDS)
    length = 0
    length = _append(message, length, load(node, abi.NODE_OPERATOR))
    if load8(node, abi.NODE_NAME) != 0:
        length = _append(message, length, text(" node '"))
        length = _append(message, length, node + abi.NODE_NAME)
        length = _append(message, length, text("'"))
    length = _append(message, length, text(": "))
    i = 0
    while load8(template, i) != 0 and length < _MESSAGE_SIZE - 1:
        character = load8(template, i)
        if character == _NAME_MARK:
            length = _append(message, length, name)
        elif character == _NUMBER_MARK:
            length = _append_number(message, length, first)
            first = second
        else:
            store8(message, length, character)
            length += 1
        i += 1
    store8(message, length, 0)
    return call(load(load(node, abi.NODE_API), abi.CREATE_STATUS), (abi.ERROR_INVALID_ARGUMENT, message))


FUNCTIONS = (refuse,)
