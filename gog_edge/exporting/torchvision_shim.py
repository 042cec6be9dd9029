"""Lets a torchvision whose binary does not fit the installed torch be imported: its Python parts are enough here."""

from __future__ import annotations

import importlib
import importlib.util

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: list[torch.library.Library] = []  # operators live as long as the library object that defined them


def import_torchvision() -> None:
    """Import torchvision; where its binary fails, declare the operators it lacks first (they cannot be run).

    Call before importing transformers' models or open_clip, which import torchvision themselves. Does nothing where
    there is no torchvision.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as exc:
        if "torchvision::" not in str(exc):  # "operator torchvision::nms does not exist"; anything else is its own
            raise
        missing = [schema for name, schema in _SCHEMAS.items() if not hasattr(torch.ops.torchvision, name)]
        _library.append(torch.library.Library("torchvision", "FRAGMENT"))  # type: ignore[no-untyped-call]
        for schema in missing:
            _library[-1].define(schema)  # type: ignore[no-untyped-call]
        importlib.import_module("torchvision")
