"""What depends on an input, operator by operator: the rules behind :mod:`srigl_fx.passes.constness`."""
