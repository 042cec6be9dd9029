"""Which releases of ONNX Runtime load a policy's graphs."""

from __future__ import annotations

OLDEST = (1, 24)  # the first that takes graphs of opset 24
NEWER = "pip install 'gog_edge[cpu]'"  # how to get one


def too_old(version: str) -> str:
    """Why this release loads no policy; "" where it does."""
    if tuple(int(part) for part in version.split(".")[:2]) >= OLDEST:
        return ""
    return f"ONNX Runtime {version} is too old for graphs of opset 24, as policies have: 1.24 began to take them"
