"""Which releases of ONNX Runtime load a policy's graphs."""

from __future__ import annotations

OLDEST = (1, 24)  # the first that takes graphs of opset 24


def newer(python: str) -> str:
    """How to get a newer release with that version of Python."""
    if tuple(int(part) for part in python.split(".")[:2]) < (3, 11):
        return "install gog_edge with Python 3.11 or newer: ONNX Runtime 1.23 is the last for 3.10"
    return "pip install 'gog_edge[cpu]'"


def too_old(version: str) -> str:
    """Why this release loads no policy; "" where it does."""
    if tuple(int(part) for part in version.split(".")[:2]) >= OLDEST:
        return ""
    return f"ONNX Runtime {version} is too old for graphs of opset 24, as policies have: 1.24 began to take them"
