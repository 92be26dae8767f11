"""Time of an image by stage, beside the rates of the machine.

The measured path is `load_image` and `predict_batch`, unchanged. Its stages (`hpetr.model.stages`) appear as ranges in
torch's profiler, which gives their seconds, and as operators to dispatch modes, which count floating-point operations
and bytes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hpetr.checkpoints.folder import BUNDLED, load_checkpoint, resolve_device
from hpetr.errors import InputError
from hpetr.evaluation.info import USUAL_IMAGE, environment_info
from hpetr.images.read import load_image
from hpetr.inference.open import find_model
from hpetr.inference.precision import check_precision
from hpetr.inference.torch_predictor import predict_batch
from hpetr.model.attention import DeformableAttention
from hpetr.model.config import HPetrConfig
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.image_processor import HPetrImageProcessor
from hpetr.model.ops import kernel_name
from hpetr.model.stages import DECODE, NETWORK_STAGES, POST_PROCESSING, PREFIX, RESIZE, stage

STAGES = (DECODE, RESIZE, *NETWORK_STAGES, POST_PROCESSING)
WHOLE = "whole"
OTHER = "other"  # outside of all stages: copies to the device, the grid, the choice of the best poses
WARM_UP = 2
SAMPLE_FLOPS = 8  # a bilinear sample reads four pixels, each a multiply-add
# Large enough to hide the start of a kernel and the caches, small enough for a laptop.
MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
MACHINE_REPEATS = 5
ENTER_RANGE = torch.ops.profiler._record_function_enter_new.default
EXIT_RANGE = torch.ops.profiler._record_function_exit._RecordFunction


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of the repeats, in seconds."""

    median: float
    lower_quartile: float
    upper_quartile: float


@dataclass(frozen=True)
class Stage:
    """Cost of a stage for one batch.

    Attributes:
        name: one of `STAGES`, or `OTHER`.
        seconds: of the repeats.
        flops: of matrix products, convolutions and self-attention; a multiply-add is 2. Equal to `hpetr info`'s.
        sampling_flops: of deformable sampling: 8 for a point and channel (four pixels, a multiply-add each).
        bytes: read and written by torch operators, cached or not: a stage can exceed the copy rate.
        matrix_share: all FLOPs over the time, as a share of the machine's matrix rate; None without FLOPs.
        copy_share: bytes over the time, as a share of the machine's copy rate; None without bytes.
    """

    name: str
    seconds: Spread
    flops: int
    sampling_flops: int
    bytes: int
    matrix_share: float | None
    copy_share: float | None


@dataclass(frozen=True)
class Benchmark:
    """Benchmark of one model on one machine; sizes are height and width in pixels.

    Attributes:
        model: the name given.
        weights: "random" for a preset, else "checkpoint".
        environment: see `environment_info`.
        device: of the network.
        kernel: of deformable sampling.
        precision: of the network.
        threads: of the CPU.
        batch: images in a batch.
        repeats: measured runs.
        image: size of the encoded image.
        input: size of the network's input, padding included.
        whole: seconds of a batch, from encoded images to results.
        images_per_second: at the median of `whole`.
        stages: `STAGES` and `OTHER`.
        peak_bytes: peak memory, of the GPU's tensors or of the whole process on the CPU; None if the system does not
            report it.
        loaded_bytes: the same before the first image.
        matrix_rate: FLOPs per second of a float32 matrix product on this device, right after the repeats.
        copy_rate: bytes per second, read and written, of a copy, likewise.
    """

    model: str
    weights: str
    environment: dict[str, str]
    device: str
    kernel: str
    precision: str
    threads: int
    batch: int
    repeats: int
    image: tuple[int, int]
    input: tuple[int, int]
    whole: Spread
    images_per_second: float
    stages: tuple[Stage, ...]
    peak_bytes: int | None
    loaded_bytes: int | None
    matrix_rate: float
    copy_rate: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def benchmark(
    target: str = BUNDLED,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    device: str = "auto",
    repeats: int = 10,
    threads: int | None = None,
    image: str | os.PathLike[str] | None = None,
    progress: Callable[[int], None] | None = None,
    *,
    precision: str = "float32",
) -> Benchmark:
    """Measure a model, stage by stage.

    Args:
        target: checkpoint, or preset for random weights; see `hpetr.inference.open.find_model`.
        size: height and width of the network's input before padding; None means the processor's choice. The image is
            scaled to fit into it.
        batch: images that go through the network together.
        device: "auto", "cpu", "cuda", ...
        repeats: measured runs, after `WARM_UP` others and one that counts bytes.
        threads: of the CPU; None leaves them unchanged.
        image: encoded image; None makes one of 640 x 480, or with `size` one of twice that size.
        progress: called with 1 after every run, `runs(repeats)` times.
        precision: see `hpetr.inference.precision.autocast`.

    Raises:
        InputError: neither preset nor checkpoint, a number below 1, no such device, no image, or too little memory
            on the GPU.
    """
    for name, value in (("batch", batch), ("repeats", repeats), ("threads", threads)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}, expected at least 1")
    if size is not None and min(size) < 1:
        raise InputError(f"size is {size[0]}x{size[1]}, expected a positive height and width")
    check_precision(precision)
    chosen = resolve_device(device)
    encoded = _encoded_image(image, size)
    model, processor, weights = _load(target, chosen)
    if size is not None:
        processor.size = {"shortest_edge": min(size), "longest_edge": max(size)}
    with _threads(threads):
        try:
            measured = _measure(model, processor, encoded, batch, repeats, precision, progress or (lambda done: None))
        except torch.OutOfMemoryError:
            raise InputError(f"{target}: {batch} images at once do not fit into the memory of {chosen}") from None
        flops = count_flops(model.config, batch, *measured.input)
        matrix, copy = matrix_rate(chosen), copy_rate(chosen)
        environment, used_threads = environment_info(), torch.get_num_threads()
    whole = _spread([sum(run.values()) for run in measured.seconds])
    return Benchmark(
        model=target,
        weights=weights,
        environment=environment,
        device=str(chosen),
        kernel=kernel_name(chosen, torch.float32),
        precision=precision,
        threads=used_threads,
        batch=batch,
        repeats=repeats,
        image=load_image(encoded).shape[:2],
        input=measured.input,
        whole=whole,
        images_per_second=batch / whole.median,
        stages=tuple(_stage(name, measured, flops, matrix, copy) for name in (*STAGES, OTHER)),
        peak_bytes=measured.peak_bytes,
        loaded_bytes=measured.loaded_bytes,
        matrix_rate=matrix,
        copy_rate=copy,
    )


def runs(repeats: int) -> int:
    """Return how often `benchmark` runs the model for a number of repeats."""
    return 1 + WARM_UP + repeats


def count_flops(config: HPetrConfig, batch: int, height: int, width: int) -> dict[str, np.ndarray]:
    """Return the FLOPs (2,) of every stage, of `Stage.flops` and of sampling, without computing anything."""
    with torch.device("meta"):
        model = HPetrForPoseEstimation(config).eval()
        pixels = torch.empty(batch, 3, height, width)
    sampling = 0

    def count_samples(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        nonlocal sampling
        assert isinstance(module, DeformableAttention)
        query, _, value = arguments[:3]
        points = query.shape[0] * query.shape[1] * module.num_heads * module.num_levels * module.num_points
        sampling += SAMPLE_FLOPS * points * value.shape[-1]

    for module in model.modules():
        if isinstance(module, DeformableAttention):
            module.register_forward_pre_hook(count_samples)
    # With gradients on: without them self-attention takes a fused path that the counter does not see.
    with (
        FlopCounterMode(display=False) as counter,
        StageMeter(lambda: np.array([counter.get_total_flops(), sampling])) as meter,
    ):
        model(pixels)
    return meter.sums()


class StageMeter(TorchDispatchMode):
    """Divide the growth of a counter among the stages.

    Args:
        read: returns the counter's value. The counter is a dispatch mode entered before this one, or hooks.
    """

    def __init__(self, read: Callable[[], Any]) -> None:
        super().__init__()
        self._read = read
        self._stages = [OTHER]
        self._last = read()
        self._sums: dict[str, Any] = {}

    def sums(self) -> dict[str, Any]:
        """Return the growth in every stage so far."""
        now = self._read()
        self._sums[self._stages[-1]] = self._sums.get(self._stages[-1], 0) + (now - self._last)
        self._last = now
        return self._sums

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ENTER_RANGE and args[0].startswith(PREFIX):
            self.sums()
            self._stages.append(args[0].removeprefix(PREFIX))
        elif func is EXIT_RANGE and len(self._stages) > 1:
            self.sums()
            self._stages.pop()
        return func(*args, **(kwargs or {}))


class ByteCounter(TorchDispatchMode):
    """Count the bytes of the tensors that operators read and write; views move none."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        storages = {t.untyped_storage()._cdata for t in read.values()}
        is_view = any(t.untyped_storage()._cdata in storages for t in written) and not func._schema.is_mutable
        if not is_view and func.overloadpacket is not torch.ops.aten.empty:
            # An expanded tensor takes less memory than its shape.
            sizes = (min(t.nbytes, t.untyped_storage().nbytes()) for t in (*read.values(), *written))
            self.total += sum(sizes)
        return result


def profile_stages(action: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Run an action and return the seconds of its stages, and of `OTHER`, which sum to its whole time.

    Stages of the network on a GPU have the time of their kernels. The post-processing on the CPU, which waits for them,
    begins after the last one.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler's library reports every start on stderr
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiled, stage(WHOLE):
        action()
    ranges: dict[str, tuple[float, float]] = {}
    for event in profiled.events():
        name = event.name.removeprefix(PREFIX)
        on_gpu = event.device_type == DeviceType.CUDA
        if event.name.startswith(PREFIX) and (not on_gpu or name in NETWORK_STAGES) and (on_gpu or name not in ranges):
            ranges[name] = event.time_range.start / 1e6, event.time_range.end / 1e6
    reached, end = ranges.pop(WHOLE)
    seconds = {OTHER: end - reached}
    for name, (start, stop) in sorted(ranges.items(), key=lambda item: item[1][1]):
        seconds[name] = max(0.0, stop - max(start, reached))
        seconds[OTHER] -= seconds[name]
        reached = max(reached, stop)
    return seconds


@dataclass(frozen=True)
class _Measured:
    """Seconds of every stage and repeat, bytes of every stage of one run, size of the input, and memory."""

    seconds: list[dict[str, float]]
    bytes: dict[str, int]
    input: tuple[int, int]
    peak_bytes: int | None
    loaded_bytes: int | None


def _measure(
    model: HPetrForPoseEstimation,
    processor: HPetrImageProcessor,
    encoded: bytes,
    batch: int,
    repeats: int,
    precision: str,
    progress: Callable[[int], None],
) -> _Measured:
    device = model.device

    def run() -> None:
        with stage(DECODE):
            images = [load_image(encoded) for _ in range(batch)]
        predict_batch(model, processor, images, precision=precision)
        progress(1)

    loaded = _memory(device, peak=False)
    height, width = processor([load_image(encoded)])["pixel_values"].shape[-2:]
    with ByteCounter() as counter, StageMeter(lambda: counter.total) as meter:
        run()
    for _ in range(WARM_UP):
        profile_stages(run, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [profile_stages(run, device) for _ in range(repeats)]
    return _Measured(seconds, meter.sums(), (height, width), _memory(device, peak=True), loaded)


def matrix_rate(device: torch.device) -> float:
    """Return the FLOPs per second of a float32 product of two large square matrices, the best of five."""
    side = MATRIX_SIDE.get(device.type, MATRIX_SIDE["cpu"])
    left, right, out = (torch.ones(side, side, device=device) for _ in range(3))
    return 2 * side**3 / _best_time(device, lambda: torch.mm(left, right, out=out))


def copy_rate(device: torch.device) -> float:
    """Return the bytes per second, read and written, of copying a large tensor, the best of five."""
    source = torch.ones(COPY_BYTES.get(device.type, COPY_BYTES["cpu"]) // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _best_time(device, lambda: target.copy_(source))


def _best_time(device: torch.device, action: Callable[[], object]) -> float:
    times = []
    for _ in range(1 + MACHINE_REPEATS):  # the first one warms up
        before = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - before)
    return min(times[1:])


def _memory(device: torch.device, *, peak: bool) -> int | None:
    """Return the bytes in use, or the peak so far; on the CPU always the peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _stage(name: str, measured: _Measured, flops: dict[str, np.ndarray], matrix: float, copy: float) -> Stage:
    seconds = _spread([run[name] for run in measured.seconds])
    matrix_flops, sampling_flops = (int(count) for count in flops.get(name, (0, 0)))
    all_flops, moved = matrix_flops + sampling_flops, measured.bytes.get(name, 0)
    return Stage(
        name=name,
        seconds=seconds,
        flops=matrix_flops,
        sampling_flops=sampling_flops,
        bytes=moved,
        matrix_share=all_flops / seconds.median / matrix if all_flops else None,
        copy_share=moved / seconds.median / copy if moved else None,
    )


def _spread(values: Sequence[float]) -> Spread:
    lower, median, upper = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return Spread(median, lower, upper)


def _load(target: str, device: torch.device) -> tuple[HPetrForPoseEstimation, HPetrImageProcessor, str]:
    found = find_model(target, ("checkpoint", "preset"))
    if found.path is not None:
        return *load_checkpoint(found.path, device), "checkpoint"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = HPetrForPoseEstimation(HPetrConfig.preset(target))
    return model.eval().to(device), HPetrImageProcessor.preset(target), "random"


def _encoded_image(image: str | os.PathLike[str] | None, size: tuple[int, int] | None) -> bytes:
    """Return the file's bytes, or a JPEG about as hard to decode as a photograph."""
    if image is not None:
        load_image(image)  # a broken file is reported by its name
        return Path(image).read_bytes()
    height, width = USUAL_IMAGE if size is None else (2 * size[0], 2 * size[1])  # halving it is exact
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (-(-height // 16), -(-width // 16), 3)).astype(np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    made = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", made, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Set the threads of torch and OpenCV, and restore them afterwards."""
    if count is None:
        yield
        return
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(count)
    cv2.setNumThreads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])
