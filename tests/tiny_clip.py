"""Write open_clip checkpoints of two layers with random weights, for any model type of open_clip."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gog_edge.exporting.torchvision_shim import import_torchvision

VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


def write_tiny_clip(
    folder: Path, vision: dict = VISION, text: dict = TEXT, *, custom: bool = False,
    change: Callable[[Any], None] = lambda model: None, **more: Any,
) -> Any:
    """Write the folder and return the model; `change` may modify its weights before."""
    import_torchvision()
    from open_clip.model import CLIP, CustomTextCLIP

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text} | more
    config = {"model_cfg": settings | ({"custom_text": True} if custom else {}), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = (CustomTextCLIP if custom else CLIP)(**settings).eval()
    for name, value in model.named_parameters():
        if value.ndim == 1 and "logit" not in name:  # norms and biases at their initial values would hide errors
            value.data += 0.1 * torch.randn_like(value)
    change(model)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model
