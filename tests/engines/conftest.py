from tiny_policy import checkpoints, policies, qwen3_checkpoints, qwen3_policy, tiny_model  # noqa: F401
from trt_world import host_gpu, lifted, world  # noqa: F401
