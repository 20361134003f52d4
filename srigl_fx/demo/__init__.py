"""The whole path on real data: train sparsely, lower, export, serve, and measure each step.

Owns the demonstration that ``srigl-fx demo`` runs. It uses the public interface of the package alone, so it also
serves as the longest example; it must not know how any of it works inside. Read :mod:`srigl_fx.demo.train` first.
"""
