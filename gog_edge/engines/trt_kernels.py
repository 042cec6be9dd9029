"""Kernels that TensorRT for RTX compiles where they run, kept beside the engine for the next start."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from gog_edge.files import write_atomic

_log = logging.getLogger(__name__)


class Kernels:
    """TensorRT for RTX compiles kernels where they run: how, and where they are kept for the next start.

    TensorRT proper has its kernels in the plan: there is nothing of this.
    """

    def __init__(self, trt: Any, engine: Any, path: Path) -> None:
        """`path`: the file they are kept in; one of another GPU, driver or release is not used, and written anew."""
        self._path, self._kept = path, hashlib.sha256().digest()  # of nothing
        first = engine.create_runtime_config()
        self._cache = first.create_runtime_cache()
        self._read()
        # Kernels for one shape are worth their compiling where it comes for ever, in a decode step. Pictures and
        # appended texts have ever other shapes: compiling for each would go on without end, in threads that call our
        # logger while Python may be waiting for them.
        specialised = trt.DynamicShapesKernelSpecializationStrategy
        self._any_shape = self._config(trt, first, specialised.NONE)
        self._one_shape = self._config(trt, engine.create_runtime_config(), specialised.EAGER)

    def _config(self, trt: Any, config: Any, specialisation: Any) -> Any:
        config.set_runtime_cache(self._cache)
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.dynamic_shapes_kernel_specialization_strategy = specialisation
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # we capture copies along with it
        return config

    def config(self, *, one_shape: bool) -> Any:
        """How to open a context; `one_shape`: with kernels made for the one that it will run."""
        return self._one_shape if one_shape else self._any_shape

    def _read(self) -> None:
        try:
            kept = self._path.read_bytes() if self._path.is_file() else b""
        except OSError as exc:
            _log.warning("compiled kernels in '%s' cannot be read (%s): they are compiled again", self._path, exc)
            return
        if kept and self._cache.deserialize(kept):
            self._kept = hashlib.sha256(kept).digest()

    def keep(self) -> None:
        """Write what was compiled since; a folder that cannot be written is logged: every start compiles again.

        All kernels are serialised to see whether there are others: call it where some may have been compiled.
        """
        compiled = bytes(self._cache.serialize())
        digest = hashlib.sha256(compiled).digest()
        if digest == self._kept:
            return
        try:
            self._path.parent.mkdir(exist_ok=True)
            write_atomic(self._path, compiled)
            self._kept = digest
        except OSError as exc:
            _log.warning("compiled kernels cannot be kept in '%s' (%s): every start compiles them", self._path, exc)
