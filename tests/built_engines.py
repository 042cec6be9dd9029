"""Bundles with engines that were really built, small enough to be built by a test; conftest files import them."""

import shutil
from pathlib import Path

import pytest

from gog_edge.bundle import DEFAULT_BUNDLE, Bundle, open_bundle
from gog_edge.engines.manifest import ORT_CUDA
from gog_edge.engines.onnx import device_decoder as ort_cuda
from gog_edge.engines.onnx.decoder import Device
from gog_edge.engines.onnx.session import CPU

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
    """The atlas's policy and samples with a toy encoder and pack."""
    for name, source in {"policy": DEFAULT_BUNDLE / "policy", "samples": DEFAULT_BUNDLE / "samples",
                         "encoder": encoder, "pack": pack}.items():
        shutil.copytree(source, root / name)
    (root / "bundle.toml").write_text(TOML)
    return open_bundle(root)


def build(bundle: Bundle, engine: str = ORT_CUDA, **options) -> Path:
    """Build a bundle's engines where a server looks for them."""
    from gog_edge.exporting.engines.builder import build_engines

    out = bundle.root / "engines" / engine
    build_engines(bundle, out, engine=engine, parity=False, **options)
    return out


@pytest.fixture
def toy(tmp_path, tiny_encoder_folder, little_pack_folder) -> Bundle:
    """A toy bundle of the test's own, without engines."""
    return write_toy_bundle(tmp_path / "toy", tiny_encoder_folder, little_pack_folder)


@pytest.fixture
def cuda_on_processor(monkeypatch):
    """Engines for "ort-cuda" run on the processor: the same graphs and the same code, for want of a GPU."""
    monkeypatch.setattr(ort_cuda, "CUDA", CPU)
    monkeypatch.setattr(ort_cuda, "CUDA_DEVICE", Device("cpu"))
