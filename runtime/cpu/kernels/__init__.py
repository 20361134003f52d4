"""Loops only: every kernel is a plain Python function over pointers and integers that Numba compiles.

The same source is compiled ahead of time into the operator library, and just in time where that is not built. Kernels
know neither; they do not validate, allocate or raise.
"""
