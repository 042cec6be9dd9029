"""Files and facts of boxes that stand elsewhere, in the form in which they were published.

/etc/nv_tegra_release of an Orin Nano Super with JetPack 7.2.1, an AGX Orin with 6 and a Thor with 7.0, device-tree
models, nvpmodel's files and package versions: from users' reports on public forums and repositories. Amounts of memory
are those boards', rounded.
"""

from gog_edge.doctor.box import look_at_box
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


def lay(root, files):
    """Write files below a root: path -> text."""
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def orin_nano(root):
    """Orin Nano Super, 8 GB, JetPack 7.2.1, in its slower mode."""
    return lay(root, {
        "etc/os-release": 'PRETTY_NAME="Ubuntu 24.04.4 LTS"\nNAME="Ubuntu"\n',
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
        "etc/nv_tegra_release": RELEASE.format(linux=39, revision="2.1", gcid=46758480,
                                               date="Fri Aug  7 05:54:22 AM UTC 2026"),
        "etc/nvpmodel.conf": SUPER, "var/lib/nvpmodel/status": "pmode:0000",
        "var/lib/dpkg/status": PACKAGES.format(version="7.2.1-b49", status="install ok installed"),
        "proc/meminfo": MEMINFO.format(total=7802880, free=4910080),
    })  # fmt: skip


def agx_orin(root):
    """AGX Orin, 64 GB, JetPack 6.1."""
    return lay(root, {
        "etc/os-release": 'PRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
        "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
        "etc/nv_tegra_release": RELEASE.format(linux=36, revision="4.0", gcid=37537400,
                                               date="Fri Sep 13 04:36:44 UTC 2024"),
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=MODE_15W >\n",
        "var/lib/nvpmodel/status": "pmode:0000 fmode:fan_mode_quiet\n",
        "var/lib/dpkg/status": PACKAGES.format(version="6.1+b123", status="install ok installed"),
        "proc/meminfo": MEMINFO.format(total=64348160, free=60000000),
    })  # fmt: skip


def thor(root):
    """AGX Thor, 128 GB, JetPack 7.0, which was not installed whole."""
    return lay(root, {
        "etc/os-release": 'PRETTY_NAME="Ubuntu 24.04.3 LTS"\n',
        "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
        "etc/nv_tegra_release": RELEASE.format(linux=38, revision="2.2", gcid=42205042,
                                               date="Thu Sep 25 22:47:11 UTC 2025"),
        "etc/nvpmodel.conf": THOR_MODES, "var/lib/nvpmodel/status": "pmode:0001",
        "var/lib/dpkg/status": PACKAGES.format(version="7.0-b128", status="deinstall ok config-files"),
        "proc/meminfo": MEMINFO.format(total=128849018, free=120000000),
    })  # fmt: skip


def pc(root):
    """A PC."""
    return lay(root, {"etc/os-release": 'PRETTY_NAME="Ubuntu 24.04.3 LTS"\n',
                      "proc/meminfo": MEMINFO.format(total=32768000, free=28000000)})  # fmt: skip


RTX = {"gpus": [{"name": "NVIDIA GeForce RTX 4070", "sm": 89, "memory": 12878086144, "integrated": False,
                 "free": 11811160064}], "driver": "580.95.05", "cuda": [13, 0], "trouble": ""}  # fmt: skip
ORIN = {"gpus": [{"name": "Orin", "sm": 87, "memory": 7990144000, "integrated": True, "free": None}], "driver": "",
        "cuda": [13, 2], "trouble": ""}  # fmt: skip
NO_DRIVER = {"gpus": [], "driver": "", "cuda": [0, 0],
             "trouble": "there is no NVIDIA driver: 'libcuda.so.1' cannot be loaded"}  # fmt: skip
CPU = {
    "onnxruntime": {"version": "1.31.1", "providers": ["CPUExecutionProvider"], "trouble": ""},
    "faiss": {"version": "1.15.1", "gpu": False, "gpus": 0},
}
CUDA = {
    "onnxruntime": {"version": "1.31.1", "providers": ["CUDAExecutionProvider", "CPUExecutionProvider"], "trouble": ""},
    "faiss": {"version": "1.15.1", "gpu": True, "gpus": 1},
    "tensorrt_rtx_bindings": {"version": "1.7.1.116", "sms": [75, 80, 86, 89, 100, 120, 121]},
    "cuda.bindings": {"version": "13.5.0"},
}
JETPACK_7 = {**CPU, "tensorrt": {"version": "10.16.2.10"}, "cuda.bindings": {"version": "13.2.0"}}


def box_of(root, gpus, libraries):
    """What is found below a root, with what another box's probes said."""

    def look(name):
        if name == "gpus":
            return gpus
        if name not in libraries:
            raise BackendError(f"loading it failed, exit code 1: No module named '{name}'")
        return libraries[name]

    return look_at_box(root, look)
