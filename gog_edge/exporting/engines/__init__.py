"""Build engines from the graphs of a bundle: TensorRT plans and graphs for the CUDA provider."""
