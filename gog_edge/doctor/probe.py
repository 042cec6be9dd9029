"""Looks that load a driver or a library of machine code: each in a process of its own, which may crash or hang.

    python -m gog_edge.doctor.probe gpus

The process prints one JSON object as its last line.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gog_edge.doctor.nvidia import list_gpus
from gog_edge.engines.manifest import TENSORRT_RTX
from gog_edge.engines.tensorrt.plan import MODULES, known_sms
from gog_edge.errors import BackendError

SECONDS = 60.0  # for one look; a driver that wakes up a GPU takes some
CUDA_PROVIDER = "CUDAExecutionProvider"
KERNELS = "gog_edge.engines.onnx.native"


def probe(name: str, *, seconds: float = SECONDS, command: Sequence[str] | None = None) -> dict[str, Any]:
    """What a look found. BackendError when its process failed, crashed or took longer than `seconds`.

    `command`: another one to run; the look of that name when None.
    """
    line = command or (sys.executable, "-m", "gog_edge.doctor.probe", name)
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=seconds, check=False, errors="replace")
    except subprocess.TimeoutExpired:
        raise BackendError(f"no answer within {seconds:.0f} s") from None
    except OSError as exc:
        raise BackendError(f"'{line[0]}' cannot be run ({exc.strerror})") from exc
    if done.returncode:
        how = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise BackendError(f"loading it failed, {how}: {_last_line(done.stderr) or 'nothing was said'}")
    try:
        found = json.loads(_last_line(done.stdout))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise BackendError(f"its answer cannot be read: {done.stdout[-200:]!r}")
    return found


def look(name: str) -> dict[str, Any]:
    """What `probe` of that name gives, in this process: one of `LOOKS`, or the name of a module to import."""
    return LOOKS[name]() if name in LOOKS else {"version": str(importlib.import_module(name).__version__)}


def _look_at_onnxruntime() -> dict[str, Any]:
    """Providers are listed as they were compiled in: whether CUDA works is known when a graph was loaded on it."""
    import onnxruntime as ort

    from gog_edge.bundle import DEFAULT_BUNDLE
    from gog_edge.engines.onnx.session import open_session

    providers, trouble = ort.get_available_providers(), ""
    if CUDA_PROVIDER in providers:
        try:
            open_session(DEFAULT_BUNDLE / "encoder" / "text.onnx", providers=(CUDA_PROVIDER,))
        except BackendError as exc:
            trouble = str(exc)
    return {"version": ort.__version__, "providers": providers, "trouble": trouble}


def _look_at_faiss() -> dict[str, Any]:
    import faiss

    return {"version": faiss.__version__, "gpu": hasattr(faiss, "StandardGpuResources"), "gpus": faiss.get_num_gpus()}


def _look_at_rtx() -> dict[str, Any]:
    trt = importlib.import_module(MODULES[TENSORRT_RTX])
    return {"version": str(trt.__version__), "sms": sorted(known_sms(trt))}


def _look_at_kernels() -> dict[str, Any]:
    """Which library of ours ONNX Runtime takes, or why there is none."""
    from gog_edge.engines.onnx.native import library, why_none
    from gog_edge.engines.onnx.native.flavours import processor_flags, runnable

    path = library()
    if path is None:
        return {"trouble": why_none()}
    import onnxruntime as ort

    from gog_edge.engines.onnx.session import RUN_ERRORS

    trouble = ""
    try:
        ort.SessionOptions().register_custom_ops_library(str(path))
    except RUN_ERRORS as exc:
        trouble = str(exc)
    best, *others = runnable(processor_flags())
    taken = next(one for one in (best, *others) if one.file == path.name)
    return {"version": taken.name, "trouble": trouble, "better": best.name if taken != best else ""}


LOOKS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "gpus": lambda: asdict(list_gpus()),
    "onnxruntime": _look_at_onnxruntime,
    "faiss": _look_at_faiss,
    KERNELS: _look_at_kernels,
    MODULES[TENSORRT_RTX]: _look_at_rtx,
}


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def main(argv: Sequence[str]) -> int:
    """Print what the named look finds; 1 where it is not installed."""
    try:
        found = look(argv[0])
    except (ImportError, OSError) as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    sys.stdout.write(json.dumps(found, default=str) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
