"""What is to be said of the machine, its GPU and its libraries, and what mends it."""

from __future__ import annotations

from collections.abc import Iterator

from gog_edge.doctor.box import CUDA_BINDINGS, FAISS, ONNXRUNTIME, Box
from gog_edge.doctor.finding import Finding, State
from gog_edge.doctor.jetson import CUDA, JETPACK_6_LINUX, Jetson
from gog_edge.doctor.nvidia import Gpu
from gog_edge.doctor.probe import CUDA_PROVIDER, KERNELS
from gog_edge.engines.manifest import BUILT_ENGINES, ENGINES, ORT_CUDA, TENSORRT_ENGINES, TENSORRT_RTX
from gog_edge.engines.registry import CPU_SEARCH, FAISS_GPU, FAISS_GPU_INSTALL
from gog_edge.engines.tensorrt.plan import MODULES, NO_INT4
from gog_edge.planner import as_size

OK, MISSING, WRONG = State.OK, State.MISSING, State.WRONG
RTX_SM = 75  # the oldest GPUs that TensorRT for RTX builds for
RTX_CUDA = (13, 0)  # its wheels are for this release; NVIDIA's drivers run it from 580 on
NEW_DRIVER = "install NVIDIA's driver 580 or newer: sudo apt install nvidia-driver-580-open (Ubuntu), then restart"
JETPACK = "sudo apt install nvidia-jetpack"
FLASH = "flash JetPack 7.2 with NVIDIA's SDK Manager; see jetson/README.md"
NOT_JETPACK_6 = "JetPack 6 is not supported; install JetPack 7.2, which supports Orin"
NOT_RTX = "ask for --engine ort-cuda"
BROKEN_KERNELS = "remove gog_edge/engines/onnx/native/*.so where gog_edge is installed, and install it again"
NOT_RTX_JETSON = "ask for --engine tensorrt on a Jetson"
OTHER_SEARCH = f"ask for --search {CPU_SEARCH}"


def judge_box(box: Box) -> Iterator[Finding]:
    """System, Python, memory; on a Jetson its releases and its power mode."""
    yield Finding("box", "system", OK, f"{box.system}, {box.machine}")
    yield Finding("box", "Python", OK, box.python)
    memory = "unknown" if box.memory is None else as_size(box.memory)
    free = "" if box.free is None else f", {as_size(box.free)} free"
    yield Finding("box", "processor, memory", OK, f"{box.cores} cores, {memory}{free}")
    if box.jetson is not None:
        yield Finding("box", "Jetson", OK, f"{box.jetson.model or 'unknown board'}; the GPU shares the memory")
        yield _jetpack(box.jetson)
        yield _power(box.jetson)


def _jetpack(jetson: Jetson) -> Finding:
    said = f"{jetson.jetpack or 'unknown'} (Jetson Linux {jetson.release or 'unknown'})"
    fits = jetson.fits
    return Finding("box", "JetPack", OK if fits else WRONG, said, "" if fits else _flash(jetson), BUILT_ENGINES)


def _flash(jetson: Jetson) -> str:
    return NOT_JETPACK_6 if jetson.linux[:1] == (JETPACK_6_LINUX,) else FLASH


def _power(jetson: Jetson) -> Finding:
    """A slower mode is no fault; what it costs is told."""
    if jetson.power is None:
        return Finding("box", "power mode", MISSING, "nvpmodel has kept none", "sudo nvpmodel -q")
    said = jetson.power.name or f"number {jetson.power.number}"
    quicker = jetson.quickest if jetson.quickest not in (None, jetson.power) else None
    remedy = f"sudo nvpmodel -m {quicker.number}  # {quicker.name}, the quickest" if quicker else ""
    return Finding("box", "power mode", OK, said, remedy)


def judge_gpus(box: Box, search: str = CPU_SEARCH) -> Iterator[Finding]:
    """The driver and every GPU; the first is used."""
    users = BUILT_ENGINES if search == CPU_SEARCH else ENGINES
    found = box.gpus
    if not found.gpus:
        remedy = JETPACK if box.jetson else NEW_DRIVER
        yield Finding("gpu", "GPU", MISSING, found.trouble or "there is none", remedy, users)
        return
    release = ".".join(map(str, found.cuda))
    old = found.cuda < RTX_CUDA and not box.jetson
    yield Finding("gpu", "driver", WRONG if old else OK, f"{found.driver or 'version unknown'}, for CUDA {release}",
                  NEW_DRIVER if old else "", (TENSORRT_RTX,))  # fmt: skip
    for number, gpu in enumerate(found.gpus):
        yield Finding("gpu", f"GPU {number}", OK, _about(gpu))
    trouble = rtx_trouble(box)
    if trouble:
        yield Finding("gpu", "TensorRT for RTX", WRONG, trouble, NOT_RTX_JETSON if box.jetson else NOT_RTX,
                      (TENSORRT_RTX,))  # fmt: skip


def rtx_trouble(box: Box, *, int4: bool = False) -> str:
    """Why TensorRT for RTX builds no engines for the first GPU, or none of four bits; "" where it builds them."""
    if not box.gpus.gpus:
        return ""
    sm, library = box.gpus.gpus[0].sm, box.libraries[MODULES[TENSORRT_RTX]]
    if sm < RTX_SM:
        return f"SM {sm} is older than {RTX_SM}"
    if library.sms and sm not in library.sms:
        return f"{library.version} builds no engines for SM {sm}"
    return f"it builds no int4 engines for SM {sm}" if int4 and sm == NO_INT4 else ""


def _about(gpu: Gpu) -> str:
    memory = "the box's memory" if gpu.integrated else as_size(gpu.memory)
    free = "" if gpu.free is None or gpu.integrated else f", {as_size(gpu.free)} free"
    return f"{gpu.name}, SM {gpu.sm}, {memory}{free}"


def judge_libraries(box: Box, search: str = CPU_SEARCH) -> Iterator[Finding]:
    """ONNX Runtime and faiss, which all need; what runs on GPUs."""
    yield from _onnxruntime(box)
    yield from _kernels(box)
    yield from _faiss(box, search)
    for engine in TENSORRT_ENGINES:
        yield _library(box, MODULES[engine], engine, _tensorrt_remedy(box, engine), (engine,))
    install = "pip install 'gog_edge[tensorrt-rtx]'" if box.jetson is None else _bindings_remedy(box.jetson)
    yield _library(box, CUDA_BINDINGS, "cuda-bindings", install, TENSORRT_ENGINES)


def _library(box: Box, module: str, what: str, remedy: str, needed_by: tuple[str, ...]) -> Finding:
    library = box.libraries[module]
    if library.version:
        return Finding("software", what, OK, library.version, "", needed_by)
    absent = "No module named" in library.trouble
    said = f"'{module}' is not installed" if absent else library.trouble
    return Finding("software", what, MISSING if absent else WRONG, said, remedy, needed_by)


def _onnxruntime(box: Box) -> Iterator[Finding]:
    library = box.libraries[ONNXRUNTIME]
    yield _library(box, ONNXRUNTIME, "ONNX Runtime", "pip install 'gog_edge[cpu]'", ENGINES)
    remedy = ("pip uninstall onnxruntime && pip install 'gog_edge[gpu]'" if box.jetson is None else
              "ask for --engine tensorrt: no registry has ONNX Runtime with CUDA for Jetson")  # fmt: skip
    if CUDA_PROVIDER not in library.providers:
        yield Finding("software", "its CUDA provider", MISSING, "this build has none", remedy, (ORT_CUDA,))
    elif library.trouble:
        yield Finding("software", "its CUDA provider", WRONG, library.trouble, NEW_DRIVER, (ORT_CUDA,))
    else:
        yield Finding("software", "its CUDA provider", OK, "loads a graph", "", (ORT_CUDA,))


def _kernels(box: Box) -> Iterator[Finding]:
    """Of no use without ONNX Runtime; it serves without them, slower, on the processor alone."""
    library, what = box.libraries[KERNELS], "own kernels"
    if not box.libraries[ONNXRUNTIME].version or box.jetson is not None or box.machine != "x86_64":
        return
    if not library.version:
        said, _, remedy = library.trouble.partition("; ")
        yield Finding("software", what, MISSING, said, remedy or BROKEN_KERNELS)
    elif library.trouble:
        yield Finding("software", what, WRONG, library.trouble, BROKEN_KERNELS)
    elif library.better:
        yield Finding("software", what, WRONG, f"{library.version}; this processor runs {library.better}, which could "
                      "not be compiled", "get a newer compiler and install gog_edge again")  # fmt: skip
    else:
        yield Finding("software", what, OK, library.version)


def _faiss(box: Box, search: str) -> Iterator[Finding]:
    """Needed by all; for searching on the GPU only where that is asked for."""
    library, asked = box.libraries[FAISS], search == FAISS_GPU
    users = ENGINES if asked else ()
    yield _library(box, FAISS, "faiss", "pip install 'gog_edge[cpu]'", ENGINES)
    if not library.version:
        return
    if library.gpu:
        seen = f"sees {library.gpus} GPU" + "s" * (library.gpus != 1)
        unseen = not library.gpus and bool(box.gpus.gpus)
        yield Finding("software", "faiss on the GPU", OK if library.gpus else MISSING, seen, NEW_DRIVER * unseen, users)
    elif box.jetson is not None or box.machine != "x86_64":
        yield Finding("software", "faiss on the GPU", MISSING, "no wheel for this processor: the CPU searches",
                      OTHER_SEARCH * asked, users)  # fmt: skip
    else:
        yield Finding("software", "faiss on the GPU", MISSING, "this build searches on the CPU",
                      FAISS_GPU_INSTALL, users)  # fmt: skip


def _tensorrt_remedy(box: Box, engine: str) -> str:
    if engine == TENSORRT_RTX:
        return "pip install 'gog_edge[tensorrt-rtx]'" if box.jetson is None else NOT_RTX_JETSON
    if box.jetson is None:
        return "install NVIDIA's TensorRT 10 with its Python bindings, or ask for --engine tensorrt-rtx"
    if not box.jetson.fits:
        return _flash(box.jetson)
    return f"{JETPACK}; the environment must see the system's packages: bash jetson/install.sh"


def _bindings_remedy(jetson: Jetson) -> str:
    """Bindings of the major release of CUDA that its JetPack has."""
    if not jetson.fits:
        return _flash(jetson)
    major = CUDA[jetson.linux[0]]
    return f"pip install 'cuda-bindings>={major},<{major + 1}'"


