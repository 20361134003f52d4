"""Where the weights of a model are: the evidence that :class:`~srigl_fx.passes.discover.Discover` weighs."""
