"""TensorRT and TensorRT for RTX: load built engines and run them on an NVIDIA GPU."""
