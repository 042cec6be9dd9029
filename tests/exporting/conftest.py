from tiny_policy import (  # noqa: F401
    checkpoints,
    native_policies,
    policies,
    qwen3_checkpoints,
    qwen3_policy,
    tiny_model,
    wide_checkpoints,
)
