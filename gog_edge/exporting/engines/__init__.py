"""Building of engines from a bundle's graphs: TensorRT plans, and graphs for ONNX Runtime's CUDA provider."""
