"""Videos as a user meets them: real `hpetr predict` processes on clips in which every frame carries its number."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from clips import HEIGHT, RATE, SAMPLES, WIDTH, make_clip, numbered, read_clip, read_number, read_sound
from hpetr import HPetrConfig, HPetrForPoseEstimation, HPetrImageProcessor, InputError, PosePredictor, PoseResult
from hpetr.checkpoints.folder import save_checkpoint
from hpetr.cli.main import app
from hpetr.cli.video import predict_and_report
from hpetr.video import predict_frames
from hpetr.video.open import open_source
from hpetr.video.run import Progress, VideoOptions, predict_videos
from hpetr.video.source import Frame, Source
from paths import EXAMPLES
from training_runs import SMALL_MODEL


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that takes milliseconds a frame; no pose has a score above its threshold."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "small"
    processor = HPetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 192}, threshold=1.0)
    save_checkpoint(HPetrForPoseEstimation(HPetrConfig(**SMALL_MODEL)), processor, folder)
    return folder


@pytest.fixture(scope="module")
def predictor(model: Path) -> PosePredictor:
    return PosePredictor(model, device="cpu")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "hpetr.cli", "predict", *map(str, arguments)]


def hpetr(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, cwd=cwd, env=environment, timeout=600
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 frames, 2.4 seconds, with sound."""
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", range(60), sound="aac")


def test_every_frame_comes_out_in_order_with_its_time_and_sound(model: Path, clip: Path, tmp_path: Path) -> None:
    done = hpetr(clip, "--checkpoint", model, "--batch-size", 7, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    drawing, results = tmp_path / "outputs" / "clip.mp4", tmp_path / "outputs" / "predictions.jsonl"
    assert read_clip(drawing) == (list(range(60)), [Fraction(number, RATE) for number in range(60)])
    np.testing.assert_array_equal(read_sound(drawing), read_sound(clip))
    with av.open(str(drawing)) as after, av.open(str(clip)) as before:
        assert after.duration == before.duration
        assert after.streams.video[0].average_rate == RATE
    lines = read_lines(results)
    assert [line["frame"] for line in lines] == list(range(60))
    assert [line["time"] for line in lines] == [round(number / RATE, 6) for number in range(60)]
    assert lines[0] == {"video": str(clip), "frame": 0, "time": 0.0, "width": WIDTH, "height": HEIGHT, "poses": []}
    assert done.stdout.startswith(f"{clip}: 60 frames in, 60 drawn, 0 poses, ")
    assert done.stdout.splitlines()[1:] == [
        f"drawing: {Path('outputs') / 'clip.mp4'}",
        f"results: {Path('outputs') / 'predictions.jsonl'}",
    ]
    assert done.stderr == ""
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["clip.mp4", "predictions.jsonl"]


def test_results_of_other_videos_are_kept(predictor: PosePredictor, tmp_path: Path) -> None:
    first, second = (str(make_clip(tmp_path / name, range(3))) for name in ("a.mp4", "b.mp4"))
    out = tmp_path / "out"
    runs = [predict_videos(predictor, videos, out) for videos in ([first], [first], [second], [second, first])]
    assert [run.kept for run in runs] == [None, None, out / "predictions.1.jsonl", None]
    assert {line["video"] for line in read_lines(out / "predictions.1.jsonl")} == {first}
    assert [line["video"] for line in read_lines(out / "predictions.jsonl")] == [second] * 3 + [first] * 3


def test_variable_frame_rate_is_kept(predictor: PosePredictor, tmp_path: Path) -> None:
    times = [0, 1, 2, 5, 6, 10, 11, 12, 30, 31]
    run = predict_videos(predictor, [str(make_clip(tmp_path / "vfr.mkv", times))], tmp_path / "out")
    numbers, moments = read_clip(tmp_path / "out" / "vfr.mkv")
    assert numbers == list(range(10))
    assert moments == [Fraction(moment, RATE) for moment in times]
    assert [line["time"] for line in read_lines(run.results)] == [round(moment / RATE, 6) for moment in times]


@pytest.mark.parametrize(
    ("matrix", "upright"),
    [
        ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
        ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
        ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
        ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
        ((1, 0, 0, -1), lambda image: image[::-1]),
        ((0, 1, 1, 0), lambda image: image.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda image: image[::-1, ::-1].transpose(1, 0, 2)),
    ],
)
def test_rotated_and_mirrored_videos_come_out_upright(
    predictor: PosePredictor, tmp_path: Path, matrix: tuple[int, ...], upright: Callable[[np.ndarray], np.ndarray]
) -> None:
    clip = make_clip(tmp_path / "phone.mp4", [5, 6], matrix=matrix)
    run = predict_videos(predictor, [str(clip)], tmp_path / "out")
    with av.open(str(clip)) as stored:
        expected = upright(next(stored.decode(video=0)).to_ndarray(format="rgb24"))
    with av.open(str(tmp_path / "out" / "phone.mp4")) as container:
        frame = next(container.decode(video=0))
        assert frame.side_data.get("DISPLAYMATRIX") is None
        assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - expected).mean() < 4
    line = read_lines(run.results)[0]
    assert (line["height"], line["width"]) == expected.shape[:2]


def test_sound_that_mp4_does_not_take_goes_into_mkv(predictor: PosePredictor, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "old.avi", range(30), codec="mpeg4", sound="pcm_u8")
    report = predict_videos(predictor, [str(clip)], tmp_path / "out").videos[0]
    assert report.drawing == tmp_path / "out" / "old.mkv"
    np.testing.assert_array_equal(read_sound(report.drawing), read_sound(clip))


def test_sound_that_no_container_takes_is_reported(model: Path, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "old.wmv", range(10), codec="mpeg4", sound="wmav2")
    result = invoke(clip, "--checkpoint", model, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "warning" in result.stderr
    assert "sound (wmav2)" in result.stderr
    assert read_clip(tmp_path / "out" / "old.mkv")[0] == list(range(10))


def test_recording_that_does_not_start_at_zero_does(predictor: PosePredictor, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "broadcast.ts", range(30), sound="aac")
    report = predict_videos(predictor, [str(clip)], tmp_path / "out").videos[0]
    assert report.drawing is not None

    def distance(path: Path) -> float:
        with av.open(str(path)) as container:
            video, sound = container.streams.video[0], container.streams.audio[0]
            return float(video.start_time * video.time_base - sound.start_time * sound.time_base)

    with av.open(str(clip)) as before, av.open(str(report.drawing)) as after:
        assert before.start_time > 0
        assert after.start_time == 0
    assert distance(report.drawing) == pytest.approx(distance(clip), abs=1e-3)
    np.testing.assert_array_equal(read_sound(report.drawing), read_sound(clip))


def test_odd_sizes_get_one_more_pixel(predictor: PosePredictor, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "odd.mkv", range(5), codec="ffv1", size=(191, 95))
    run = predict_videos(predictor, [str(clip)], tmp_path / "out")
    assert read_clip(tmp_path / "out" / "odd.mkv")[0] == list(range(5))
    with av.open(str(tmp_path / "out" / "odd.mkv")) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (192, 96)
    assert (read_lines(run.results)[0]["width"], read_lines(run.results)[0]["height"]) == (191, 95)


@pytest.mark.parametrize("colors", [(1, 1, 1), (5, 5, 6)])
def test_colors_are_kept(predictor: PosePredictor, tmp_path: Path, colors: tuple[int, int, int]) -> None:
    """A red frame by the numbers of BT.709 or BT.601 keeps its color and its tags."""
    path = tmp_path / "red.mp4"
    red = np.broadcast_to(np.array([220, 30, 20], np.uint8), (64, 96, 3)).copy()
    with av.open(str(path), "w") as container:
        video = container.add_stream("h264", rate=RATE)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        context = video.codec_context
        context.colorspace, context.color_primaries, context.color_trc = colors
        frame = av.VideoFrame.from_ndarray(red, format="rgb24").reformat(format="yuv420p", dst_colorspace=colors[0])
        container.mux(video.encode(frame))
        container.mux(video.encode(None))
    predict_videos(predictor, [str(path)], tmp_path / "out")
    with av.open(str(tmp_path / "out" / "red.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_primaries, frame.color_trc) == colors
        assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - red).max() < 6


def test_tracks_keep_their_numbers_and_are_in_every_line(model: Path, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "still.mp4", range(1))
    with av.open(str(clip), "w") as container:
        video = container.add_stream("h264", rate=RATE)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for _ in range(12):
            container.mux(video.encode(av.VideoFrame.from_ndarray(numbered(5), format="rgb24")))
        container.mux(video.encode(None))
    sure = PosePredictor(model, device="cpu", threshold=0.0)
    for options in (VideoOptions(track=True), VideoOptions(smooth=True)):
        run = predict_videos(sure, [str(clip)], tmp_path / "out", options=options)
        lines = read_lines(run.results)
        numbers = [{pose["track_id"] for pose in line["poses"]} for line in lines]
        assert numbers[0] == set(range(1, 11))
        assert len(set.union(*numbers)) == run.videos[0].tracks
        assert all(len(line["poses"]) == 10 for line in lines)
        assert sum(len(found & numbers[0]) for found in numbers) > 60
        assert set(lines[0]["poses"][0]) == {"category_id", "keypoints", "bbox", "score", "track_id"}


def damaged_clip(path: Path) -> Path:
    """30 frames, of which one's data is noise."""
    make_clip(path, range(30))
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size and not packet.is_keyframe][9]
        start, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    data[start : start + size] = b"\xff" * size
    path.write_bytes(data)
    return path


def test_frame_that_cannot_be_decoded_is_reported(model: Path, tmp_path: Path) -> None:
    clip = damaged_clip(tmp_path / "scratched.mp4")
    result = invoke(clip, "--checkpoint", model, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    report = f"{clip}: 29 frames in, 29 drawn"
    assert report in result.stdout
    assert "1 frame could not be decoded, left out" in result.stderr
    assert len(read_clip(tmp_path / "out" / "scratched.mp4")[0]) == 29
    assert len(read_lines(tmp_path / "out" / "predictions.jsonl")) == 29


def test_cut_off_file_gives_its_frames_and_says_what_is_missing(model: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.mp4"
    make_clip(tmp_path / "clip.mp4", range(50))
    with av.open(str(tmp_path / "clip.mp4")) as source:
        target = av.open(str(whole), "w", container_options={"movflags": "+faststart"})
        video = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = video
                target.mux(packet)
        target.close()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 7 // 10])
    result = invoke(cut, "--checkpoint", model, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "announces 50 frames" in result.stderr
    numbers = read_clip(tmp_path / "out" / "cut.mp4")[0]
    assert 10 < len(numbers) < 50
    assert numbers[:10] == list(range(10))


def invoke(*arguments: object) -> Result:
    """`hpetr predict` in this process: quick, as torch is imported already."""
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def assert_bad_input(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert message in result.stderr


def without_video(path: Path) -> None:
    with av.open(str(path), "w") as container:
        tone = container.add_stream("aac", rate=SAMPLES, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = SAMPLES
        container.mux(tone.encode(frame))
        container.mux(tone.encode(None))


def noise_alone(path: Path) -> None:
    make_clip(path, range(3))
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            if packet.size:
                data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(data)


def without_frames(path: Path) -> None:
    with av.open(str(path), "w", format="matroska") as container:
        video = container.add_stream("mpeg4", rate=RATE)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        container.start_encoding()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"no video at all " * 99), "cannot be read as a video (Invalid data"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (without_video, "has no video in it"),
        (without_frames, "cannot be read as a video (End of file)"),
        (noise_alone, "has no frame that can be read"),
        (lambda path: None, "no such file, expected a video"),
    ],
)
def test_bad_video_is_one_clear_line(model: Path, tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "bad.mp4"
    make(path)
    assert_bad_input(invoke(path, "--checkpoint", model, "--output", tmp_path / "out"), message)
    assert not list((tmp_path / "out").glob("*"))


def test_missing_camera_and_stream_are_one_clear_line(model: Path, tmp_path: Path) -> None:
    options = ("--checkpoint", model, "--output", tmp_path / "out")
    assert_bad_input(invoke("999", *options), "camera 999: cannot be opened")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}/live"
    result = invoke(f"rtsp://user:secret@{address}", *options)
    assert_bad_input(result, f"rtsp://{address}: cannot be read as a stream (Connection refused)")
    assert_bad_input(invoke("nonsense://somewhere", *options), "cannot be read as a stream (Protocol not found)")


def test_outputs_are_checked_before_the_model_is_loaded(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    options = ("--checkpoint", "nowhere", "--output")
    assert_bad_input(invoke(clip, *options, tmp_path / "file" / "out"), "cannot be used as output folder")
    assert_bad_input(invoke(clip, *options, clip.parent), "holds the video clip.mp4")
    image = EXAMPLES / "000000000885.jpg"
    assert_bad_input(invoke(clip, image, *options, tmp_path, "--json", tmp_path / "r.json"), "--json names one file")
    assert_bad_input(invoke(image, *options, tmp_path, "--track"), "are for videos")


@pytest.mark.parametrize("link", ["", "results.jsonl", "out/predictions.jsonl", "out/clip.mov"])
def test_no_output_replaces_a_video(clip: Path, tmp_path: Path, link: str) -> None:
    """The results named like a video, or an output that is a link to one."""
    video, out = tmp_path / "videos" / "clip.mp4", tmp_path / "out"
    for folder in (video.parent, out):
        folder.mkdir()
    shutil.copy(clip, video)
    if link:
        (tmp_path / link).symlink_to(video)
    results = {"": ("--json", video), "results.jsonl": ("--json", tmp_path / link)}.get(link, ())
    result = invoke(video, "--checkpoint", "nowhere", "--output", out, *results)
    assert_bad_input(result, "is one of the inputs")
    assert video.read_bytes() == clip.read_bytes()


def test_links_are_followed_and_standard_output_and_pipes_are_written_into(
    model: Path, clip: Path, tmp_path: Path
) -> None:
    options = ("--checkpoint", model, "--no-draw", "--output", tmp_path / "out")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "target.jsonl")
    assert invoke(clip, *options, "--json", tmp_path / "link.jsonl").exit_code == 0
    assert (tmp_path / "link.jsonl").is_symlink()
    lines = read_lines(tmp_path / "target.jsonl")
    assert len(lines) == 60

    result = invoke(clip, *options, "--json", "-")
    assert result.exit_code == 0, result.output
    assert [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")] == lines

    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit((tmp_path / "pipe").read_text)
        assert invoke(clip, *options, "--json", tmp_path / "pipe").exit_code == 0
        assert [json.loads(line) for line in read.result().splitlines()] == lines
    assert (tmp_path / "pipe").is_fifo()
    assert not (tmp_path / "out").exists()


def test_full_disk_and_closed_pipe_are_one_line_and_leave_nothing(model: Path, clip: Path, tmp_path: Path) -> None:
    options = ("--checkpoint", model, "--output", tmp_path / "out")
    result = invoke(clip, *options, "--no-draw", "--json", "/dev/full")
    assert_bad_input(result, "/dev/full: cannot be written (No space left on device)")

    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as reader:
        reader.submit(lambda: os.close(os.open(tmp_path / "pipe", os.O_RDONLY)))
        result = invoke(clip, *options, "--no-draw", "--json", tmp_path / "pipe")
    assert_bad_input(result, "pipe: cannot be written (Broken pipe)")

    results = ("--json", tmp_path / "results.jsonl")
    for limit, extra, name in ((20_000, (), "out/clip.mp4"), (5_000, ("--no-draw",), "results.jsonl")):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # as a disk that is almost full
        try:
            result = invoke(clip, *options, *results, *extra)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert_bad_input(result, f"{tmp_path / name}: cannot be written (File too large)")
    assert not list((tmp_path / "out").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pipe"]


def test_folder_of_images_and_videos_one_of_them_bad(model: Path, clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "holiday"
    folder.mkdir()
    shutil.copy(clip, folder / "b.MP4")
    shutil.copy(EXAMPLES / "000000000885.jpg", folder)
    (folder / "a.mov").write_bytes(b"nothing")
    result = invoke(folder, "--checkpoint", model, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "0 people in 1 image" in result.stdout
    assert "b.MP4: 60 frames in, 60 drawn" in result.stdout
    assert "1 of 2 videos could not be read" in result.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"000000000885.jpg", "predictions.json", "b.mp4", "predictions.jsonl"}


def test_poses_alone(model: Path, clip: Path, tmp_path: Path) -> None:
    results = tmp_path / "deep" / "poses.jsonl"
    options = ("--no-draw", "--json", results, "--threshold", 0, "--output", tmp_path / "out")
    result = invoke(clip, "--checkpoint", model, *options)
    assert result.exit_code == 0, result.output
    lines = read_lines(results)
    assert len(lines) == 60
    assert [len(pose["keypoints"]) for pose in lines[59]["poses"]] == [51] * 10
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="POSIX terminals")
def test_a_terminal_shows_progress_and_frames_per_second(
    predictor: PosePredictor, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pty

    reading, writing = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # a terminal's end
            while True:
                shown.append(os.read(reading, 4096))

    reader = threading.Thread(target=read)
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with open(writing, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        predict_and_report(predictor, [str(clip)], tmp_path / "out", None, VideoOptions())
    reader.join()
    os.close(reading)
    assert re.search(r"…\S*/clip0/clip\.mp4 .*60/60.* \d+\.\d frames/s", b"".join(shown).decode()), shown


class Slow(PosePredictor):
    """A predictor whose first batch takes until an event."""

    def __init__(self, model: Path, event: threading.Event) -> None:
        super().__init__(model, device="cpu")
        self.event = event

    def predict(self, images: Sequence[np.ndarray], threshold: float | None = None) -> list[PoseResult]:
        assert self.event.wait(600)
        return super().predict(images, threshold)


class Camera(Source):
    """A live source of 100 frames, all of them at once."""

    def __init__(self) -> None:
        super().__init__("camera", True, Fraction(1, RATE), None)
        self.done = threading.Event()

    def frames(self) -> Iterator[Frame]:
        for number in range(100):
            yield Frame(number, Fraction(number, RATE), Fraction(0), numbered(number))
        self.done.set()

    def close(self) -> None:
        pass


def test_frames_of_a_live_source_are_dropped_while_the_network_is_busy(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    camera = Camera()
    frames = [frame for frame, _ in predict_frames(Slow(model, camera.done), camera, batch_size=1)]
    assert [read_number(frame.image) for frame in frames] == [frame.index for frame in frames]
    assert frames[-1].index == 99
    assert len(frames) <= 2
    assert camera.dropped == 100 - len(frames)
    assert caplog.messages == [f"camera: {camera.dropped} frames dropped to keep up with the live source"]


def test_frames_in_python_are_those_of_the_command(model: Path, clip: Path) -> None:
    predictor = PosePredictor(model, device="cpu", threshold=0.0)
    found = list(predict_frames(predictor, clip, batch_size=7))
    assert [read_number(frame.image) for frame, _ in found] == list(range(60))
    assert [frame.time for frame, _ in found] == [Fraction(number, RATE) for number in range(60)]
    (expected,) = predictor.predict([found[59][0].image])
    np.testing.assert_allclose(found[59][1].keypoints, expected.keypoints, atol=0.01)
    assert [len(result) for _, result in predict_frames(predictor, str(clip), threshold=1.0)] == [0] * 60


def test_leaving_the_frames_early_closes_their_source(predictor: PosePredictor, clip: Path) -> None:
    source = open_source(str(clip))
    frames = predict_frames(predictor, source)
    assert next(frames)[0].index == 0
    frames.close()
    with pytest.raises(AssertionError, match="Container is not open"):
        next(source.frames())


def test_frames_of_a_bad_source_are_an_error(predictor: PosePredictor, tmp_path: Path) -> None:
    noise_alone(tmp_path / "noise.mp4")
    with pytest.raises(InputError, match=r"noise\.mp4: has no frame that can be read"):
        next(predict_frames(predictor, tmp_path / "noise.mp4"))
    with pytest.raises(InputError, match="camera 999: cannot be opened"):
        next(predict_frames(predictor, 999))


class Interrupting(Progress):
    """Raises a signal when a number of frames is done."""

    def __init__(self, number: signal.Signals, frames: int) -> None:
        self.number, self.left = number, frames

    def advance(self, frames: int) -> None:
        self.left -= frames
        if self.left == 0:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_video_is_complete_as_far_as_it_goes(
    predictor: PosePredictor, tmp_path: Path, number: signal.Signals
) -> None:
    long = make_clip(tmp_path / "long.mp4", range(200), sound="aac")
    before = signal.getsignal(number)
    run = predict_videos(predictor, [str(long)] * 2, tmp_path / "out", progress=Interrupting(number, 20))
    assert signal.getsignal(number) == before
    assert run.interrupted
    assert [report.frames for report in run.videos] == [20], "the second video is not begun"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["long.mp4", "predictions.jsonl"]
    assert read_clip(tmp_path / "out" / "long.mp4")[0] == list(range(20))
    assert [line["frame"] for line in read_lines(run.results)] == list(range(20))
    assert len(read_sound(tmp_path / "out" / "long.mp4")) > 0


@pytest.fixture
def live_stream(tmp_path: Path) -> Iterator[str]:
    """The URL of a broadcast that does not end before the test: half of it at once, the rest in small pieces."""
    data = make_clip(tmp_path / "live.ts", range(1000)).read_bytes()
    ended = threading.Event()

    class Broadcast(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):  # the reader is gone
                self.wfile.write(data[: len(data) // 2])
                for start in range(len(data) // 2, len(data), len(data) // 500):
                    if ended.wait(0.5):
                        return
                    self.wfile.write(data[start : start + len(data) // 500])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Broadcast)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/cam1"
    ended.set()
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_live_stream_is_interrupted_or_killed(
    model: Path, live_stream: str, tmp_path: Path, number: signal.Signals
) -> None:
    """Frames in the files and dropped ones add up; a killed process leaves nothing under a final name."""
    process = subprocess.Popen(
        command(live_stream, "--checkpoint", model),
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in a shell's background inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    outputs = tmp_path / "outputs"
    while not list(outputs.glob(".cam1.mp4.*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=600)
    left = sorted(path.name for path in outputs.iterdir())
    if number == signal.SIGKILL:
        assert all(name.startswith(".") and name.endswith(".tmp") for name in left)
        return
    assert process.returncode == 130, stderr
    assert stderr.endswith("interrupted\n")
    assert left == ["cam1.mp4", "predictions.jsonl"]
    numbers, _ = read_clip(outputs / "cam1.mp4")
    assert numbers == [line["frame"] for line in read_lines(outputs / "predictions.jsonl")]
    assert numbers == sorted(set(numbers))
    dropped = [int(count) for count in re.findall(r"(\d+) frames? dropped", stderr)]
    assert sum(dropped) >= numbers[-1] + 1 - len(numbers)
    assert f"{len(numbers)} frames in, {len(numbers)} drawn" in stdout.replace("1 frame in", "1 frames in")
