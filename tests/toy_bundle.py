"""A bundle so small that tests can build engines from it."""

import shutil
from pathlib import Path

import pytest

from gog_edge.bundle import DEFAULT_BUNDLE, Bundle, open_bundle
from gog_edge.engines.manifest import ORT_CUDA
from gog_edge.engines.onnx import device_decoder
from gog_edge.engines.onnx.decoder import Device
from gog_edge.engines.onnx.session import CPU_PROVIDERS

TOML = """schema = 1
name = "toy"
[policy]
path = "policy"
[encoder]
path = "encoder"
[[packs]]
path = "pack"
[samples]
path = "samples"
"""


def write_toy_bundle(root: Path, encoder: Path, pack: Path) -> Bundle:
    """Write a bundle with the atlas's policy and samples and a toy encoder and pack."""
    for name, source in {"policy": DEFAULT_BUNDLE / "policy", "samples": DEFAULT_BUNDLE / "samples",
                         "encoder": encoder, "pack": pack}.items():
        shutil.copytree(source, root / name)
    (root / "bundle.toml").write_text(TOML)
    return open_bundle(root)


def build(bundle: Bundle, engine: str = ORT_CUDA, **options) -> Path:
    """Build a bundle's engines in its own folder for them, which is returned."""
    from gog_edge.exporting.engines.builder import build_engines

    out = bundle.root / "engines" / engine
    build_engines(bundle, out, engine=engine, parity=False, **options)
    return out


@pytest.fixture
def toy(tmp_path, tiny_encoder_folder, little_pack_folder) -> Bundle:
    """A new toy bundle without engines."""
    return write_toy_bundle(tmp_path / "toy", tiny_encoder_folder, little_pack_folder)


@pytest.fixture
def cuda_on_cpu(monkeypatch):
    """Run "ort-cuda" engines on the CPU: the same graphs and code, without a GPU."""
    monkeypatch.setattr(device_decoder, "CUDA_PROVIDERS", CPU_PROVIDERS)
    monkeypatch.setattr(device_decoder, "CUDA_DEVICE", Device("cpu"))
