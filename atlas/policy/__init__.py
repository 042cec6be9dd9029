"""Training of the atlas policy: a tiny model in the Qwen2.5-VL configuration, taught from nothing."""
