"""OpenVINO: a rival of dense models, in float32 and in eight bits.

Owns how it is called at its best. It must not know what the models compute.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from srigl_fx.demo.dense_int8 import Feeds


class NotAvailableError(Exception):
    """Why a contender cannot run here."""


def openvino_call(model: bytes, feeds: Feeds, threads: int) -> Callable[[], Any]:
    """A call of OpenVINO on these inputs, compiled for latency; products of float32 stay so.

    Raises:
        NotAvailableError: OpenVINO is not installed, or refuses the model.
    """
    try:
        import openvino
    except ImportError as error:
        raise NotAvailableError("not available: pip install openvino") from error
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
    }
    core = openvino.Core()
    try:
        network = core.read_model(model)
        # Its sizes are known as they are where others are prepared too: a model of any batch size is slower.
        network.reshape({name: list(array.shape) for name, array in feeds.items()})
        request = core.compile_model(network, "CPU", settings).create_infer_request()
    except RuntimeError as error:
        raise NotAvailableError(f"not available: {str(error).splitlines()[0]}") from error
    given = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
    return lambda: request.infer(given, share_inputs=True, share_outputs=True)[0]
