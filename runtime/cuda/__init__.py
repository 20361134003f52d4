"""What is for NVIDIA GPUs: kernels, their machine code, and how torch calls them. Nothing of it has run on one yet.

Importing this package, or anything in it but the kernels, touches neither a driver nor Numba.
"""
