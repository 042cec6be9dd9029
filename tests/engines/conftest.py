from tiny_policy import (  # noqa: F401
    checkpoints,
    native_policies,
    policies,
    qwen3_checkpoints,
    qwen3_policy,
    tiny_model,
    wide_checkpoints,
)
from trt_world import host_gpu, lifted, world  # noqa: F401
