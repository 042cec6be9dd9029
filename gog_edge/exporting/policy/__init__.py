"""Export a Qwen2.5-VL or Qwen3-VL checkpoint to ONNX graphs and prove parity with transformers."""
