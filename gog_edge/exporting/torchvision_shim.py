"""Import of a torchvision whose compiled operators do not match the installed torch; the export needs none of them."""

from __future__ import annotations

import importlib
import importlib.util

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries: list[torch.library.Library] = []  # operators exist as long as the library object that defined them


def import_torchvision() -> None:
    """Import torchvision; if its compiled operators are missing, declare their schemas first (without kernels).

    Call this before importing models of transformers or open_clip, which import torchvision. Does nothing if
    torchvision is not installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as exc:
        if "torchvision::" not in str(exc):  # expected is "operator torchvision::nms does not exist"
            raise
        missing = [schema for name, schema in _SCHEMAS.items() if not hasattr(torch.ops.torchvision, name)]
        _libraries.append(torch.library.Library("torchvision", "FRAGMENT"))  # type: ignore[no-untyped-call]
        for schema in missing:
            _libraries[-1].define(schema)  # type: ignore[no-untyped-call]
        importlib.import_module("torchvision")
