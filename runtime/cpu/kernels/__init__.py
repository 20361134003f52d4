"""Loops only: every kernel is a plain Python function over pointers and integers that Numba compiles.

The same source is compiled just in time for torch and ahead of time for ONNX Runtime. Kernels know neither; they do
not validate, allocate or raise.
"""
