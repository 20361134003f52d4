"""What the tests of the ONNX Runtime operators share."""
