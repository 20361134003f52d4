"""The packed weight of a node: made at the first call that wants it, shared by all that follow where it is constant.

Owns these panels, as functions that Numba compiles ahead of time (words in, one word out). A panel is one allocation
that starts with a job in which everything is filled in that does not change from call to call. It must not know how a
panel is laid out, nor what is computed with it.
"""

from srigl_fx.runtime.cpu.kernels import job, plan
from srigl_fx.runtime.cpu.kernels.plan import INNERMOST, INT8_TILE, SHARED_TILE, TILE
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.ort.primitives import call, exchange, external, inlined, linked, load, stack, store

_calloc, _free = external("calloc", 2), external("free", 1)

_JOB_WORDS = job.SIZE
_JOB_BYTES = 8 * job.SIZE
_SCRATCH_WORDS, _GROUP_WORDS = job.SCRATCH_WORDS, job.GROUP_WORDS
_CACHE_LINE = plan.CACHE_LINE
_PLAN_PANEL, _MEASURE_PANEL, _FILL_PANEL = (abi.TABLE[task] for task in ("plan_panel", "measure_panel", "fill_panel"))


@inlined
def kernel(node: int, table: int) -> int:
    """The address of a task of the node's instruction set."""
    return load(load(node, abi.NODE_KERNELS), table)


@linked
def block_samples(node: int) -> int:
    """How many samples a block has that lie innermost, with the node's instruction set."""
    planned = stack(_JOB_WORDS)
    for i in range(_JOB_WORDS):
        store(planned, abi.WORD * i, 0)
    call(kernel(node, _PLAN_PANEL), (planned, INNERMOST))
    return load(planned, abi.WORD * job.SAMPLES)


@linked
def store_weights(node: int, weights: int, j: int) -> int:
    """Fill the fields of a job that describe the weight."""
    index_type = load(weights, abi.WEIGHTS_INDEX_TYPE)
    store(j, abi.WORD * job.VALUES, load(weights, abi.WEIGHTS_VALUES))
    store(j, abi.WORD * job.INDICES, load(weights, abi.WEIGHTS_INDICES))
    store(j, abi.WORD * job.ACTIVE, load(weights, abi.WEIGHTS_ACTIVE))
    store(j, abi.WORD * job.INDEX_ROWS, load(weights, abi.WEIGHTS_INDEX_ROWS))
    store(j, abi.WORD * job.BIAS, load(weights, abi.WEIGHTS_BIAS))
    store(j, abi.WORD * job.SCALES, load(weights, abi.WEIGHTS_SCALES))
    store(j, abi.WORD * job.N_ACTIVE, load(weights, abi.WEIGHTS_N_ACTIVE))
    store(j, abi.WORD * job.K, load(weights, abi.WEIGHTS_K))
    store(j, abi.WORD * job.VALUE_TYPE, load(weights, abi.WEIGHTS_VALUE_TYPE))
    store(j, abi.WORD * job.INDEX_BYTES, 2 if index_type == abi.TYPE_UINT16 else 4)
    store(j, abi.WORD * job.IN_FEATURES, load(node, abi.NODE_IN_FEATURES))
    store(j, abi.WORD * job.OUT_FEATURES, load(node, abi.NODE_OUT_FEATURES))
    return 0


@linked
def find_panel(node: int, weights: int, kernel_number: int, block_rows: int) -> int:
    """The node's panel for a kernel; 0 where there is none: no such kernel, weights that change, or no memory."""
    tiles = kernel_number in (TILE, SHARED_TILE, INT8_TILE)
    place = node + (abi.NODE_TILE_PANEL if tiles else abi.NODE_DOT_PANEL)
    found = load(place, 0)
    if found != 0:
        return found
    constant = load(node, abi.NODE_CONSTANT_VALUES)
    if constant == 0 or load(weights, abi.WEIGHTS_VALUES) != constant:
        return 0
    if load(weights, abi.WEIGHTS_INDICES) != load(node, abi.NODE_CHECKED_INDICES):
        return 0
    if load(weights, abi.WEIGHTS_ACTIVE) != load(node, abi.NODE_CHECKED_ACTIVE):
        return 0
    if load(weights, abi.WEIGHTS_SCALES) != load(node, abi.NODE_CONSTANT_SCALES):
        return 0
    made = make_panel(node, weights, kernel_number, block_rows)
    if made == 0:
        return 0
    before = exchange(place, 0, made)
    if before != 0:  # another thread was faster
        _free(made)
        return before
    return made


@linked
def make_panel(node: int, weights: int, kernel_number: int, block_rows: int) -> int:
    """A panel of these weights, the caller's own; 0 where there is no such kernel, or no memory."""
    measured, scratch = stack(_JOB_WORDS), stack(_SCRATCH_WORDS)
    for i in range(_JOB_WORDS):
        store(measured, abi.WORD * i, 0)
    store_weights(node, weights, measured)
    store(measured, abi.WORD * job.BLOCK_ROWS, block_rows)
    if kernel_number == INNERMOST:  # of others, a geometry in the job says that samples are a convolution's
        store(measured, abi.WORD * job.GEOMETRY, node + abi.NODE_GEOMETRY)
    call(kernel(node, _PLAN_PANEL), (measured, kernel_number))
    if load(measured, abi.WORD * job.PANEL_WINDOW) == 0:
        return 0
    call(kernel(node, _MEASURE_PANEL), (measured, scratch))
    groups, phases = load(measured, abi.WORD * job.PANEL_COUNT), load(measured, abi.WORD * job.PANEL_PHASES)
    # The job; where each group starts; each phase's window; each lane's output, scale and sum; the phases, aligned.
    groups_at = _JOB_BYTES
    starts_at = groups_at + (groups + 1) * _GROUP_WORDS * abi.WORD
    rows_at = starts_at + phases * 4
    lanes_bytes = groups * 16 * 4
    panel_at = rows_at + 3 * lanes_bytes + _CACHE_LINE
    made = _calloc(1, panel_at + load(measured, abi.WORD * job.PANEL_BYTES))
    if made == 0:
        return 0
    for i in range(_JOB_WORDS):
        store(made, abi.WORD * i, load(measured, abi.WORD * i))
    store(made, abi.WORD * job.PANEL_GROUPS, made + groups_at)
    store(made, abi.WORD * job.PANEL_STARTS, made + starts_at)
    store(made, abi.WORD * job.PANEL_ROWS, made + rows_at)
    store(made, abi.WORD * job.PANEL_SCALES, made + rows_at + lanes_bytes)
    store(made, abi.WORD * job.PANEL_SUMS, made + rows_at + 2 * lanes_bytes)
    store(made, abi.WORD * job.PANEL, (made + panel_at) // _CACHE_LINE * _CACHE_LINE)
    call(kernel(node, _FILL_PANEL), (made, scratch))
    return made


@inlined
def free_panel(panel: int) -> None:
    """Give back what :func:`make_panel` made; 0 is nothing."""
    _free(panel)


FUNCTIONS = (block_samples, store_weights, find_panel, make_panel)
