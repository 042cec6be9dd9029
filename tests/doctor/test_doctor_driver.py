"""NVIDIA's libraries as they are called: small ones of the same names and signatures (cuda.h, nvml.h) are loaded in
their place, in the process that asks the driver."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gog_edge.doctor.nvidia import Gpu, Gpus
from gog_edge.doctor.probe import probe
from gog_edge.errors import BackendError

pytestmark = pytest.mark.skipif(not (shutil.which("cc") and sys.platform == "linux"), reason="needs a C compiler")

CUDA = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static const char *names[] = {"NVIDIA RTX A4000", "NVIDIA GeForce RTX 4070"};
static const int majors[] = {8, 8}, minors[] = {6, 9};
int cuInit(unsigned flags) { BEGIN }
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
def ask(tmp_path):
    """Gives what the look at the GPUs answers with these libraries in place of the driver's."""

    def answer(begin, *, nvml=True):
        sources = {"cuda": CUDA.replace("BEGIN", begin), **({"nvidia-ml": NVML} if nvml else {})}
        for name, source in sources.items():
            (tmp_path / f"{name}.c").write_text(source)
            subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", tmp_path / f"lib{name}.so.1", tmp_path / f"{name}.c"],
                           check=True)  # fmt: skip
        line = ("env", f"LD_LIBRARY_PATH={tmp_path}", sys.executable, "-m", "gog_edge.doctor.probe", "gpus")
        return Gpus.from_json(probe("gpus", command=line))

    return answer


def test_gpus_are_told_with_what_nvml_says_of_each(ask):
    first = Gpu("NVIDIA RTX A4000", 86, 16 << 30, False, 9 << 30)
    second = Gpu("NVIDIA GeForce RTX 4070", 89, 12 << 30, False, 5 << 30)
    assert ask("return 0;") == Gpus((first, second), "590.44.01", (13, 1))


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="the true NVML is here")
def test_gpus_without_nvml(ask):
    found = ask("return 0;", nvml=False)
    assert found.driver == "" and [gpu.free for gpu in found.gpus] == [None, None] and found.cuda == (13, 1)


@pytest.mark.parametrize(("begin", "said"), [
    ("return 100;", "sees no GPU"), ("return 999;", "does not start: unknown error"),
    ("return 3;", "does not start: error 3"),
])  # fmt: skip
def test_a_driver_that_does_not_start(ask, begin, said):
    found = ask(begin)
    assert not found.gpus and said in found.trouble


def test_a_driver_that_ends_the_process(ask):
    with pytest.raises(BackendError, match="ended by signal 6"):
        ask("abort();")
