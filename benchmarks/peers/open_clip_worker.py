"""open_clip, eager, in float32: `python open_clip_worker.py MODEL WEIGHTS THREADS`, JSON lines.

MODEL is a name, with random weights that are written to WEIGHTS if that file does not exist; or it is the folder of a
checkpoint, with its own weights. Self-contained: the Python that runs it need not have gog_edge.
"""

import json
import logging
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

with suppress(ImportError):  # works around a torchvision that does not match torch
    from gog_edge.exporting.torchvision_shim import import_torchvision

    import_torchvision()

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file


def load(name: str, weights: Path) -> Any:
    """Load the model in evaluation mode."""
    if Path(name).is_dir():
        return open_clip.create_model(f"local-dir:{name}").eval()
    logging.disable(logging.WARNING)  # "no pretrained weights"
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    if weights.exists():
        model.load_state_dict(load_file(weights))
    else:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, weights)
    return model.eval()


class EagerClip:
    """The image tower and its preprocessing, timed."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)

    @torch.inference_mode()
    def embed(self, count: int) -> float:
        """Return the seconds for a batch of random pictures."""
        size = self.model.visual.image_size
        batch = torch.randn(count, 3, *(size if isinstance(size, tuple) else (size, size)))
        started = time.perf_counter()
        self.model.encode_image(batch, normalize=True)
        return time.perf_counter() - started

    def preprocess(self, count: int, width: int, height: int) -> float:
        """Return the seconds to preprocess `count` decoded random pictures."""
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        started = time.perf_counter()
        torch.stack([self.transform(Image.fromarray(pixels)) for _ in range(count)])
        return time.perf_counter() - started


def main() -> None:
    """Answer requests until the input ends."""
    name, weights, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    eager = EagerClip(load(name, Path(weights)))
    eager.embed(1)
    about = f"open_clip {open_clip.__version__}, torch {torch.__version__}, eager, float32, inference_mode"
    print(json.dumps({"about": about}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        work = eager.preprocess if request.pop("what") == "preprocess" else eager.embed
        print(json.dumps({"seconds": work(**request)}), flush=True)


if __name__ == "__main__":
    main()
