"""The few machine operations that Numba lacks: memory access by address, calls by address, constant strings, cpuid.

Owns those intrinsics; it must not know what they are used for. An address is an int64. None of this is callable from
Python: it is for functions that Numba compiles ahead of time.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import llvmlite.binding as llvm
import numba.core.cgutils
import numba.extending
from llvmlite import ir

Function = TypeVar("Function", bound=Callable[..., Any])

# Numba annotates half of its functions.
types: Any = numba.types
cgutils: Any = numba.core.cgutils
intrinsic: Any = numba.extending.intrinsic

word = types.int64
_WORD = ir.IntType(64)
_HALF = ir.IntType(32)
_SHORT = ir.IntType(16)
_BYTE = ir.IntType(8)
# Numba resolves every external name while it compiles, though nothing of this runs in the compiling process.
_NOWHERE = 0x1000


def inlined(function: Function) -> Function:
    """Let Numba inline ``function`` into every compiled caller."""
    return cast(Function, numba.njit(error_model="numpy", inline="always")(function))


def _pointer(builder: Any, address: Any, offset: Any, pointee: Any) -> Any:
    return builder.inttoptr(builder.add(address, offset), pointee.as_pointer())


def _loader(width: Any, *, signed: bool = False) -> Any:
    def load(context: Any, address: Any, offset: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address, offset = args
            value = builder.load(_pointer(builder, address, offset, width), align=1)
            if width is _WORD:
                return value
            return builder.sext(value, _WORD) if signed else builder.zext(value, _WORD)

        return word(word, word), generate

    return intrinsic(load)


def _storer(width: Any) -> Any:
    def store(context: Any, address: Any, offset: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address, offset, value = args
            value = value if width is _WORD else builder.trunc(value, width)
            builder.store(value, _pointer(builder, address, offset, width), align=1)
            return context.get_dummy_value()

        return types.void(word, word, word), generate

    return intrinsic(store)


load: Callable[[int, int], int] = _loader(_WORD)
load32: Callable[[int, int], int] = _loader(_HALF, signed=True)
load16: Callable[[int, int], int] = _loader(_SHORT)
load8: Callable[[int, int], int] = _loader(_BYTE)
store: Callable[[int, int, int], None] = _storer(_WORD)
store32: Callable[[int, int, int], None] = _storer(_HALF)
store8: Callable[[int, int, int], None] = _storer(_BYTE)


def _stack(context: Any, words: Any) -> Any:
    if not isinstance(words, types.IntegerLiteral):
        return None
    count = words.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        with builder.goto_entry_block():
            memory = builder.alloca(_WORD, size=ir.Constant(_WORD, count))
        return builder.ptrtoint(memory, _WORD)

    return word(words), generate


stack: Callable[[int], int] = intrinsic(prefer_literal=True)(_stack)  # uninitialised words on the stack


def _text(context: Any, text: Any) -> Any:
    if not isinstance(text, types.StringLiteral):
        return None
    literal = text.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(context.insert_const_string(builder.module, literal), _WORD)

    return word(text), generate


text: Callable[[str], int] = intrinsic(prefer_literal=True)(_text)  # the address of a constant C string


def _symbol(context: Any, name: Any) -> Any:
    if not isinstance(name, types.StringLiteral):
        return None
    literal = name.literal_value
    if not llvm.address_of_symbol(literal):
        llvm.add_symbol(literal, _NOWHERE)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), []), literal)
        return builder.ptrtoint(function, _WORD)

    return word(name), generate


symbol: Callable[[str], int] = intrinsic(prefer_literal=True)(_symbol)  # the address of a linked function or table


def external(name: str, arity: int) -> Callable[..., int]:
    """A C function of ``arity`` words that the linker will find."""

    def declare(context: Any, *args: Any) -> Any:
        if not llvm.address_of_symbol(name):
            llvm.add_symbol(name, _NOWHERE)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            declared = ir.FunctionType(_WORD, [_WORD] * arity)
            return builder.call(cgutils.get_or_insert_function(builder.module, declared, name), args)

        return word(*[word] * arity), generate

    # Numba would pass a variable number of arguments as a tuple, so it is told the number.
    names = ("context", *(f"argument{i}" for i in range(arity)))
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    declare.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return cast(Callable[..., int], intrinsic(declare))


def linked(function: Function) -> Function:
    """Compile ``function`` once, into a C function of words of its own; its callers call it by ``linked_name``."""
    proxy = external(linked_name(function), len(inspect.signature(function).parameters))
    functools.update_wrapper(proxy, function)
    return cast(Function, proxy)


def linked_name(function: Callable[..., int]) -> str:
    """The symbol of a linked function.

    Example:
        >>> linked_name(len)
        'srigl_len'
    """
    return f"srigl_{function.__name__}"


def _call(context: Any, address: Any, args: Any) -> Any:
    count = len(args)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, words = args
        function = builder.inttoptr(address, ir.FunctionType(_WORD, [_WORD] * count).as_pointer())
        return builder.call(function, cgutils.unpack_tuple(builder, words, count))

    return word(word, types.UniTuple(word, count)), generate


call: Callable[[int, tuple[int, ...]], int] = intrinsic(_call)  # any C function of integers and pointers


def _cpuid(context: Any, leaf: Any, subleaf: Any, registers: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        leaf, subleaf, registers = args
        result = builder.asm(
            ir.FunctionType(ir.LiteralStructType([_HALF] * 4), [_HALF, _HALF]),
            "cpuid",
            "={ax},={bx},={cx},={dx},{ax},{cx}",
            [builder.trunc(leaf, _HALF), builder.trunc(subleaf, _HALF)],
            True,
        )
        for i in range(4):
            value = builder.zext(builder.extract_value(result, i), _WORD)
            builder.store(value, _pointer(builder, registers, ir.Constant(_WORD, 8 * i), _WORD))
        return context.get_dummy_value()

    return types.void(word, word, word), generate


cpuid: Callable[[int, int, int], None] = intrinsic(_cpuid)  # eax, ebx, ecx, edx as four words at ``registers``


def _xgetbv(context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        result = builder.asm(
            ir.FunctionType(ir.LiteralStructType([_HALF] * 2), [_HALF]),
            "xgetbv",
            "={ax},={dx},{cx}",
            [ir.Constant(_HALF, 0)],
            True,
        )
        return builder.zext(builder.extract_value(result, 0), _WORD)

    return word(), generate


xgetbv: Callable[[], int] = intrinsic(_xgetbv)  # which register states the operating system saves


def _exchange(context: Any, address: Any, expected: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, expected, value = args
        pointer = builder.inttoptr(address, _WORD.as_pointer())
        return builder.extract_value(builder.cmpxchg(pointer, expected, value, "acq_rel", "acquire"), 0)

    return word(word, word, word), generate


# Atomically: the word at ``address`` becomes ``value`` if it is ``expected``; what it was before.
exchange: Callable[[int, int, int], int] = intrinsic(_exchange)
