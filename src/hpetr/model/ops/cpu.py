"""The C kernels, compiled once per user at first use; and of them deformable sampling, as two torch custom operators.

The operators compose with autograd, `torch.compile` and inference mode. They trust their caller,
`hpetr.model.ops.deformable_sampling`, to have checked shapes, dtypes and devices.
"""

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hpetr.model.ops.operators import complete_operators

logger = logging.getLogger("hpetr")

# float16, and the gradients of bfloat16, are computed on a float32 copy.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_SOURCES = Path(__file__).parent / "csrc"
# -fno-trapping-math and -fno-math-errno only drop exception flags and errno, so that floor() and selections vectorise;
# nothing here lets the compiler change a value (-ffast-math would, where a point lies on a pixel border).
_FLAGS = (
    "-std=gnu11 -O3 -fPIC -shared -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi -Wno-unknown-pragmas"
).split()
# Tried in this order: not every compiler has OpenMP (Apple's) or -march=native (some on Arm).
_EXTRA_FLAGS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())
_lock = threading.Lock()
_SUFFIXES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}


class _Problem(ctypes.Structure):
    """Mirrors `problem` in csrc/deformable_cpu.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "heads", "width", "levels", "queries", "points")),
        ("threads", ctypes.c_int64),
        ("shapes", ctypes.POINTER(ctypes.c_int64)),
    )


# ------------------------------------------------------------------------------------------------ compile and load


def _compiler() -> list[str]:
    """The system's C compiler as the start of a command line, from $CC or PATH; empty when there is none."""
    if command := shlex.split(os.environ.get("CC", "")):
        return command if shutil.which(command[0]) else []
    return next(([path] for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), [])


def _cpu_model() -> str:
    """What -march=native depends on: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    keep = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join([platform.machine(), platform.processor(), *sorted({x for x in lines if x.startswith(keep)})])


def _cache_directory() -> Path:
    """$HPETR_CACHE, or `hpetr` in the user's cache folder; a fresh temporary folder when that cannot be written."""
    try:
        if "HPETR_CACHE" in os.environ:
            directory = Path(os.environ["HPETR_CACHE"])
        else:
            directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hpetr"
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        temporary = tempfile.mkdtemp(prefix="hpetr-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return Path(temporary)


def _cached_library(compiler: list[str]) -> Path:
    """The path of the compiled library, compiled now unless an equal one is cached."""
    sources = sorted(path for path in _SOURCES.iterdir() if path.suffix in (".c", ".h"))
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [*(path.read_text() for path in sources), *compiler, version, *_FLAGS, repr(_EXTRA_FLAGS), _cpu_model()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    directory = _cache_directory()
    library = directory / f"kernels_cpu-{digest}.so"
    if not library.exists():
        _compile(compiler, directory, library)
    return library


def _compile(compiler: list[str], directory: Path, library: Path) -> None:
    """Compile to a name of our own and rename: another process may be doing the same."""
    errors = ""
    with tempfile.TemporaryDirectory(dir=directory, prefix=".build-") as build:
        output = Path(build) / library.name
        for extra in _EXTRA_FLAGS:
            sources = [str(path) for path in sorted(_SOURCES.glob("*.c"))]
            command = [*compiler, *_FLAGS, *extra, *sources, "-o", str(output)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode == 0:
                os.replace(output, library)
                return
            errors = errors or run.stderr.strip()
    raise OSError(f"{compiler[0]} failed: {errors.splitlines()[0] if errors else 'no message'}")


def load() -> ctypes.CDLL | None:
    """The C library; None, after one warning in the log, when it cannot be had. Decided once per process."""
    with _lock:
        return _load()


@functools.cache
def _load() -> ctypes.CDLL | None:
    compiler = _compiler()
    try:
        if not compiler:
            raise OSError("no C compiler found ($CC, cc, gcc, clang)")
        library = ctypes.CDLL(str(_cached_library(compiler)))
    except OSError as error:
        logger.warning("deformable sampling uses slow plain torch on the CPU: %s", error)
        return None
    pointer = ctypes.c_void_p
    for suffix in _SUFFIXES.values():
        getattr(library, f"hpetr_forward_{suffix}").argtypes = [ctypes.POINTER(_Problem), *[pointer] * 4]
    for suffix in ("f32", "f64"):
        getattr(library, f"hpetr_backward_{suffix}").argtypes = [ctypes.POINTER(_Problem), *[pointer] * 7]
    library.hpetr_separable_f32.argtypes = [pointer] * 11
    return library


def _call(name: str, value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, *tensors: Tensor) -> None:
    """Run C function `name`; `tensors` are all its pointers, contiguous, in order."""
    library = load()
    assert library is not None, "the caller chose the C kernel without load()"
    batch, tokens, heads, width = value.shape
    _, queries, _, levels, points, _ = locations.shape
    shapes = (ctypes.c_int64 * len(spatial_shapes))(*spatial_shapes)
    problem = _Problem(batch, tokens, heads, width, levels, queries, points, torch.get_num_threads(), shapes)
    if getattr(library, name)(ctypes.byref(problem), *(tensor.data_ptr() for tensor in tensors)):
        raise MemoryError(f"{name}: out of memory for the threads' scratch space")


# ------------------------------------------------------------------------------------------------ operators


@torch.library.custom_op("hpetr::deformable_sampling", mutates_args=(), device_types="cpu")
def _forward(value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    # the position arithmetic of half-precision values is float32
    compute_dtype = torch.promote_types(value.dtype, torch.float32)
    stored_dtype = value.dtype if value.dtype in _SUFFIXES else compute_dtype
    stored = value.to(stored_dtype).contiguous()
    locations, weights = (x.to(compute_dtype).contiguous() for x in (locations, weights))
    output = stored.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])  # (B, Q, M*D)
    if output.numel():
        name = f"hpetr_forward_{_SUFFIXES[stored_dtype]}"
        _call(name, stored, spatial_shapes, locations, stored, locations, weights, output)
    return output.to(value.dtype)


@torch.library.custom_op("hpetr::deformable_sampling_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad_output: Tensor, value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    compute_dtype = torch.promote_types(value.dtype, torch.float32)
    tensors = [x.to(compute_dtype).contiguous() for x in (grad_output, value, locations, weights)]
    grad_value = torch.zeros_like(tensors[1])
    grad_locations, grad_weights = torch.empty_like(tensors[2]), torch.empty_like(tensors[3])
    if grad_output.numel():
        name = f"hpetr_backward_{_SUFFIXES[compute_dtype]}"
        _call(name, value, spatial_shapes, locations, *tensors, grad_value, grad_locations, grad_weights)
    return grad_value.to(value.dtype), grad_locations.to(locations.dtype), grad_weights.to(weights.dtype)


complete_operators(_forward, _backward)


def deformable_sampling_c(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The same function as `hpetr.model.ops.deformable_sampling`, in C, without its checks; CPU and `DTYPES` only."""
    return _forward(value, [side for shape in spatial_shapes for side in shape], sampling_locations, attention_weights)
