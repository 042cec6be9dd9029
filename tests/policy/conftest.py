from tiny_policy import checkpoints, policies, qwen3_checkpoints, qwen3_policy, tiny_model  # noqa: F401
