"""Which compiled library of native operators is chosen for a processor."""

import pytest

from gog_edge.engines.onnx import native
from gog_edge.engines.onnx.native import VARIANTS


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty folder in the place of the libraries'."""
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


@pytest.mark.parametrize("best", range(len(VARIANTS)))
def test_the_fastest_supported_library_is_chosen(folder, monkeypatch, best):
    monkeypatch.setattr(native, "processor_flags", lambda: VARIANTS[best].needs | VARIANTS[-1].needs)
    for variant in VARIANTS[: best + 1]:
        (folder / variant.file).write_bytes(b"")
    assert native.library() == folder / VARIANTS[best].file
    native.library.cache_clear()
    (folder / VARIANTS[best].file).unlink()
    assert native.library() is None
    (folder / VARIANTS[-1].file).write_bytes(b"")
    native.library.cache_clear()
    assert native.library() == folder / VARIANTS[-1].file


def test_unavailable_reason_contains_a_remedy(folder, monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr(native, "processor_flags", lambda: VARIANTS[-1].needs)
    assert native.library() is None and "(apt install g++)" in native.unavailable_reason()
    monkeypatch.setattr(native, "processor_flags", lambda: frozenset({"neon"}))
    assert "require Linux on x86-64 with abm avx2" in native.unavailable_reason()
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert "require Linux on x86-64" in native.unavailable_reason()
