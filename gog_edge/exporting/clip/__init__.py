"""Export an open_clip model to two ONNX graphs and prove parity with PyTorch."""
