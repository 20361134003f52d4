"""How channels travel through a graph, and which of them can go.

:class:`~srigl_fx.passes.remove_dead.RemoveDead` puts these together.
"""
