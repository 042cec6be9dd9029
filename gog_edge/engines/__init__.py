"""Inference engines: NumPy arrays in, NumPy arrays out, on ONNX Runtime or TensorRT."""
