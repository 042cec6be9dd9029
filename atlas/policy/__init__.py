"""Training of the atlas policy, a small model of the Qwen2.5-VL architecture, from random weights."""
