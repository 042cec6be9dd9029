"""ONNX Runtime: sessions, decoders that update their KV cache in place, prepacked weights, native operators."""
