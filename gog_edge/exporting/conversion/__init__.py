"""Convert exported graphs for TensorRT and for the CUDA provider of ONNX Runtime."""
