"""Export of a Qwen2.5-VL or Qwen3-VL checkpoint to ONNX graphs, and its parity check against transformers."""
