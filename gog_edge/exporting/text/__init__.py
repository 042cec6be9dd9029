"""Export a sentence encoder to ONNX through optimum and prove parity with PyTorch (extra: text)."""
