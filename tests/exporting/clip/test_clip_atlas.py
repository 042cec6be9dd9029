"""The shipped encoder was exported from the checkpoint in `atlas/`."""

import json
from pathlib import Path

import numpy as np
import torch

from gog_edge.exporting.clip.checkpoint import load_clip
from gog_edge.exporting.clip.export import tokenize
from gog_edge.files import sha256_of
from gog_edge.retrieval.encoder import Encoder

ROOT = Path(__file__).parents[3]
CHECKPOINT = ROOT / "atlas" / "checkpoints" / "encoder"
SHIPPED = ROOT / "gog_edge" / "data" / "atlas" / "encoder"


def test_the_shipped_encoder_agrees_with_the_checkpoint():
    manifest = json.loads((SHIPPED / "manifest.json").read_text())
    checkpoint = load_clip(str(CHECKPOINT))
    assert manifest["weights_sha256"] == sha256_of(checkpoint.weights)
    assert (manifest["name"], manifest["dim"]) == (checkpoint.name, checkpoint.dim)

    texts = ["the flag of France", "What is the currency of Japan?"]
    tokens = tokenize(checkpoint.tokenizer, texts, checkpoint.context_length, checkpoint.pad_id)
    with torch.inference_mode():
        expected = checkpoint.model.encode_text(torch.from_numpy(tokens), normalize=True).numpy()
    np.testing.assert_allclose(Encoder.open(SHIPPED, threads=1).embed_texts(texts), expected, atol=1e-4)


def test_open_clip_loads_the_checkpoint():
    import open_clip

    model = open_clip.create_model(f"local-dir:{CHECKPOINT}")
    assert model.visual.image_size == 96
