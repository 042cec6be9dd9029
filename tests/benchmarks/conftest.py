from tiny_policy import checkpoints, policies, tiny_model, wide_checkpoints  # noqa: F401
