"""Every error the library raises on purpose, under one base class.

Owns the error hierarchy only; it must not know what raises which error. Each class is also the
built-in a caller would expect (``ValueError`` for a bad argument, ``RuntimeError`` for a failed step),
so that both ``except SriglError`` and ordinary handlers work. A message says what failed, where
(name, shape) and what to do next.
"""


class SriglError(Exception):
    """Base class of all errors raised by srigl_fx."""


class SparsifyError(SriglError, ValueError):
    """``sparsify`` was asked for something it cannot do; the model is unchanged."""


class RuleError(SparsifyError):
    """A rule is malformed, or matches no weight."""


class RecipeError(SparsifyError):
    """A recipe is damaged, of a newer version, or does not fit the model; the model is unchanged."""


class StructureError(SriglError, ValueError):
    """A mask structure does not fit the operation asked of it."""


class TrainerError(SriglError, ValueError):
    """A trainer's arguments, its model or its optimizer do not fit together."""


class DistillationError(SriglError, ValueError):
    """``distil`` was asked for something it cannot do, or its loss is not a number; the student is unchanged."""


class InvariantError(SriglError, RuntimeError):
    """A mask, weight or optimizer state breaks an invariant of sparse training."""


class PassError(SriglError, RuntimeError):
    """A graph pass failed, or broke what it promised."""


class CaptureError(SriglError, RuntimeError):
    """The model's graph could not be captured with these example inputs."""


class LoweringError(SriglError, RuntimeError):
    """A model could not be lowered, or the lowered one does not agree with it."""


class ExportError(SriglError, RuntimeError):
    """An ONNX file could not be written, or does not agree with the model."""


class FormatError(SriglError, ValueError):
    """A condensed weight, or a file that holds one, is malformed."""


class CudaError(SriglError, RuntimeError):
    """A layer cannot run on a GPU: no driver, no code for it, or the driver refused."""


class CheckpointError(SriglError, ValueError):
    """A checkpoint is damaged, foreign, does not fit, or cannot be written; nothing was changed by it."""


class LibraryError(SriglError, RuntimeError):
    """The ONNX Runtime operator library is missing, unusable here, or could not be built."""


class MissingExtraError(SriglError, ImportError):
    """An optional dependency is not installed; the message names the extra."""


class VersionError(SriglError, ImportError):
    """The installed PyTorch was not tested, and lacks what the library needs; the message says which release has it."""
