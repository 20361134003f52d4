"""The operators as a library for ONNX Runtime: compiled ahead of time, found, registered."""
