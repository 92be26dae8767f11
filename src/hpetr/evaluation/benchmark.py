"""Where the time of an image goes: every stage measured inside the library's own path, beside what the machine can do.

The path is `load_image` and `predict_batch`, unchanged. Hooks on the model's modules and on the processor's two methods
mark when a stage begins; what lies between two marks belongs to the stage of the first. The same marks split three
things: seconds, floating-point operations, and bytes that operators read and write.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hpetr.checkpoints.folder import BUNDLED, bundled_checkpoint, load_checkpoint, resolve_device
from hpetr.errors import InputError
from hpetr.evaluation.info import USUAL_IMAGE, environment_info
from hpetr.images.read import load_image
from hpetr.inference.precision import set_up_inference
from hpetr.inference.torch_predictor import predict_batch
from hpetr.model.attention import DeformableAttention
from hpetr.model.config import HPetrConfig
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.image_processor import HPetrImageProcessor
from hpetr.model.ops import kernel_name
from hpetr.model.presets import PRESETS

DECODE, RESIZE, BACKBONE, ENCODER = "decode", "resize and normalize", "backbone and neck", "encoder"
PROPOSALS, POSE_DECODER, JOINT_DECODER = "proposals", "pose decoder", "joint decoder"
POST_PROCESSING = "post-processing"
NETWORK_STAGES = (BACKBONE, ENCODER, PROPOSALS, POSE_DECODER, JOINT_DECODER)
STAGES = (DECODE, RESIZE, *NETWORK_STAGES, POST_PROCESSING)
OTHER = "other"  # what no stage covers: copies to the device, the grid, the choice of the best poses
END = ""
WARM_UP = 2
# A bilinear sample reads four pixels, each a multiply-add.
SAMPLE_FLOPS = 8
# Large enough that neither the start of a kernel nor a cache decides, small enough for a laptop.
MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
MACHINE_REPEATS = 5


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of the repeats, seconds."""

    median: float
    lower_quartile: float
    upper_quartile: float


@dataclass(frozen=True)
class Stage:
    """A stage's figures for one batch.

    Attributes:
        name: one of `STAGES`, or `OTHER`.
        seconds: of the repeats.
        flops: of matrix products, convolutions and self-attention; a multiply-add is 2. Equal to `hpetr info`'s.
        sampling_flops: of deformable sampling: 8 for a point and channel (four pixels, a multiply-add each).
        bytes: that torch operators read and write. What a cache saves is not taken off, so that a stage can pass the
            copy rate.
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
    """A benchmark of one model on one machine; sizes are height and width in pixels.

    Attributes:
        model: preset or folder. weights: "random" for a preset, else "checkpoint". kernel: of deformable sampling.
        image: size of the encoded image. input: size of the network's input, padding included.
        whole: seconds of a batch, from encoded images to results.
        peak_bytes: of memory: of the GPU's tensors, or of the whole process on the CPU; None where the system does not
            tell. loaded_bytes: the same before the first image.
        matrix_rate: FLOPs per second of a float32 matrix product. copy_rate: bytes per second, read and written, of a
            copy. Both measured on this device right after the repeats.
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
        """Plain values for JSON."""
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
        target: checkpoint folder, or preset (random weights; the bundled checkpoint's name means that checkpoint).
        size: height and width of the network's input before padding; None takes what the processor makes of the
            image. A given `image` is scaled to fit into it.
        batch: images that go through the network together.
        device: "auto", "cpu", "cuda", ...
        repeats: measured runs, after three that are not.
        threads: of the CPU; None leaves them as they are.
        image: encoded image; None makes one of 640 x 480, or with `size` one of twice that size.
        progress: called with 1 after every run, of which there are `runs(repeats)`.
        precision: of the network, see `set_up_inference`.

    Raises:
        InputError: neither preset nor checkpoint, a number below 1, no such device, no image, or too little memory
            on the GPU.
    """
    for name, value in (("batch", batch), ("repeats", repeats), ("threads", threads)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}, expected at least 1")
    if size is not None and min(size) < 1:
        raise InputError(f"size is {size[0]}x{size[1]}, expected a positive height and width")
    chosen = resolve_device(device)
    encoded = _encoded_image(image, size)
    model, processor, weights = _load(target, chosen)
    set_up_inference(model, precision)
    if size is not None:
        processor.size = {"shortest_edge": min(size), "longest_edge": max(size)}
    with _threads(threads):
        try:
            measured = _measure(model, processor, encoded, batch, repeats, progress or (lambda done: None))
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
    """How often `benchmark` runs the model for so many repeats."""
    return 1 + WARM_UP + repeats


def count_flops(config: HPetrConfig, batch: int, height: int, width: int) -> dict[str, np.ndarray]:
    """FLOPs (2,) of every network stage: those of `Stage.flops`, and those of sampling. Nothing is computed."""
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
    with FlopCounterMode(display=False) as counter:
        marks = Marks(lambda: np.array([counter.get_total_flops(), sampling]))
        with marked_network(model, marks):
            model(pixels)
        marks(END)
    return marks.sums()


class Marks:
    """Splits what a meter shows into stages: a mark ends the stage before it and begins its own."""

    def __init__(self, read: Callable[[], Any]):
        """`read` gives a value whose differences are what is measured."""
        self.read = read
        self.marks: list[tuple[str, Any]] = []

    def __call__(self, stage: str) -> None:
        self.marks.append((stage, self.read()))

    def sums(self) -> dict[str, Any]:
        """What every stage took, over all its parts."""
        sums: dict[str, Any] = {}
        for (stage, before), (_, after) in pairwise(self.marks):
            sums[stage] = sums.get(stage, 0) + (after - before)
        return sums


class CudaMoment:
    """When a GPU gets to this place in its queue. Differences are seconds; nobody waits until they are asked for."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: CudaMoment) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def _clock(device: torch.device) -> Callable[[], Any]:
    return CudaMoment if device.type == "cuda" else time.perf_counter


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of the tensors that operators read and write; views move none."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        storages = {t.untyped_storage()._cdata for t in read.values()}
        is_view = any(t.untyped_storage()._cdata in storages for t in written) and not func._schema.is_mutable
        if not is_view and func.overloadpacket is not torch.ops.aten.empty:
            # An expanded tensor is smaller in memory than its shape says.
            sizes = (min(t.nbytes, t.untyped_storage().nbytes()) for t in (*read.values(), *written))
            self.total += sum(sizes)
        return result


@dataclass(frozen=True)
class _Measured:
    """Per stage the seconds of every repeat and the bytes of one run; and what the run shows besides."""

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
    progress: Callable[[int], None],
) -> _Measured:
    device = model.device

    def run(read: Callable[[], Any]) -> dict[str, Any]:
        marks = Marks(read)
        with _marked_processor(processor, marks), marked_network(model, marks):
            marks(DECODE)
            images = [load_image(encoded) for _ in range(batch)]
            marks(OTHER)
            predict_batch(model, processor, images)
            marks(END)
        progress(1)
        return marks.sums()

    loaded = _memory(device, peak=False)
    sizes: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, arguments: sizes.append(arguments["pixel_values"].shape[-2:]), with_kwargs=True
    )
    with ByteCounter() as counter:
        moved = run(lambda: counter.total)
    hook.remove()
    for _ in range(WARM_UP):
        run(_clock(device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [run(_clock(device)) for _ in range(repeats)]
    return _Measured(seconds, moved, (sizes[0][0], sizes[0][1]), _memory(device, peak=True), loaded)


@contextmanager
def marked_network(model: HPetrForPoseEstimation, mark: Marks) -> Iterator[None]:
    def begins(stage: str) -> Callable[..., None]:
        return lambda *_: mark(stage)

    decoder = model.pose_decoder
    hooks = [
        model.register_forward_pre_hook(begins(OTHER)),
        decoder.register_forward_pre_hook(begins(PROPOSALS)),
        decoder.layers[0].register_forward_pre_hook(begins(POSE_DECODER)),
        decoder.register_forward_hook(begins(OTHER)),
    ]
    for module, stage in (
        (model.backbone, BACKBONE),
        (model.encoder, ENCODER),
        (model.joint_decoder, JOINT_DECODER),
    ):
        hooks += [module.register_forward_pre_hook(begins(stage)), module.register_forward_hook(begins(OTHER))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _marked_processor(processor: HPetrImageProcessor, mark: Marks) -> Iterator[None]:
    """Marks on the two methods; what follows the second, results as NumPy arrays, is post-processing too."""
    stages = {"preprocess": (RESIZE, OTHER), "post_process_pose_estimation": (POST_PROCESSING, POST_PROCESSING)}

    def marked(method: Callable[..., Any], stage: str, after: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            mark(stage)
            result = method(*args, **kwargs)
            mark(after)
            return result

        return call

    for name, (stage, after) in stages.items():
        setattr(processor, name, marked(getattr(processor, name), stage, after))
    try:
        yield
    finally:
        for name in stages:
            delattr(processor, name)


def matrix_rate(device: torch.device) -> float:
    """FLOPs per second of a float32 product of two large square matrices, the best of five."""
    side = MATRIX_SIDE.get(device.type, MATRIX_SIDE["cpu"])
    left, right, out = (torch.ones(side, side, device=device) for _ in range(3))
    return 2 * side**3 / _best_time(device, lambda: torch.mm(left, right, out=out))


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of copying a large tensor, the best of five."""
    source = torch.ones(COPY_BYTES.get(device.type, COPY_BYTES["cpu"]) // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _best_time(device, lambda: target.copy_(source))


def _best_time(device: torch.device, work: Callable[[], object]) -> float:
    read = _clock(device)
    work()
    times = []
    for _ in range(MACHINE_REPEATS):
        before = read()
        work()
        after = read()
        times.append(after - before)
    return min(times)


def _memory(device: torch.device, *, peak: bool) -> int | None:
    """Bytes in use, or at most in use so far; on the CPU only the latter is known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _stage(name: str, measured: _Measured, flops: dict[str, np.ndarray], matrix: float, copy: float) -> Stage:
    seconds = _spread([run.get(name, 0.0) for run in measured.seconds])
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
    if os.path.isdir(target) or (target == BUNDLED and bundled_checkpoint().is_dir()):
        return *load_checkpoint(target, device), "checkpoint"
    if target not in PRESETS:
        raise InputError(f"{target}: neither a checkpoint folder nor a preset, expected one of {', '.join(PRESETS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = HPetrForPoseEstimation(HPetrConfig.preset(target))
    return model.eval().to(device), HPetrImageProcessor(), "random"


def _encoded_image(image: str | os.PathLike[str] | None, size: tuple[int, int] | None) -> bytes:
    """The file's bytes, or a JPEG about as hard to decode as a photograph."""
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
    """So many threads for torch and OpenCV, and afterwards what they had."""
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
