"""From a lowered graph to a file of ONNX."""
