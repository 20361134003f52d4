"""What the neurons of a weight are to the rest of the model: its own width, or channels that others share.

Owns the reading of the joined data flow (:mod:`srigl_fx.passes.sites.data_flow`) for this; it must not know what a
trainer makes of it.

Rules:
    1. A sum skips a layer where one side has passed more contractions than the other and was made from it: from a
       value that the shorter side is, up to operations that keep neurons apart, or from the input of the shorter side's
       only contraction, if that input depends on all that the longer side depends on. (So a shortcut with a projection
       counts, and a projected condition that is added to every block does not.) What is multiplied neuron by neuron has
       passed as many as the factor that has passed fewest, the other being a gate.
    2. A weight is a writer of a residual stream (``stream``) if its neurons reach such a sum through operations that
       keep neurons apart, normalisations among them: what writes to the stream first, and every branch.
    3. It gives factors of attention (``attention``) if they reach a product of data with data in the same way.
    4. It is ``normalised`` if everything that reads its neurons in the same way is a normalisation over neurons. One of
       each neuron on its own (batch and instance normalisation) is none.
    5. Else the neurons are the layer's own ``width``. Where a weight is used several times the first of these holds
       that holds for one use; where no use was seen, or not where the neurons go, nothing is known.

Rule 1 in sets, for each value v made from inputs u, in one pass from front to back::

    depth(v)      max of depth(u), min where v is element by element; one more for a contraction or a product
    ancestors(v)  {v} and all ancestors(u)
    sources(v)    {v} for an input of the model, else all sources(u)
    heads(v)      {v}, and all heads(u) unless v is a contraction or a product

A sum of a short and a long side, depth(short) < depth(long), skips a layer if heads(short) and ancestors(long) share

    a. a value that is no input of the model; or
    b. an input, while sources(short) has all of sources(long); or
    c. nothing, but sources(short) has all of sources(long), and a contraction in heads(short) reads a value of which a
       head is in ancestors(long).
"""

import logging

from torch import nn

from srigl_fx.masks.records import Role
from srigl_fx.passes.sites.data_flow import Flow, TooLargeError, Value, Ways

_LOG = logging.getLogger(__name__)
_ORDER: tuple[Role, ...] = ("stream", "attention", "normalised", "width")


def roles_of(model: nn.Module, ways: Ways) -> dict[int, Role]:
    """The role of the neurons of every parameter that a contraction was seen to read, by the parameter's id.

    Args:
        model: The model; it is only looked at.
        ways: The traces of a module's own forward, the most usual one first.

    Example:
        >>> from srigl_fx.passes.sites.local_trace import traces_of
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> roles = roles_of(model, traces_of)
        >>> roles[id(model[0].weight)], roles[id(model[2].weight)]
        ('normalised', 'width')
    """
    try:
        values = Flow(model, ways).values
    except TooLargeError:
        _LOG.debug("%s is too large to follow its neurons", type(model).__name__)
        return {}
    skips = _skips(values)
    roles: dict[int, Role] = {}
    for value in values:
        if value.weights:
            role = _role(value, skips)
            if role is None:
                continue
            for weight in value.weights:
                roles[weight] = min(role, roles.get(weight, role), key=_ORDER.index)
    return roles


def _role(written: Value, skips: set[Value]) -> Role | None:
    """What becomes of the neurons that a contraction writes."""
    reached = _readers(written, through_norms=True, until=skips)
    if not reached.isdisjoint(skips):  # rule 2
        return "stream"
    if any(value.sort == "product" for value in reached):  # rule 3
        return "attention"
    if any(value.sort == "unknown" for value in reached):  # rule 5: who knows where they go from there
        return None
    # Rules 4 and 5.
    readers = {value for value in _readers(written, through_norms=False, until=set()) if not _keeps_apart(value)}
    return "normalised" if readers and all(value.sort == "norm" for value in readers) else "width"


def _keeps_apart(value: Value) -> bool:
    """Whether its neurons are passed on one by one to somebody."""
    return value.sort in ("elementwise", "sum", "length") and bool(value.users)


def _readers(written: Value, *, through_norms: bool, until: set[Value]) -> set[Value]:
    """All that the neurons meet, up to the first of ``until``: what passes them on, and what mixes them."""
    found: set[Value] = set()
    pending = [written]
    while pending:
        value = pending.pop()
        for user in value.users:
            if user not in found:
                found.add(user)
                if user in until:  # one is enough: rule 2 comes first
                    return found
                if user.sort in ("elementwise", "sum", "length") or (through_norms and user.sort == "norm"):
                    pending.append(user)
    return found


def _skips(values: list[Value]) -> set[Value]:
    """The sums that skip a layer (rule 1). Sets of values are bits of whole numbers, by their places."""
    depth: list[int] = []  # contractions on the longest way from an input
    ancestors: list[int] = []  # with the value itself
    sources: list[int] = []  # inputs of the model it depends on
    heads: list[int] = []  # values it is, up to operations that keep neurons apart
    for value in values:
        own = 1 << value.place
        at = [each.place for each in value.inputs]
        mixes = value.sort in ("contraction", "product")
        choose = min if value.sort == "elementwise" else max  # a gate is no way of what it is multiplied with
        depth.append(choose((depth[place] for place in at), default=0) + mixes)
        ancestors.append(own | _union(ancestors, at))
        sources.append(own if value.sort == "input" else _union(sources, at))
        heads.append(own if mixes or value.sort == "input" else own | _union(heads, at))
    given = sum(1 << value.place for value in values if value.sort == "input")
    contractions = sum(1 << value.place for value in values if value.sort == "contraction")

    def projects(short: int, long: int) -> bool:
        """Whether a contraction that the shorter side is reads what the longer side was made from."""
        read = (values[place].inputs for place in _places(heads[short] & contractions))
        return any(_union(heads, [each.place for each in inputs]) & ancestors[long] for inputs in read)

    found = set()
    for value in values:
        if value.sort != "sum" or len(value.inputs) != 2:
            continue
        short, long = sorted((each.place for each in value.inputs), key=depth.__getitem__)
        if depth[short] == depth[long]:  # two branches side by side
            continue
        # Rule 1: a, b, c.
        shared = heads[short] & ancestors[long]
        covers = not sources[long] & ~sources[short]
        if shared & ~given or (shared and covers) or (covers and projects(short, long)):
            found.add(value)
    return found


def _union(sets: list[int], places: list[int]) -> int:
    joined = 0
    for place in places:
        joined |= sets[place]
    return joined


def _places(bits: int) -> list[int]:
    found = []
    while bits:
        lowest = bits & -bits
        found.append(lowest.bit_length() - 1)
        bits ^= lowest
    return found
