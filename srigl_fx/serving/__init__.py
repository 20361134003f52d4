"""An HTTP server for ONNX files: the command ``srigl-fx serve`` and what it is made of. Needs the extra ``[serve]``."""
