"""Adapters of tiny checkpoints, written by PEFT itself, and the weights of PEFT's own merge."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gog_edge.exporting.torchvision_shim import import_torchvision

import_torchvision()
import torch  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

RANK, ALPHA = 4, 6


@contextmanager
def quiet():
    """Ignore the warnings of PEFT and transformers about what a test does on purpose."""
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load_base(folder: Path) -> Any:
    """Return the model of a checkpoint folder in transformers, in fp32."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()


def write_peft_adapter(folder: Path, base: Path, *, seed: int = 0, convert: Path | None = None, **config: Any) -> Path:
    """Write an adapter whose parameters differ from their initial values, as training would leave them.

    `convert`: a folder for the initial adapter, from which PEFT converts the saved one to plain LoRA.
    """
    with quiet():
        settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "down_proj"]} | config
        model = get_peft_model(load_base(base), LoraConfig(**settings))
        if convert is not None:
            own = model.peft_config["default"]
            init, own.init_lora_weights = own.init_lora_weights, True
            model.save_pretrained(convert)
            own.init_lora_weights = init
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        extra = {} if convert is None else {"path_initial_model_for_weight_conversion": str(convert)}
        model.save_pretrained(folder, **extra)
    return folder


def peft_model(base: Path, adapter: Path) -> PeftModel:
    """Return PEFT's unmerged model."""
    with quiet():
        return PeftModel.from_pretrained(load_base(base), str(adapter), torch_device="cpu").eval()


def merged_by_peft(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    """Return the weights of PEFT's merge by name within the model; a head that PEFT changes is stored separately."""
    applied = peft_model(base, adapter)
    inner = applied.base_model.model
    embeddings = next(module for name, module in inner.named_modules()
                      if isinstance(module, torch.nn.Embedding) and module.weight.shape[0] > 300)
    for module in inner.modules():  # else PEFT merges a change of the head into the embeddings, too
        if isinstance(module, torch.nn.Linear) and module.weight is embeddings.weight:
            module.weight = torch.nn.Parameter(module.weight.detach().clone())
    with quiet():
        merged = applied.merge_and_unload()
    return {name.removeprefix("model."): value.detach().numpy() for name, value in merged.state_dict().items()}
