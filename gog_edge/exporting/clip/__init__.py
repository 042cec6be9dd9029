"""Export of open_clip models to ONNX graphs for the runtime's encoder."""
