"""One call of a condensed operator, as the array of int64 that every kernel reads.

Owns the positions in it; addresses are plain integers. A job is filled in by the operators of torch and by those of
ONNX Runtime alike; kernels that share one only read it, except for the fields of their own scratch.
"""

from typing import Final

(
    X,  # float32, or uint8 if X_BYTES: rows (BATCH, IN_FEATURES), or (IN_FEATURES, BATCH) if X_FEATURE_MAJOR
    Y,  # float32, or uint8 if Y_SCALE is given: rows (BATCH, OUT_FEATURES), or (OUT_FEATURES, BATCH) if Y_FEATURE_MAJOR
    RESIDUAL,  # float32 laid out as Y, or 0
    BIAS,  # float32 (OUT_FEATURES,)
    ACTIVE,  # int32 (N_ACTIVE,)
    INDEX_ROWS,  # int32 (N_ACTIVE,): where rows share INDICES, which row of these each reads; else 0
    VALUES,  # (N_ACTIVE, K), of VALUE_TYPE
    INDICES,  # (N_ACTIVE, K), of INDEX_BYTES; fewer rows where INDEX_ROWS is given
    BATCH,
    IN_FEATURES,
    OUT_FEATURES,
    N_ACTIVE,
    K,
    X_FEATURE_MAJOR,
    Y_FEATURE_MAJOR,
    ACTIVATION,  # a number of runtime.activations
    VALUE_TYPE,  # a number of runtime.value_types
    INDEX_BYTES,  # 2 or 4
    ROW_SPLITS,  # into how many tasks the rows of one tile are cut
    TILES,  # room for a filled tile of each task, or 0 where each brings its own
    TILE_OWNERS,  # int64 (tasks, 2), zeros at first: which thread had a task, and in which of TILES its inputs are
    PANEL,  # the packed weight: kernels.panel
    PANEL_GROUPS,  # int64 (groups + 1, GROUP_WORDS)
    PANEL_STARTS,  # int32 (phases,)
    PANEL_ROWS,  # int32 (groups * LANES,)
    PANEL_COUNT,  # groups
    PANEL_PHASES,  # of all groups together
    PANEL_BYTES,  # of all phases together
    PANEL_WINDOW,
    KERNEL,  # that reads the panel, or that computes the call: a number of kernels.plan
    BLOCK_ROWS,  # output rows that read the same inputs: all, or those of one group of a convolution
    GEOMETRY,  # of a convolution: kernels.conv
    OFFSETS,  # int64: where a packed sample's taps start
    SAMPLE,  # the first sample whose packed form is at PACKED
    SAMPLES,  # and how many there are; of a linear call, of how many samples KERNEL is; of a panel, those of a block
    PACKED,  # packed samples; of linear layers rounded ones, or 0 where each task rounds them
    PACKED_SIZE,  # elements of one: floats, or bytes for values of eight bits
    SCALES,  # float32 (N_ACTIVE,): of values of eight bits, what one is worth in its row
    PANEL_SCALES,  # float32 (groups * LANES,): the same by lanes
    PANEL_SUMS,  # int32 (groups * LANES,): the sums of the lanes' values of eight bits
    X_SCALES,  # what is known of the samples, with values of eight bits: kernels.int8_samples
    X_SCALE,  # the bits of the float32 with which all samples are rounded; 0 where each has a scale of its own
    X_OFFSET,  # and what belongs to that: 0 or 128
    X_BYTES,  # 1 where x is rounded already
    Y_SCALE,  # the bits of the float32 with which outputs are rounded; 0 where they are stored as floats
    Y_OFFSET,  # and what belongs to that: 0 or 128
    FAILED,  # set to 1 by a task that found no memory
) = range(47)
SIZE: Final = 47

# In PANEL_GROUPS: a group's first phase, its first active row, how far its phases are from PANEL in bytes, whether its
# rows share inputs by fours, and in how many fours rows with indices of their own are stored in a tile panel of eight
# bits; one more group ends it.
GROUP_PHASE, GROUP_ROW, GROUP_AT, GROUP_SHARED, GROUP_QUADS = range(5)
GROUP_WORDS: Final = 5
SCRATCH_WORDS: Final = 64  # of which packing needs room to count where it is

# How threads are told of a job's tasks, in an array of its own: kernels.team.
TEAM_TASK: Final = 0  # the address of a function of a job's address and a number
TEAM_JOB: Final = 1  # the job's address
TEAM_TASKS: Final = 2  # how many there are
TEAM_THREADS: Final = 3  # how many threads share them
TEAM_OWN_NUMBER: Final = 4  # the address of a function that gives the calling thread's number among these
TEAM_SIZE: Final = 5
