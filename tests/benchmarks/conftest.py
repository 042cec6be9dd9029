from tiny_policy import checkpoints, policies, tiny_model  # noqa: F401
