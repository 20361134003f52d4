"""A captured program in which the sizes that somebody asked for are free, or a reason why they cannot be.

Owns what is tried for that, which sizes a model is found to tie, and the sizes at which its graph is compared with it.
It must not know how a single attempt at a capture is made.

1. ``torch.export`` is told that each of these sizes may be free, and finds out which are, and which are tied.
2. A size that it has fixed, or tied to one that has another name, is an error where it was asked for by name. The
   model itself is then run with another number for that size alone: the line that fails says why.
3. The model, and its graph, run at other numbers of each free size: at 1, or the next smaller one that the model
   takes, and at the next larger one. Steps are powers of two, as many a model halves its inputs.
4. A size at which the model does not run at any other number is not free, nor is one where it gives something else than
   its graph at a number inside the limits, and no error says so. It is an error if that was asked for; else it is fixed
   and the model captured anew.
5. Sizes that have one number in the example, and of which the model takes no other for each alone, but for all of them,
   are one size: there are models that read a mask's first samples, as many as there are of the tokens.
6. What is compared later has all free sizes smaller at once, and all larger, if the model takes that; else one by one.
7. A condition that the trace has for sizes stays if the graph is not right, or the model does not run, at numbers that
   break it: calls then refuse them. Where both do the same there, as at a size that happened to differ from another in
   the example, the graph does not need it.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from srigl_fx.errors import LoweringError
from srigl_fx.passes.asked_sizes import Wish, Wishes
from srigl_fx.passes.capture import Capture, Failure, capture_asked
from srigl_fx.passes.capture_checks import class_name, first_line, raised_by
from srigl_fx.passes.free_sizes import UNKNOWN, batch_names, named_sizes, specialised_by
from srigl_fx.passes.guards import broken_at
from srigl_fx.passes.model_runs import run_steps
from srigl_fx.passes.program import Program
from srigl_fx.passes.size_trials import ANOTHER, DIFFERS, Trials
from srigl_fx.passes.sizes import At, Condition, FixedSize, Size, Sizes, resize

_STEPS = tuple(2**power for power in range(7))
_ROUNDS = 6  # captures in a row, each with fewer free sizes than the last

Axes = dict[int, dict[int, Wish]]


def capture_with(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], wishes: Wishes) -> Capture:
    """Capture ``model`` with these sizes free.

    Returns:
        As :func:`~srigl_fx.passes.capture.capture_whole`; without a program only where every size was asked for, and
        the model is no graph with any of them free.

    Raises:
        LoweringError: A size that was asked for cannot be free; the message names the input and the axis.
        CaptureError: The model is in training mode, or does not run on the inputs.
    """
    asking = _Asking(model, args, kwargs, wishes)
    for _ in range(_ROUNDS):
        done = asking.attempt()
        if done is not None:
            return done
    raise LoweringError(
        "the sizes that the model leaves free cannot be told: give dynamic_shapes by name; what is fixed so far: "
        + "; ".join(f"{one.axis}: {one.reason}" for one in asking.fixed.values())
    )


class _Asking:
    """The attempts for one model; each knows which sizes those before have found to be fixed."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], wishes: Wishes) -> None:
        self.model, self.args, self.kwargs, self.wishes = model, args, kwargs, wishes
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.trials = Trials(model)
        self.fixed: dict[tuple[int, int], FixedSize] = {}
        self.axes: Axes = {leaf: dict(axes) for leaf, axes in wishes.axes.items()}
        if wishes.everything:
            self._leave_ones_out()

    def _leave_ones_out(self) -> None:
        """Fix sizes of 0 and 1, which export takes for constants, where others do not run: those that broadcast."""
        leading = next((int(leaf.shape[0]) for leaf in self.leaves if isinstance(leaf, Tensor) and leaf.dim()), 0)
        for leaf, axes in list(self.axes.items()):
            for axis in list(axes):
                size = int(self.leaves[leaf].shape[axis])
                if size == 0 or (size == 1 and not (axis == 0 and leading == 1) and self._why(leaf, axis, 2)):
                    self._fix(leaf, axis, "the example has too few for torch.export to tell: give one with at least 2")

    def _fix(self, leaf: int, axis: int, reason: str) -> None:
        size = int(self.leaves[leaf].shape[axis])
        self.axes[leaf].pop(axis)
        self.axes = {leaf: axes for leaf, axes in self.axes.items() if axes}
        self.fixed[leaf, axis] = FixedSize(axis=f"{self.wishes.paths[leaf]} axis {axis}", size=size, reason=reason)

    def attempt(self) -> Capture | None:
        """One capture; None where it has shown that fewer sizes are free, and another is to be made."""
        if not self.axes and self.wishes.everything:
            return Capture(None, (self._failure("no size of any input is free"),))
        done = capture_asked(self.model, self.args, self.kwargs, self._dims(self.axes))
        if done.program is None:
            if self.wishes.everything:
                return done
            raise self._not_captured(done)
        program = self._named(done.program)
        if program is None:
            return None
        program = self._tried(program)
        return None if program is None else replace(done, program=program)

    def _failure(self, error: str) -> Failure:
        return Failure(name="", type=class_name(self.model), attempt="torch.export, free sizes", error=error)

    def _dims(self, axes: Axes) -> dict[int, dict[int, Any]]:
        """Rule 1."""
        return {leaf: dict.fromkeys(own, Dim.AUTO) for leaf, own in axes.items()}

    def _not_captured(self, done: Capture) -> LoweringError:
        """The error where no attempt succeeds: which size it is, found by asking for one at a time."""
        failure = done.failures[0].error if done.failures else "no size is to be free"
        single = [(leaf, axis) for leaf, axes in self.axes.items() for axis in axes]
        fixed = capture_asked(self.model, self.args, self.kwargs, {})
        if fixed.program is None:
            return LoweringError(
                f"{class_name(self.model)} is not one graph, with whatever sizes, so that none can be free: {failure}; "
                "mend that line, or lower without dynamic_shapes: its parts then are graphs, with sizes of their own"
            )
        for leaf, axis in single:
            wish = self.axes[leaf][axis]
            if capture_asked(self.model, self.args, self.kwargs, self._dims({leaf: {axis: wish}})).program is None:
                return LoweringError(
                    f"{self.wishes.place(leaf, axis)} cannot be free: {failure}; leave it out of dynamic_shapes"
                )
        places = ", ".join(self.wishes.place(leaf, axis) for leaf, axis in single)
        return LoweringError(f"{places} cannot be free together: {failure}; ask for fewer in dynamic_shapes")

    def _named(self, program: Program) -> Program | None:
        """Rule 2: the program with names for its sizes, or None where some are not free."""
        found, again = program.sizes, False
        for leaf, axes in list(self.axes.items()):
            for axis, wish in list(axes.items()):
                size = found.axes[leaf].get(axis)
                if size is not None and not any(name.startswith(UNKNOWN) for name, _ in size.terms):
                    continue
                reason = self._why(leaf, axis) or (
                    f"torch.export needs it to be this number{specialised_by(program, axis)}"
                    if size is None
                    else "it is computed from other sizes"
                )
                if wish.required:
                    raise LoweringError(
                        f"{self.wishes.place(leaf, axis)} was to be free, and the model ties it to "
                        f"{self.leaves[leaf].shape[axis]}: {reason}; leave it out of dynamic_shapes, or give Dim.AUTO"
                    )
                again |= size is not None
                self._fix(leaf, axis, reason)
        if again:
            return None
        given = self._called(found)
        sizes = named_sizes(found, program.module, given)
        return replace(program, sizes=self._limited(replace(sizes, batch=batch_names(sizes.axes, self.leaves))))

    def _called(self, found: Sizes) -> dict[str, Size]:
        """What the symbols of the graph are called, by what was asked for."""
        given: dict[str, Size] = {}
        places: dict[str, str] = {}
        asked = [
            (leaf, axis, wish.size, found.axes[leaf][axis])
            for leaf, axes in self.axes.items()
            for axis, wish in axes.items()
            if wish.size is not None
        ]
        # Names before sums of them, as a sum says nothing of what a symbol is.
        for leaf, axis, size, own in sorted(asked, key=lambda one: one[2].name is None):
            if own.name is not None and own.name not in given:
                given[own.name] = size
                places[own.name] = self.wishes.place(leaf, axis)
        for leaf, axis, size, own in asked:
            is_known = all(symbol in given for symbol, _ in own.terms)
            if is_known and _plain(own.put(given)) != _plain(size):
                first = " and ".join(places[symbol] for symbol, _ in own.terms)
                why = self._why(leaf, axis)
                raise LoweringError(
                    f"{self.wishes.place(leaf, axis)} was to be {size}, and the model ties it to {own.put(given)}, by "
                    f"{first}{f': {why}' if why else ''}; give it that name in dynamic_shapes"
                )
        # A difference reads better as what it is a part of: what is total - new becomes a name, and total a sum.
        for leaf, axes in enumerate(found.axes):
            for axis, own in axes.items():
                whole = [symbol for symbol, factor in own.terms if factor == 1 and symbol not in given]
                if own.name is None and whole and any(factor < 0 for _, factor in own.terms):
                    wish = self.axes.get(leaf, {}).get(axis)
                    part = wish.size if wish is not None and wish.size else Size.named(self._name_for(leaf, axis))
                    rest = tuple((symbol, -factor) for symbol, factor in own.terms if symbol != whole[0])
                    given[whole[0]] = Size((*part.terms, *rest), part.constant - own.constant).put(
                        {symbol: size for symbol, size in given.items() if symbol != whole[0]}
                    )
        return given

    def _name_for(self, leaf: int, axis: int) -> str:
        path = "".join(letter if letter.isalnum() else "_" for letter in self.wishes.paths[leaf])
        return f"{path}_{axis}"

    def _limited(self, sizes: Sizes) -> Sizes:
        """The limits of the graph, inside which those that were asked for must be."""
        limits = dict(sizes.limits)
        for name, (least, most) in self.wishes.limits.items():
            own_least, own_most = limits.get(name, (1, None))
            self._check_asked(sizes, name, (own_least, own_most))
            limits[name] = (max(least or 1, own_least), own_most if most is None else most)
        return replace(sizes, limits=limits, asked=True, fixed=tuple(self.fixed.values()))

    def _check_asked(self, sizes: Sizes, name: str, own: tuple[int, int | None]) -> None:
        """Raise where a range that was asked for is wider than what the graph is right for."""
        (least, most), (own_least, own_most) = self.wishes.limits.get(name, (None, None)), own
        if (least is None or max(least, 1) >= own_least) and (most is None or own_most is None or most <= own_most):
            return
        leaf, axis = next(
            (leaf, axis)
            for leaf, axes in enumerate(sizes.axes)
            for axis, size in axes.items()
            if any(name == other for other, _ in size.terms)
        )
        to = "without end" if own_most is None else f"to {own_most}"
        raise LoweringError(
            f"{name} was to be from {least or 1} {'without end' if most is None else f'to {most}'}, and the "
            f"graph of the model is right from {own_least} {to} ({self.wishes.place(leaf, axis)}): narrow the range"
        )

    def _why(self, leaf: int, axis: int, other: int | None = None) -> str:
        """The line of the model that fails where one size alone is another, and its error; "" where none does."""
        number = int(self.leaves[leaf].shape[axis])
        changed = list(self.leaves)
        changed[leaf] = resize(changed[leaf], number + 1 if other is None else other, axis)
        try:
            args, kwargs = pytree.tree_unflatten(changed, self.spec)
            run_steps(self.model, args, kwargs, 1)
        except Exception as error:  # the model's own code: any type
            return raised_by(error) + first_line(error)
        return ""

    def _tried(self, program: Program) -> Program | None:
        """Rules 3 to 6: the program with sizes at which it is right, or None where some are not free."""
        program = self._tied(program)
        sizes = program.sizes
        example = sizes.example(self.leaves)
        smaller, larger = dict[str, int](), dict[str, int]()
        limits, again = dict(sizes.limits), False
        for name in sizes.names:
            least, most = limits.get(name, (1, None))
            number = example[name]
            below = [n for n in (least, *(number - step for step in _STEPS)) if least <= n < number]
            above = [n for n in (number + step for step in _STEPS) if most is None or n <= most]
            problem = silent = ""
            for candidates, kept in ((below, smaller), (above, larger)):
                for candidate in candidates:
                    wrong = self.trials.wrong(program, At.of({**example, name: candidate}))
                    if wrong == "":
                        kept[name] = candidate
                        break
                    problem = problem or wrong
                    if candidate == 1 and candidate == least and wrong.startswith(DIFFERS):
                        limits[name] = (2, most)  # export takes sizes of 1 for constants: there it has decided
                        self._check_asked(sizes, name, limits[name])
                    elif wrong.endswith(ANOTHER):
                        silent = silent or wrong
            if silent or (name not in smaller and name not in larger and (below or above)):
                again |= self._not_free(sizes, name, silent or problem)
        if again:
            return None
        tried: list[dict[str, int]] = []
        for kept in (smaller, larger):
            together = {**example, **kept}
            if not kept or self.trials.wrong(program, At.of(together)) == "":
                tried += [kept] if kept else []
            else:
                tried += [{name: number} for name, number in kept.items()]
        sizes = replace(sizes, limits=limits, tried=tuple(tried))
        return replace(program, sizes=replace(sizes, conditions=self._needed(program, sizes)))

    def _needed(self, program: Program, sizes: Sizes) -> tuple[Condition, ...]:
        """Rule 7."""
        example = sizes.example(self.leaves)
        needed = []
        for condition in dict.fromkeys(sizes.conditions):
            # Sizes of 1 in the example were larger ones at the capture.
            if not all(condition.holds({**example, **values}) for values in ({}, *sizes.tried)):
                continue
            broken = broken_at(condition, example, sizes.limits)
            if broken is not None and self.trials.wrong(program, At.of(broken)) != "":
                needed.append(condition)
        return tuple(needed)

    def _tied(self, program: Program) -> Program:
        """Rule 5: the program with one name for sizes that go together, though the graph does not say so."""
        sizes = program.sizes
        example = sizes.example(self.leaves)
        asked = {name for axes in self.axes.values() for one in axes.values() if one.size for name, _ in one.size.terms}
        groups: dict[int, list[str]] = {}
        for name in sizes.names:
            if name not in asked:
                groups.setdefault(example[name], []).append(name)
        for number, names in groups.items():
            alone = [name for name in names if len(names) > 1 and not self._fits(program, [name], number, all)]
            if len(alone) == 1 and self._fits(program, names, number, all):
                # The others may be more alone, as the samples of a mask are, and of 1 there is no less to show it.
                together = names
                for name in [name for name in names if name not in alone]:
                    fewer = [other for other in together if other != name]
                    together = fewer if len(fewer) > 1 and self._fits(program, fewer, number, all) else together
                sizes, alone = sizes.with_one(together), []
            # A group that is right on both sides of its number is found first: on one of them a third size, such as the
            # length of a mask, may be in the way.
            for sides in (all, any):
                while len(alone) > 1 and self._fits(program, alone, number, sides):
                    least = alone
                    for name in alone:  # no more than have to go together: others have that number by chance
                        fewer = [other for other in least if other != name]
                        least = fewer if len(fewer) > 1 and self._fits(program, fewer, number, sides) else least
                    sizes = sizes.with_one(least)
                    alone = [name for name in alone if name not in least]
        return replace(program, sizes=sizes)

    def _fits(self, program: Program, names: list[str], number: int, sides: Callable[[Iterable[bool]], bool]) -> bool:
        """Whether the program is right with one less of these sizes, with one more, or with both."""
        example = program.sizes.example(self.leaves)
        others = [n for n in (number - 1, number + 1) if n > 0]
        return sides(self.trials.wrong(program, At.of({**example, **dict.fromkeys(names, n)})) == "" for n in others)

    def _not_free(self, sizes: Sizes, name: str, problem: str) -> bool:
        """Rule 4: fix the axes that have this size, or raise; whether any was fixed."""
        places = [
            (leaf, axis)
            for leaf, axes in enumerate(sizes.axes)
            for axis, size in axes.items()
            if any(name == other for other, _ in size.terms)
        ]
        for leaf, axis in places:
            if self.axes[leaf][axis].required:
                why = (
                    "there are sizes at which the graph is wrong"
                    if problem.endswith(ANOTHER)
                    else f"no other size than {self.leaves[leaf].shape[axis]} was found at which it is"
                )
                raise LoweringError(
                    f"{self.wishes.place(leaf, axis)} ({name}) was to be free, and {why}: {problem}; leave it out of "
                    "dynamic_shapes, or give an example of another size, or a Dim of a smaller range"
                )
        for leaf, axis in places:
            self._fix(leaf, axis, problem)
        return bool(places)


def _plain(size: Size) -> tuple[dict[str, int], int]:
    return {name: factor for name, factor in size.terms if factor}, size.constant
