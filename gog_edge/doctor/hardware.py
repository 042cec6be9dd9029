"""Checks of the machine, its GPUs and its libraries."""

from __future__ import annotations

from collections.abc import Iterator

from gog_edge.doctor.facts import CUDA_BINDINGS, FAISS, JETPACK_6_LINUX, ONNXRUNTIME, Jetson, Machine
from gog_edge.doctor.finding import Finding, State
from gog_edge.doctor.probe import CUDA_PROVIDER, NATIVE_OPERATORS, Gpu
from gog_edge.engines.cuda import INSTALL as INSTALL_BINDINGS
from gog_edge.engines.manifest import (
    BUILT_ENGINES,
    ENGINES,
    ORT_CUDA,
    TENSORRT,
    TENSORRT_ENGINES,
    TENSORRT_RTX,
)
from gog_edge.engines.onnx import INSTALL_COMMAND
from gog_edge.engines.registry import CPU_SEARCH, FAISS_GPU, FAISS_GPU_INSTALL
from gog_edge.engines.tensorrt.plan import MODULES, NO_INT4_SM
from gog_edge.planner import format_size

OK, MISSING, WRONG = State.OK, State.MISSING, State.WRONG
X86_64 = "x86_64"
RTX_MIN_SM = 75  # the oldest compute capability that TensorRT for RTX supports
RTX_CUDA = (13, 0)  # the CUDA release of its wheels, which NVIDIA's driver supports from 580 on
NEW_DRIVER = "install NVIDIA's driver 580 or later: sudo apt install nvidia-driver-580-open (Ubuntu), then restart"
JETPACK = "sudo apt install nvidia-jetpack"
FLASH = "flash JetPack 7.2 with NVIDIA's SDK Manager; see jetson/README.md"
NOT_JETPACK_6 = "JetPack 6 is not supported; install JetPack 7.2, which supports Orin"
INSTALL_TENSORRT = "pip install 'gog_edge[tensorrt]'"
INSTALL_RTX = "pip install 'gog_edge[tensorrt-rtx]'"
USE_ORT_CUDA = f"use --engine {ORT_CUDA}"
USE_TENSORRT = f"use --engine {TENSORRT} on a Jetson"
USE_CPU_SEARCH = f"use --search {CPU_SEARCH}"
REINSTALL_OPERATORS = (
    "remove gog_edge/engines/onnx/native/*.so from the folder that gog_edge is installed in, and install it again"
)


def check_machine(machine: Machine) -> Iterator[Finding]:
    """Check system, Python and memory; on a Jetson also its releases and power mode."""
    yield Finding("box", "system", OK, f"{machine.system}, {machine.architecture}")
    yield Finding("box", "Python", OK, machine.python)
    memory = "memory unknown" if machine.memory is None else format_size(machine.memory)
    free = "" if machine.free is None else f", {format_size(machine.free)} free"
    yield Finding("box", "processor, memory", OK, f"{machine.cores} cores, {memory}{free}")
    if machine.jetson is not None:
        model = machine.jetson.model or "unknown board"
        yield Finding("box", "Jetson", OK, f"{model}; the GPU shares the host's memory")
        yield _check_jetpack(machine.jetson)
        yield _check_power_mode(machine.jetson)


def _check_jetpack(jetson: Jetson) -> Finding:
    detail = f"{jetson.jetpack or 'unknown'} (Jetson Linux {jetson.release or 'unknown'})"
    if jetson.supported:
        return Finding("box", "JetPack", OK, detail, "", BUILT_ENGINES)
    return Finding("box", "JetPack", WRONG, detail, _flash_remedy(jetson), BUILT_ENGINES)


def _flash_remedy(jetson: Jetson) -> str:
    return NOT_JETPACK_6 if jetson.linux[:1] == (JETPACK_6_LINUX,) else FLASH


def _check_power_mode(jetson: Jetson) -> Finding:
    """Report the power mode. A slower one is OK, with the command for the fastest."""
    if jetson.power is None:
        return Finding("box", "power mode", MISSING, "nvpmodel has stored none", "sudo nvpmodel -q")
    detail = jetson.power.name or f"number {jetson.power.number}"
    faster = jetson.fastest if jetson.fastest not in (None, jetson.power) else None
    remedy = f"sudo nvpmodel -m {faster.number}  # {faster.name}, the fastest" if faster else ""
    return Finding("box", "power mode", OK, detail, remedy)


def check_gpus(machine: Machine, search: str = CPU_SEARCH) -> Iterator[Finding]:
    """Check the driver and list the GPUs. The first GPU is the one that engines use."""
    users = BUILT_ENGINES if search == CPU_SEARCH else ENGINES
    found = machine.gpus
    if not found.gpus:
        remedy = JETPACK if machine.jetson else NEW_DRIVER
        yield Finding("gpu", "GPU", MISSING, found.problem or "none detected", remedy, users)
        return
    detail = f"{found.driver or 'version unknown'}, supports CUDA {'.'.join(map(str, found.cuda))}"
    old = found.cuda < RTX_CUDA and not machine.jetson
    yield Finding("gpu", "driver", WRONG if old else OK, detail, NEW_DRIVER if old else "", (TENSORRT_RTX,))
    for index, gpu in enumerate(found.gpus):
        yield Finding("gpu", f"GPU {index}", OK, _describe(gpu))
    problem = rtx_problem(machine)
    if problem:
        remedy = USE_TENSORRT if machine.jetson else USE_ORT_CUDA
        yield Finding("gpu", "TensorRT for RTX", WRONG, problem, remedy, (TENSORRT_RTX,))


def rtx_problem(machine: Machine, *, int4: bool = False) -> str:
    """Return why TensorRT for RTX cannot build engines for the first GPU, or none with int4 weights; "" if it can."""
    if not machine.gpus.gpus:
        return ""
    sm, library = machine.gpus.gpus[0].sm, machine.libraries[MODULES[TENSORRT_RTX]]
    if sm < RTX_MIN_SM:
        return f"SM {sm} is not supported; {RTX_MIN_SM} or later is required"
    if library.sms and sm not in library.sms:
        return f"{library.version} cannot build engines for SM {sm}"
    return f"int4 engines cannot be built for SM {sm}" if int4 and sm == NO_INT4_SM else ""


def _describe(gpu: Gpu) -> str:
    memory = "shares the host's memory" if gpu.integrated else format_size(gpu.memory)
    free = "" if gpu.free is None or gpu.integrated else f", {format_size(gpu.free)} free"
    return f"{gpu.name}, SM {gpu.sm}, {memory}{free}"


def check_libraries(machine: Machine, search: str = CPU_SEARCH) -> Iterator[Finding]:
    """Check ONNX Runtime and faiss, which all engines need, and the libraries that run on GPUs."""
    yield from _check_onnxruntime(machine)
    yield from _check_native_operators(machine)
    yield from _check_faiss(machine, search)
    for engine in TENSORRT_ENGINES:
        yield _check_library(machine, MODULES[engine], engine, _tensorrt_remedy(machine, engine), (engine,))
    supported = machine.jetson is None or machine.jetson.supported
    remedy = INSTALL_BINDINGS if supported or machine.jetson is None else _flash_remedy(machine.jetson)
    yield _check_library(machine, CUDA_BINDINGS, "cuda-bindings", remedy, TENSORRT_ENGINES)


def _check_library(machine: Machine, module: str, name: str, remedy: str, needed_by: tuple[str, ...]) -> Finding:
    library = machine.libraries[module]
    if library.version:
        return Finding("software", name, OK, library.version, "", needed_by)
    absent = "No module named" in library.problem
    detail = f"'{module}' is not installed" if absent else library.problem
    return Finding("software", name, MISSING if absent else WRONG, detail, remedy, needed_by)


def _check_onnxruntime(machine: Machine) -> Iterator[Finding]:
    library = machine.libraries[ONNXRUNTIME]
    yield _check_library(machine, ONNXRUNTIME, "ONNX Runtime", INSTALL_COMMAND, ENGINES)
    remedy = ("pip uninstall onnxruntime && pip install 'gog_edge[gpu]'" if machine.jetson is None else
              f"use --engine {TENSORRT}: no package index offers ONNX Runtime with CUDA for Jetson")  # fmt: skip
    name = "CUDA provider of ONNX Runtime"
    if CUDA_PROVIDER not in library.providers:
        yield Finding("software", name, MISSING, "not included in this build", remedy, (ORT_CUDA,))
    elif library.problem:
        yield Finding("software", name, WRONG, library.problem, NEW_DRIVER, (ORT_CUDA,))
    else:
        yield Finding("software", name, OK, "loads a graph", "", (ORT_CUDA,))


def _check_native_operators(machine: Machine) -> Iterator[Finding]:
    """Check the native operators, without which policies run more slowly. They need ONNX Runtime and x86-64."""
    library, name = machine.libraries[NATIVE_OPERATORS], "native operators"
    if not machine.libraries[ONNXRUNTIME].version or machine.jetson is not None or machine.architecture != X86_64:
        return
    if not library.version:
        detail, _, remedy = library.problem.partition("; ")
        yield Finding("software", name, MISSING, detail, remedy or REINSTALL_OPERATORS)
    elif library.problem:
        yield Finding("software", name, WRONG, library.problem, REINSTALL_OPERATORS)
    elif library.better:
        detail = f"{library.version}; this processor supports {library.better}, which was not compiled"
        yield Finding("software", name, WRONG, detail, "install a newer C++ compiler and install gog_edge again")
    else:
        yield Finding("software", name, OK, library.version)


def _check_faiss(machine: Machine, search: str) -> Iterator[Finding]:
    """Check faiss, which all engines need, and its GPU support, which is needed only if it was requested."""
    library, requested = machine.libraries[FAISS], search == FAISS_GPU
    users = ENGINES if requested else ()
    yield _check_library(machine, FAISS, "faiss", INSTALL_COMMAND, ENGINES)
    if not library.version:
        return
    name = "faiss on the GPU"
    if library.gpu:
        detail = f"detects {library.gpus} GPU" + "s" * (library.gpus != 1)
        undetected = not library.gpus and bool(machine.gpus.gpus)
        yield Finding("software", name, OK if library.gpus else MISSING, detail, NEW_DRIVER * undetected, users)
    elif machine.jetson is not None or machine.architecture != X86_64:
        detail = "no wheel for this processor; packs are searched on the CPU"
        yield Finding("software", name, MISSING, detail, USE_CPU_SEARCH * requested, users)
    else:
        yield Finding("software", name, MISSING, "this build searches on the CPU", FAISS_GPU_INSTALL, users)


def _tensorrt_remedy(machine: Machine, engine: str) -> str:
    if engine == TENSORRT_RTX:
        return INSTALL_RTX if machine.jetson is None else USE_TENSORRT
    if machine.jetson is None:
        return INSTALL_TENSORRT if machine.architecture == X86_64 else f"use --engine {TENSORRT_RTX}"
    if not machine.jetson.supported:
        return _flash_remedy(machine.jetson)
    return f"{JETPACK}; the environment must include the system's packages: bash jetson/install.sh"
