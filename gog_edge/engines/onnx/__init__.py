"""ONNX Runtime: sessions, decoders that update their KV cache in place, prepacked weights, native operators.

This module does not import onnxruntime, so that `gog-edge doctor` can report that it is missing or too old.
"""

from __future__ import annotations

MIN_VERSION = (1, 24)  # the first release of ONNX Runtime that loads graphs of opset 24
INSTALL_COMMAND = "pip install 'gog_edge[cpu]'"


def unsupported_reason(version: str) -> str:
    """Return why this release of ONNX Runtime cannot load a policy's graphs; "" if it can."""
    if tuple(int(part) for part in version.split(".")[:2]) >= MIN_VERSION:
        return ""
    minimum = ".".join(map(str, MIN_VERSION))
    return f"ONNX Runtime {version} is too old: policy graphs use opset 24, which requires {minimum} or later"
