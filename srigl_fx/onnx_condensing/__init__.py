"""ONNX files that are sparse already: from zeros in their weights to condensed nodes, without torch."""
