"""The types of tensors as ONNX Runtime names them, and those of NumPy for them.

Owns this table. It must not know what tensors are for.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np

DTYPES: Final[Mapping[str, type[np.generic]]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
}
