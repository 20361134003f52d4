"""Reading a lowered model back: all that a process needs which serves one, so that little is imported.

Owns the verb. It must not know how a model is lowered, nor what is in a file.
"""

import os
from pathlib import Path

from srigl_fx.errors import FormatError
from srigl_fx.lowering.lowered import LoweredModule


def load_lowered(path: str | os.PathLike[str]) -> LoweredModule:
    """Read a model that ``lower(...).save(path)`` wrote; nothing in the file is executed as code.

    Raises:
        FormatError: There is no such file, it cannot be read, or it holds anything but a lowered graph. Numbers that
            have changed are not noticed: there is no checksum.

    Example:
        >>> import tempfile, torch, srigl_fx as sx
        >>> model = sx.sparsify(torch.nn.Sequential(torch.nn.Linear(16, 8)), sparsity=0.75)
        >>> lowered = sx.lower(model.eval(), (torch.ones(1, 16),), min_speedup=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lowered.save(f"{folder}/model.srigl")
        ...     again = sx.load_lowered(f"{folder}/model.srigl")
        >>> torch.equal(again(torch.ones(5, 16)), lowered(torch.ones(5, 16)))
        True
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise FormatError(f"there is no file {path}; lower(...).save(path) writes one") from error
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}; give the path of a file") from error
    return LoweredModule.from_bytes(data, origin=str(path))
