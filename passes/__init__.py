"""Graph passes: graph in, graph out (imports as ``srigl_fx.passes``)."""

if __name__ != "srigl_fx.passes":
    raise ImportError(f"import this package as 'srigl_fx.passes', not as {__name__!r}")

from srigl_fx.passes.base import Note, Pass, PassResult, run

__all__ = ["Note", "Pass", "PassResult", "run"]
