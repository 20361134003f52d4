"""The free sizes of a model's inputs, and those that are not, as text.

Owns these lines. It must not know how sizes are found to be free.
"""

from collections.abc import Iterable

from srigl_fx.passes.sizes import FixedSize, FreeSize


def format_sizes(free: Iterable[FreeSize], fixed: Iterable[FixedSize]) -> str:
    """A line for each size, its axes, its range and what was tried.

    Example:
        >>> one = FreeSize(name="tokens", axes=("ids axis 1", "mask axis 1"), example=8, tried=(1, 9), most=512)
        >>> print(format_sizes([one], [FixedSize(axis="ids axis 0", size=2, reason="model.py, line 7")]))
        tokens is free: ids axis 1, mask axis 1; 1 to 512, tried at 1, 8, 9
        ids axis 0 is 2: model.py, line 7
    """
    lines = []
    for one in free:
        span = f"{one.least} to {one.most}" if one.most is not None else f"{one.least} or more"
        tried = ", ".join(map(str, sorted({*one.tried, one.example})))
        also = "".join(f", {words}" for words in one.conditions)
        lines.append(f"{one.name} is free: {', '.join(one.axes)}; {span}{also}, tried at {tried}")
    return "\n".join([*lines, *(f"{one.axis} is {one.size}: {one.reason}" for one in fixed)])
