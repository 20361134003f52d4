"""The largest parts of a model that can be captured, where it is not one graph."""
