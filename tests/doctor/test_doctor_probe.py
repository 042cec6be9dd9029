"""Probes run in processes of their own. For NVIDIA's libraries, small ones with the same function names and signatures
(cuda.h, nvml.h) are compiled and loaded in their place."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gog_edge.doctor.probe import NATIVE_OPERATORS, Gpu, Gpus, list_gpus, run_probe
from gog_edge.engines.onnx.native import library, unavailable_reason
from gog_edge.errors import BackendError

with_compiler = pytest.mark.skipif(not (shutil.which("cc") and sys.platform == "linux"), reason="needs a C compiler")

CUDA = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static const char *names[] = {"NVIDIA RTX A4000", "NVIDIA GeForce RTX 4070"};
static const int majors[] = {8, 8}, minors[] = {6, 9};
int cuInit(unsigned flags) { INIT }
int cuGetErrorString(int code, const char **text) { *text = code == 999 ? "unknown error" : 0; return 0; }
int cuDriverGetVersion(int *version) { *version = 13010; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = 7 + index; return 0; }
int cuDeviceGetName(char *name, int length, int device) { snprintf(name, length, "%s", names[device - 7]); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)(16 - 4 * (device - 7)) << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? majors[device - 7] : attribute == 76 ? minors[device - 7] : 0;
    return 0;
}
int cuDeviceGetPCIBusId(char *text, int length, int device) {
    snprintf(text, length, "0000:%02x:00.0", device);
    return 0;
}
"""
NVML = """
#include <stdio.h>
#include <string.h>
typedef struct { unsigned long long total, free, used; } Memory;
static char handles[2];
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned length) { snprintf(text, length, "590.44.01"); return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *text, void **handle) {
    *handle = &handles[strcmp(text, "0000:08:00.0") == 0];
    return strcmp(text, "0000:07:00.0") && strcmp(text, "0000:08:00.0") ? 6 : 0;
}
int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
    memory->total = 1, memory->free = handle == &handles[1] ? 5ull << 30 : 9ull << 30, memory->used = 2;
    return 0;
}
"""


@pytest.fixture
def probe_gpus(tmp_path):
    """Return a function that runs the GPU probe with these libraries; `init` is the body of cuInit."""

    def run(init, *, nvml=True):
        sources = {"cuda": CUDA.replace("INIT", init), **({"nvidia-ml": NVML} if nvml else {})}
        for name, source in sources.items():
            (tmp_path / f"{name}.c").write_text(source)
            subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", tmp_path / f"lib{name}.so.1", tmp_path / f"{name}.c"],
                           check=True)  # fmt: skip
        line = ("env", f"LD_LIBRARY_PATH={tmp_path}", sys.executable, "-m", "gog_edge.doctor.probe", "gpus")
        return Gpus.from_json(run_probe("gpus", command=line))

    return run


@pytest.mark.parametrize(("code", "message"), [
    ("import os; os.kill(os.getpid(), 11)", "terminated by signal 11"),
    ("import sys; sys.stderr.write('libfoo.so.3: cannot open\\n'); sys.exit(1)", "exit code 1: libfoo.so.3"),
    ("print('[1, 2]')", "is not a JSON object"),
    ("pass", "is not a JSON object"),
    ("import time; time.sleep(60)", "no result within 1 s"),
])  # fmt: skip
def test_failures_of_a_probe(code, message):
    with pytest.raises(BackendError, match=message):
        run_probe("it", timeout=1, command=(sys.executable, "-c", code))


def test_a_probe_that_cannot_be_started():
    with pytest.raises(BackendError, match="cannot be run"):
        run_probe("it", command=("/nowhere/python",))
    with pytest.raises(BackendError, match="No module named 'nowhere'"):
        run_probe("nowhere")


def test_output_before_the_result_is_ignored():
    code = "print('hello'); print('{\"version\": \"1\"}')"
    assert run_probe("it", command=(sys.executable, "-c", code)) == {"version": "1"}


@pytest.mark.skipif(bool(list_gpus().gpus), reason="this machine has a GPU")
def test_a_machine_without_a_driver():
    assert "driver" in list_gpus().problem
    assert Gpus.from_json(run_probe("gpus")) == list_gpus()


@with_compiler
def test_gpus_with_their_free_memory(probe_gpus):
    first = Gpu("NVIDIA RTX A4000", 86, 16 << 30, False, 9 << 30)
    second = Gpu("NVIDIA GeForce RTX 4070", 89, 12 << 30, False, 5 << 30)
    assert probe_gpus("return 0;") == Gpus((first, second), "590.44.01", (13, 1))


@with_compiler
@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="the real NVML would be loaded")
def test_gpus_without_nvml(probe_gpus):
    found = probe_gpus("return 0;", nvml=False)
    assert found.driver == "" and [gpu.free for gpu in found.gpus] == [None, None] and found.cuda == (13, 1)


@with_compiler
@pytest.mark.parametrize(("init", "message"), [
    ("return 100;", "detects no GPU"), ("return 999;", "cannot be initialized: unknown error"),
    ("return 3;", "cannot be initialized: error 3"),
])  # fmt: skip
def test_a_driver_that_cannot_be_initialized(probe_gpus, init, message):
    found = probe_gpus(init)
    assert not found.gpus and message in found.problem


@with_compiler
def test_a_driver_that_aborts_the_process(probe_gpus):
    with pytest.raises(BackendError, match="terminated by signal 6"):
        probe_gpus("abort();")


def test_native_operators_are_loaded_in_the_probe():
    found, path = run_probe(NATIVE_OPERATORS), library()
    if path is None:
        assert found == {"problem": unavailable_reason()}
    else:
        assert path.name == f"operators-{found['version']}.so" and not found["problem"] and not found["better"]


def test_tensorrt_for_rtx_lists_the_gpus_it_builds_for():
    pytest.importorskip("tensorrt_rtx_bindings")
    assert {75, 86, 120} <= set(run_probe("tensorrt_rtx_bindings")["sms"])
