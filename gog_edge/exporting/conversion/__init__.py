"""Conversion of exported graphs for TensorRT and for ONNX Runtime's CUDA provider."""
