"""Files and facts of other machines, as users published them on forums and in repositories.

/etc/nv_tegra_release of an Orin Nano Super with JetPack 7.2.1, an AGX Orin with 6 and a Thor with 7.0, device-tree
models, nvpmodel's files and package versions. Memory sizes are those of the boards, rounded.
"""

from gog_edge.doctor.facts import collect_facts
from gog_edge.errors import BackendError

RELEASE = """# R{linux} (release), REVISION: {revision}, GCID: {gcid}, BOARD: generic, EABI: aarch64, DATE: {date}
# KERNEL_VARIANT: oot
TARGET_USERSPACE_LIB_DIR=nvidia
TARGET_USERSPACE_LIB_DIR_PATH=usr/lib/aarch64-linux-gnu/nvidia
"""
SUPER = """# Copyright (c) NVIDIA CORPORATION. All rights reserved.
< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_0 /sys/devices/system/cpu/cpu0/online
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=25W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=3 NAME=7W >
< PM_CONFIG DEFAULT=0 >
"""
THOR_MODES = "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=120W >\n< POWER_MODEL ID=2 NAME=90W >\n"
PACKAGES = """Package: nvidia-jetpack-runtime
Status: install ok installed
Version: {version}
Architecture: arm64

Package: nvidia-jetpack
Status: {status}
Priority: standard
Section: metapackages
Installed-Size: 194
Maintainer: NVIDIA Corporation
Architecture: arm64
Source: nvidia-jetpack (6.1)
Version: {version}

Package: zlib1g
Status: install ok installed
Version: 1:1.2.11
"""
MEMINFO = "MemTotal:       {total} kB\nMemFree:   191488 kB\nMemAvailable:   {free} kB\nBuffers:    86452 kB\n"


def write_files(root, files):
    """Write files below a root: path -> text."""
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def orin_nano(root):
    """Orin Nano Super, 8 GB, JetPack 7.2.1, in a slower power mode."""
    release = RELEASE.format(linux=39, revision="2.1", gcid=46758480, date="Fri Aug  7 05:54:22 AM UTC 2026")
    return _jetson(root, "Orin Nano Engineering Reference Developer Kit Super", "24.04.4", release,
                   (SUPER, "pmode:0000"), ("7.2.1-b49", "install ok installed"), (7802880, 4910080))  # fmt: skip


def agx_orin(root):
    """AGX Orin, 64 GB, JetPack 6.1."""
    release = RELEASE.format(linux=36, revision="4.0", gcid=37537400, date="Fri Sep 13 04:36:44 UTC 2024")
    modes = "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=MODE_15W >\n"
    return _jetson(root, "AGX Orin Developer Kit", "22.04.5", release, (modes, "pmode:0000 fmode:fan_mode_quiet\n"),
                   ("6.1+b123", "install ok installed"), (64348160, 60000000))  # fmt: skip


def thor(root):
    """AGX Thor, 128 GB, JetPack 7.0, whose packages were removed."""
    release = RELEASE.format(linux=38, revision="2.2", gcid=42205042, date="Thu Sep 25 22:47:11 UTC 2025")
    return _jetson(root, "AGX Thor Developer Kit", "24.04.3", release, (THOR_MODES, "pmode:0001"),
                   ("7.0-b128", "deinstall ok config-files"), (128849018, 120000000))  # fmt: skip


def _jetson(root, model, ubuntu, release, modes, jetpack, memory):
    """`modes`: nvpmodel.conf and its status; `jetpack`: the package's version and status; `memory`: total, free kB."""
    return write_files(root, {
        "etc/os-release": f'PRETTY_NAME="Ubuntu {ubuntu} LTS"\nNAME="Ubuntu"\n',
        "proc/device-tree/model": f"NVIDIA Jetson {model}\0",
        "etc/nv_tegra_release": release,
        "etc/nvpmodel.conf": modes[0], "var/lib/nvpmodel/status": modes[1],
        "var/lib/dpkg/status": PACKAGES.format(version=jetpack[0], status=jetpack[1]),
        "proc/meminfo": MEMINFO.format(total=memory[0], free=memory[1]),
    })  # fmt: skip


def pc(root):
    """A PC."""
    return write_files(root, {"etc/os-release": 'PRETTY_NAME="Ubuntu 24.04.3 LTS"\n',
                      "proc/meminfo": MEMINFO.format(total=32768000, free=28000000)})  # fmt: skip


RTX = {"gpus": [{"name": "NVIDIA GeForce RTX 4070", "sm": 89, "memory": 12878086144, "integrated": False,
                 "free": 11811160064}], "driver": "580.95.05", "cuda": [13, 0], "problem": ""}  # fmt: skip
ORIN = {"gpus": [{"name": "Orin", "sm": 87, "memory": 7990144000, "integrated": True, "free": None}], "driver": "",
        "cuda": [13, 2], "problem": ""}  # fmt: skip
NO_DRIVER = {"gpus": [], "driver": "", "cuda": [0, 0],
             "problem": "no NVIDIA driver is installed: 'libcuda.so.1' cannot be loaded"}  # fmt: skip
CPU = {
    "onnxruntime": {"version": "1.31.1", "providers": ["CPUExecutionProvider"], "problem": ""},
    "faiss": {"version": "1.15.1", "gpu": False, "gpus": 0},
}
CUDA = {
    "onnxruntime": {"version": "1.31.1", "providers": ["CUDAExecutionProvider", "CPUExecutionProvider"], "problem": ""},
    "faiss": {"version": "1.15.1", "gpu": True, "gpus": 1},
    "tensorrt_rtx_bindings": {"version": "1.7.1.116", "sms": [75, 80, 86, 89, 100, 120, 121]},
    "cuda.bindings": {"version": "13.5.0"},
}
JETPACK_7 = {**CPU, "tensorrt": {"version": "10.16.2.10"}, "cuda.bindings": {"version": "13.2.0"}}
OLD_ORT = {**CPU, "onnxruntime": {**CPU["onnxruntime"], "version": "1.23.2"}}
JETPACK_6 = {**OLD_ORT, "tensorrt": {"version": "10.3.0"}, "cuda.bindings": {"version": "12.9.10"}}


def sample_machine(root, gpus, libraries):
    """Return the facts below a root, with the given results of probes."""

    def probe(name):
        if name == "gpus":
            return gpus
        if name not in libraries:
            raise BackendError(f"loading failed, exit code 1: No module named '{name}'")
        return libraries[name]

    return collect_facts(root, probe)
