"""What ``torch.export`` found that sizes must satisfy beside their ranges, in the form of conditions.

Owns the way from the guards of a trace, expressions of symbols, to :class:`~srigl_fx.passes.sizes.Condition`. It must
not know what the symbols are called, nor whether a graph really needs a guard.

1. A relation of two sums of sizes is taken as it stands; one of a single size and 0 or 1 says nothing, as export takes
   such sizes for constants, and another inequality of one size is a matter of its range.
2. Other guards hold products and quotients. Such a guard is taken to say that a size is a multiple of a number in it,
   if it holds at just every so many of that size, also where all other sizes are twice as large. Of those that say
   something else, nothing is told.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from srigl_fx.passes.sizes import ANY, Condition, Size, is_within

_MOST_DIVISOR = 256
_RELATIONS: Mapping[str, tuple[Literal["==", "!=", ">="], int, int]] = {
    "==": ("==", 1, 0),
    "!=": ("!=", 1, 0),
    ">=": (">=", 1, 0),
    ">": (">=", 1, -1),
    "<=": (">=", -1, 0),
    "<": (">=", -1, -1),
}  # by sympy's name: the relation, and what the left side less the right one is multiplied with before adding


def conditions_of(guards: Iterable[Any], example: Mapping[str, int]) -> tuple[Condition, ...]:
    """The conditions that guards state, by symbols.

    Args:
        guards: Relations of sympy, without the symbols that were replaced by others.
        example: The numbers of the symbols at the capture.

    Example:
        >>> import sympy
        >>> a, b = sympy.symbols("a b", integer=True, positive=True)
        >>> found = conditions_of([a > b, sympy.Eq(sympy.Mod(a * b, 8 * b), 0), a >= 2], {"a": 16, "b": 3})
        >>> [one.words for one in found]
        ['a must be at least b + 1', 'a must be a multiple of 8']
    """
    found: dict[Condition, None] = {}
    for guard in guards:
        relation = _RELATIONS.get(getattr(guard, "rel_op", ""))
        if relation is None or any(str(symbol) not in example for symbol in guard.free_symbols):
            continue
        # Rule 1.
        size = _sum_of(guard.lhs - guard.rhs)
        if size is None:
            found.update(dict.fromkeys(_multiples(guard, example)))
            continue
        kind, factor, constant = relation
        terms = tuple((name, factor * times) for name, times in size.terms)
        one = Condition(Size(terms, factor * size.constant + constant), kind).put({})
        if one and (len(terms) > 1 or (kind == "!=" and abs(size.constant) > 1)):
            found[one] = None
    return tuple(one for one in found if one.holds(example))


def _sum_of(expression: Any) -> Size | None:
    """A sum of multiples of symbols, and a number; None where it is something else."""
    terms: list[tuple[str, int]] = []
    constant = 0
    for part, factor in expression.as_coefficients_dict().items():
        if part.is_Symbol and factor.is_Integer:
            terms.append((str(part), int(factor)))
        elif part.is_number and (part * factor).is_Integer:
            constant += int(part * factor)
        else:
            return None
    return Size(tuple(terms), constant)


def _multiples(guard: Any, example: Mapping[str, int]) -> list[Condition]:
    """Rule 2."""
    symbols = sorted(guard.free_symbols, key=str)
    numbers = {str(atom) for atom in guard.atoms() if atom.is_Integer and 1 < abs(int(atom)) <= _MOST_DIVISOR}
    divisors = sorted(abs(int(number)) for number in numbers)

    def holds(changed: Any, more: int, others: int) -> bool | None:
        known = {one: example[str(one)] + more if one is changed else example[str(one)] * others for one in symbols}
        try:
            result = guard.xreplace({one: one * 0 + number for one, number in known.items()})
        except (ArithmeticError, ValueError, TypeError, AssertionError):  # there is no such number
            return None
        return bool(result) if result in (True, False) else None

    found = []
    for symbol in symbols:
        if not divisors or holds(symbol, 1, 1) is not False:
            continue
        for divisor in divisors:
            steps = range(divisor + 1)
            if all(holds(symbol, more, others) is (more % divisor == 0) for others in (1, 2) for more in steps):
                rest = example[str(symbol)] % divisor
                found.append(Condition(Size(((str(symbol), 1),), -rest), "==", divisor))
                break
    return found


def broken_at(
    condition: Condition, example: Mapping[str, int], limits: Mapping[str, tuple[int, int | None]]
) -> dict[str, int] | None:
    """Numbers within limits at which a condition fails, but for one the example's; None where none is found.

    Example:
        >>> broken_at(Condition.parse("a % 4 == 0"), {"a": 8}, {"a": (4, None)})
        {'a': 9}
    """
    for name, factor in condition.size.terms:
        # Where the sum is 0, and on both sides of that.
        zero = example[name] - condition.size.at(example) // factor
        beside = example[name] + 1, example[name] - 1
        for number in beside if condition.divisor else (zero, zero - 1, zero + 1, *beside):
            values = {**example, name: number}
            if is_within(number, *limits.get(name, ANY)) and number > 0 and not condition.holds(values):
                return values
    return None
