"""`hpetr serve`: a real server process, every kind of error, and the queue in front of the model."""

from __future__ import annotations

import asyncio
import io
import re
import signal
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from typer.testing import CliRunner

from hpetr import InputError, PosePredictor
from hpetr.cli.main import app
from hpetr.server import run
from hpetr.server.app import Service, create_app
from hpetr.server.batching import Batcher, Job
from hpetr.server.limits import Limits, Refusal, check_image
from hpetr.server.run import HeadTimeout, listen, make_server
from paths import ROOT
from serving import SECONDS, ServerProcess, save_small_checkpoint

IMAGE = ROOT / "examples" / "000000000785.jpg"
LIMIT_MEGABYTES, LIMIT_PIXELS, QUEUE = 0.5, 400_000, 2


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "small"
    save_small_checkpoint(folder, threshold=0.0)
    return folder


@pytest.fixture(scope="module")
def server(small_checkpoint: Path) -> Iterator[ServerProcess]:
    options = ["--max-megabytes", LIMIT_MEGABYTES, "--max-pixels", LIMIT_PIXELS, "--queue", QUEUE]
    with ServerProcess("--checkpoint", small_checkpoint, *options) as process:
        yield process
        end_with_a_request_inside(process)


def end_with_a_request_inside(process: ServerProcess) -> None:
    data = encoded()
    with process.begin_upload(len(data)) as connection:
        process.wait_for(lambda: metrics(process)["hpetr_admitted"] == 1)
        process.process.send_signal(signal.SIGTERM)
        process.wait_for(lambda: not process.accepts())
        connection.sendall(data)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    assert process.process.wait(SECONDS) == 0
    assert process.output().endswith("stopped\n")


@pytest.fixture(scope="module")
def predictor(small_checkpoint: Path) -> PosePredictor:
    return PosePredictor(small_checkpoint, "cpu")


def encoded(height: int = 48, width: int = 64, seed: int = 0, kind: str = "PNG", **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def form(data: bytes, field: str = "file", file_name: str | None = "a.jpg") -> tuple[bytes, dict[str, str]]:
    name = f'; filename="{file_name}"' if file_name else ""
    head = f'--line\r\nContent-Disposition: form-data; name="{field}"{name}\r\n\r\n'.encode()
    return head + data + b"\r\n--line--\r\n", {"Content-Type": "multipart/form-data; boundary=line"}


def huge_png(width: int, height: int) -> bytes:
    """A few bytes that claim to be an image of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encoded(kind="JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + b"\xff\xd9"


@pytest.mark.parametrize("upload", ["raw", "form"])
def test_the_answer_is_what_the_predictor_gives(server: ServerProcess, predictor: PosePredictor, upload: str) -> None:
    data = IMAGE.read_bytes()
    body, headers = form(data) if upload == "form" else (data, {"Content-Type": "image/jpeg"})
    status, _, answer = server.post(body, headers)
    expected = predictor(IMAGE)
    assert (status, answer["model"], answer["threshold"]) == (200, "small", 0.0)
    assert answer["image"] == {"width": 640, "height": 425}
    assert len(answer["poses"]) == len(expected) == 10
    assert answer["edges"] == [list(edge) for edge in expected.skeleton.edges]
    for pose, keypoints, score, box in zip(
        answer["poses"], expected.keypoints, expected.scores, expected.boxes, strict=True
    ):
        assert [joint["name"] for joint in pose["keypoints"]] == answer["keypoint_names"]
        got = [(joint["x"], joint["y"]) for joint in pose["keypoints"]]
        np.testing.assert_allclose(got, keypoints, atol=0.01)
        np.testing.assert_allclose(pose["box"], box, atol=0.01)
        assert pose["score"] == pytest.approx(float(score), abs=1e-5)
        assert pose["label"] == "person"


def test_only_poses_above_the_threshold_are_given(server: ServerProcess, predictor: PosePredictor) -> None:
    scores = predictor(IMAGE).scores
    middle = float(scores[4] + scores[5]) / 2
    _, _, answer = server.post(IMAGE.read_bytes(), query=f"?threshold={middle}")
    assert len(answer["poses"]) == 5
    assert answer["threshold"] == pytest.approx(middle)


def test_exif_orientation_is_applied(server: ServerProcess) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate to the right
    _, _, answer = server.post(encoded(48, 64, kind="JPEG", exif=exif))
    assert answer["image"] == {"width": 48, "height": 64}


WRONG = {
    "empty": (b"", {}, 400, "empty", "the upload is empty"),
    "text": (b"not an image", {}, 415, "not_a_picture", "expected JPEG, PNG"),
    "svg": (b"<svg/>", {"Content-Type": "image/svg+xml"}, 415, "not_a_picture", "is not an image"),
    "truncated jpeg": (encoded(kind="JPEG")[:-300], {}, 422, "broken_picture", "truncated or broken"),
    "truncated png": (encoded()[:-300], {}, 422, "broken_picture", "truncated or broken"),
    "header only": (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", {}, 422, "broken_picture", "cannot be read"),
    "bomb": (huge_png(30_000, 30_000), {}, 413, "too_many_pixels", "expected at most 400,000"),
    "below Pillow's limit": (huge_png(8_000, 8_000), {}, 413, "too_many_pixels", "8000 x 8000 = 64,000,000 pixels"),
    "too many scans": (many_scans(120), {}, 422, "too_many_scans", "expected at most 100"),
    "50 MB": (bytes(50_000_000), {}, 413, "too_many_bytes", "larger than the 0.5 MB"),
    "50 MB form": (*form(bytes(50_000_000)), 413, "too_many_bytes", "larger than the 0.5 MB"),
    "wrong field": (*form(b"x", "image"), 422, "wrong_field", "'file' is missing, found 'image'"),
    "text field": (*form(b"x", "file", None), 422, "wrong_field", "'file' is text"),
    "empty file": (*form(b""), 400, "empty", "the upload is empty"),
    "no boundary": (b"x", {"Content-Type": "multipart/form-data"}, 400, "bad_form", "boundary"),
    "half a form": (form(b"x" * 1000)[0][:500], form(b"")[1], 422, "wrong_field", "found no field"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_bad_upload_is_refused_in_one_sentence(server: ServerProcess, case: str) -> None:
    body, headers, status, kind, says = WRONG[case]
    got, _, answer = server.post(body, headers)
    assert (got, answer["kind"]) == (status, kind)
    assert says in answer["detail"]
    assert "\n" not in answer["detail"]


def test_an_upload_of_unknown_length_is_cut_off_too(server: ServerProcess) -> None:
    status, _, answer = server.post(bytes(100_000) for _ in range(20))
    assert (status, answer["kind"]) == (413, "too_many_bytes")


@pytest.mark.parametrize("value", ["2", "-0.1", "nan", "much"])
def test_a_bad_threshold_is_refused(server: ServerProcess, value: str) -> None:
    status, _, answer = server.post(encoded(), query=f"?threshold={value}")
    assert (status, answer["kind"]) == (422, "bad_parameter")
    assert answer["detail"].startswith(f"threshold is '{value}'")


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("treshold=0.1", "treshold: no such parameter, did you mean 'threshold'?"),
        ("x=1", "x: no such parameter, expected threshold, keypoint_threshold, format"),
        ("threshold=0.1&threshold=0.2", "threshold is given more than once"),
        ("format=png", "format is 'png': input should be 'json' or 'image'"),
        ("keypoint_threshold=3", "keypoint_threshold is '3': input should be less than or equal to 1"),
    ],
)
def test_a_bad_parameter_is_refused_in_one_sentence(server: ServerProcess, query: str, says: str) -> None:
    failures = 'hpetr_failures_total{kind="bad_parameter"}'
    before = metrics(server).get(failures, 0)
    assert server.post(encoded(), query=f"?{query}")[::2] == (422, {"kind": "bad_parameter", "detail": says})
    assert metrics(server)[failures] == before + 1
    status, _, answer = server.get("/v1/model?x=1")
    assert (status, answer["detail"]) == (422, "x: no such parameter, expected none")


@pytest.mark.parametrize(
    ("query", "accept", "kind"),
    [
        ("?format=image", "*/*", "JPEG"),
        ("", "image/jpeg", "JPEG"),
        ("", "image/png;q=0.9", "PNG"),
        ("?format=image", "image/png", "PNG"),
        ("", "image/*", "JPEG"),
    ],
)
def test_the_poses_are_drawn_on_request(
    server: ServerProcess, predictor: PosePredictor, query: str, accept: str, kind: str
) -> None:
    status, headers, data = server.post(IMAGE.read_bytes(), {"Accept": accept}, query)
    assert (status, headers["Content-Type"]) == (200, f"image/{kind.lower()}")
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == kind
        drawn = np.asarray(image).astype(int)
    assert np.abs(drawn - predictor(IMAGE).draw()).mean() < 3
    assert np.abs(drawn - np.asarray(Image.open(IMAGE))).mean() > 3
    assert server.post(IMAGE.read_bytes(), {"Accept": accept}, "?format=json")[2]["model"] == "small"


def test_keypoints_below_their_threshold_are_in_no_box_and_not_drawn(tmp_path: Path) -> None:
    save_small_checkpoint(tmp_path / "scored", threshold=0.0, keypoint_scores=True)
    service = Service(PosePredictor(tmp_path / "scored", "cpu"), "scored")
    service.start()
    client = TestClient(create_app(service))

    def ask(**parameters: Any) -> Any:
        return client.post("/v1/predict", params=parameters, content=IMAGE.read_bytes())

    scores = [k["score"] for pose in ask().json()["poses"] for k in pose["keypoints"]]
    middle = float(np.median(scores))
    for threshold in (0.0, middle):
        answer = ask(keypoint_threshold=threshold).json()
        assert answer["keypoint_threshold"] == threshold
        for pose in answer["poses"]:
            keypoints = [k for k in pose["keypoints"] if k["score"] >= threshold] or pose["keypoints"]
            points = np.array([(k["x"], k["y"]) for k in keypoints])
            np.testing.assert_allclose(pose["box"], [*points.min(0), *points.max(0)], atol=0.01)
    drawings = [ask(format="image", keypoint_threshold=threshold).content for threshold in (0.0, middle, 1.0)]
    assert len(set(drawings)) == 3
    service.close()


def test_unknown_addresses_and_methods(server: ServerProcess) -> None:
    assert server.get("/v2")[0] == 404
    status, headers, answer = server.get("/v1/predict")
    assert (status, headers["Allow"], answer["detail"]) == (405, "POST", "GET /v1/predict: method not allowed")


def test_pages_about_the_server(server: ServerProcess, predictor: PosePredictor) -> None:
    assert server.get("/health")[2] == {"status": "ok"}
    model = server.get("/v1/model")[2]
    assert (model["model"], model["max_pixels"], model["max_poses"]) == ("small", LIMIT_PIXELS, 10)
    assert len(model["keypoint_names"]) == 17
    paths = server.get("/openapi.json")[2]["paths"]
    assert set(paths) == {"/v1/predict", "/v1/model", "/health", "/metrics"}
    operation = paths["/v1/predict"]["post"]
    assert set(operation["requestBody"]["content"]) == {"multipart/form-data", "image/*"}
    assert {"200", "413", "415", "422", "503"} <= set(operation["responses"])
    for path in ("/", "/docs"):
        status, headers, page = server.get(path)
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert not re.findall(r"https?://|src=|@import", page.decode()), "the page sends requests to other servers"
    described = server.get("/openapi.json")[2]
    for name in (*described["paths"], *described["components"]["schemas"], "keypoint_threshold", "image/png"):
        assert f"{name}</code>" in page.decode()


def test_only_this_machine_gets_in(server: ServerProcess) -> None:
    with pytest.raises(OSError, match=r"."):  # an address that is this machine's too, but not the one it listens on
        socket.create_connection(("127.0.0.2", server.port), 5)
    assert "other machines" not in server.output()


def metrics(server: ServerProcess) -> dict[str, float]:
    lines = server.get("/metrics")[2].decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_metrics_count_requests_and_failures_by_kind(server: ServerProcess) -> None:
    before = metrics(server)
    server.post(encoded())
    server.post(b"not an image")
    batches = before["hpetr_batch_size_count"] + 1
    server.wait_for(lambda: metrics(server)["hpetr_batch_size_count"] == batches)  # counted after the answer
    after = metrics(server)
    for name, rise in {
        "hpetr_requests_total": 2,
        'hpetr_failures_total{kind="not_a_picture"}': 1,
        "hpetr_request_seconds_count": 2,
        "hpetr_batch_size_count": 1,
        "hpetr_batch_seconds_count": 1,
    }.items():
        assert after[name] - before.get(name, 0) == rise, name
    assert after["hpetr_queue_length"] == after["hpetr_admitted"] == 0
    assert after["process_resident_memory_bytes"] > 1e6


def test_a_full_queue_refuses_and_a_client_that_leaves_frees_its_place(server: ServerProcess) -> None:
    begun = [server.begin_upload() for _ in range(QUEUE)]  # unfinished uploads count
    server.wait_for(lambda: metrics(server)["hpetr_admitted"] == QUEUE)
    status, headers, answer = server.post(encoded())
    assert (status, answer["kind"]) == (503, "queue_full")
    assert int(headers["Retry-After"]) >= 1
    assert server.get("/health")[0] == 200, "the server itself still answers"
    gone = metrics(server).get('hpetr_failures_total{kind="disconnected"}', 0)
    for connection in begun:
        connection.close()
    server.wait_for(lambda: metrics(server)["hpetr_admitted"] == 0)
    assert metrics(server)['hpetr_failures_total{kind="disconnected"}'] == gone + QUEUE
    assert server.post(encoded())[0] == 200


def test_concurrent_requests_get_their_own_poses(server: ServerProcess, predictor: PosePredictor) -> None:
    images = [encoded(40 + 8 * (seed % 3), 64, seed) for seed in range(16)]

    def ask(data: bytes) -> Any:
        while (answer := server.post(data))[0] == 503:
            time.sleep(0.01)
        return answer[2]

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, images))
    for data, answer in zip(images, answers, strict=True):
        expected = predictor([data])[0]
        got = [[(joint["x"], joint["y"]) for joint in pose["keypoints"]] for pose in answer["poses"]]
        np.testing.assert_allclose(got, expected.keypoints, atol=0.02)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--checkpoint", "nowhere"], "nowhere: no such folder"),
        (["--max-pixels", "1e9"], "expected at most Pillow's 178,956,970"),
        (["--max-megabytes", "0"], "max bytes is 0, expected more than 0"),
        (["--timeout", "-1"], "timeout is -1.0, expected more than 0"),
    ],
)
def test_bad_options_end_in_one_line(options: list[str], says: str) -> None:
    run = CliRunner().invoke(app, ["serve", "--port", "0", *options])
    assert run.exit_code == 2
    assert says in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_port_in_use_ends_in_one_line() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(InputError, match="address already in use"):
        listen("127.0.0.1", taken.getsockname()[1])


def test_the_example_client_of_the_docs_runs(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    code = code.replace("http://127.0.0.1:8000", server.url).replace("photo.jpg", str(IMAGE))
    exec(compile(code, "serve.md", "exec"), {})
    assert capsys.readouterr().out.startswith("10 poses")


# The queue in front of the model, without HTTP.


class Gate:
    """Stops a batcher after its first batch until it is opened, and records the sizes of all batches."""

    def __init__(self, batcher: Batcher) -> None:
        self.sizes: list[int] = []
        self.reached, self.open = threading.Event(), threading.Event()
        batcher.on_batch = self
        batcher.start()
        self.first = submit(batcher, encoded())
        assert self.reached.wait(SECONDS)

    def __call__(self, images: int, seconds: float) -> None:
        self.sizes.append(images)
        self.reached.set()
        self.open.wait(SECONDS)


def submit(batcher: Batcher, data: bytes, threshold: float = 0.0) -> Future[Any]:
    batcher.admit()
    job = Job(data, check_image(data, Limits()), threshold)
    batcher.submit(job)
    job.future.add_done_callback(lambda _: batcher.release())
    return job.future


def test_waiting_images_share_a_batch_when_they_need_no_padding(predictor: PosePredictor) -> None:
    batcher = Batcher(predictor, capacity=20, batch_size=3, max_pixels=10**6)
    gate = Gate(batcher)
    wide = [encoded(48, 64, seed) for seed in range(4)]
    tall = [encoded(64, 48, seed) for seed in range(2)]
    jobs = [submit(batcher, data) for pair in zip(wide, [*tall, wide[0], wide[1]], strict=True) for data in pair]
    broken = submit(batcher, encoded(48, 64)[:-300])
    gate.open.set()
    batcher.close(SECONDS)
    # The oldest and those like it; then the oldest of the rest; the broken one does not reach the network.
    assert gate.sizes == [1, 3, 2, 3]
    assert batcher.admitted == batcher.waiting == 0
    order = [data for pair in zip(wide, [*tall, wide[0], wide[1]], strict=True) for data in pair]
    for data, job in zip(order, jobs, strict=True):
        expected = predictor([data])[0]
        np.testing.assert_allclose(job.result().keypoints, expected.keypoints, atol=0.01)
    with pytest.raises(Refusal, match="the image cannot be read"):
        broken.result()


def test_a_batch_is_bounded_in_pixels(predictor: PosePredictor) -> None:
    batcher = Batcher(predictor, capacity=20, batch_size=8, max_pixels=2 * 48 * 64)
    gate = Gate(batcher)
    for _ in range(5):
        submit(batcher, encoded())
    gate.open.set()
    batcher.close(SECONDS)
    assert gate.sizes == [1, 2, 2, 1]


def test_each_of_a_batch_gets_its_threshold(predictor: PosePredictor) -> None:
    batcher = Batcher(predictor, capacity=20, batch_size=8, max_pixels=10**6)
    gate = Gate(batcher)
    scores = predictor([encoded()])[0].scores
    jobs = [submit(batcher, encoded(), threshold) for threshold in (0.0, float(scores[2] + scores[3]) / 2, 1.0)]
    gate.open.set()
    batcher.close(SECONDS)
    assert gate.sizes == [1, 3]
    assert [len(job.result()) for job in jobs] == [10, 3, 0]


def test_a_cancelled_image_leaves_the_queue(predictor: PosePredictor) -> None:
    batcher = Batcher(predictor, capacity=4, batch_size=1, max_pixels=10**6)
    gate = Gate(batcher)
    kept, dropped, also_kept = (submit(batcher, encoded()) for _ in range(3))
    assert (batcher.waiting, batcher.admitted) == (3, 3)
    dropped.cancel()
    assert (batcher.waiting, batcher.admitted) == (2, 2)
    gate.open.set()
    batcher.close(SECONDS)
    assert gate.sizes == [1, 1, 1]
    assert len(kept.result()) == len(also_kept.result()) == 10


def test_a_failure_of_the_model_is_answered_and_the_next_batch_runs(predictor: PosePredictor) -> None:
    batcher = Batcher(predictor, capacity=4, batch_size=1, max_pixels=10**6)
    batcher.start()
    head = predictor.model.backbone
    weights = next(head.parameters())
    saved = weights.data
    weights.data = torch.zeros(1)  # of a shape that no layer accepts
    failed = submit(batcher, encoded())
    with pytest.raises(RuntimeError):
        failed.result(SECONDS)
    weights.data = saved
    assert len(submit(batcher, encoded()).result(SECONDS)) == 10
    batcher.close(SECONDS)
    assert not batcher.alive


def test_requests_over_the_capacity_are_refused(predictor: PosePredictor) -> None:
    batcher = Batcher(predictor, capacity=2, batch_size=1, max_pixels=10**6)
    batcher.admit()
    batcher.admit()
    with pytest.raises(Refusal, match="all 2 places in the queue are taken, try again in 1 s"):
        batcher.admit()
    batcher.release()
    batcher.admit()


class ServerThread:
    """The application of a service in this process, on a free port."""

    def __init__(self, service: Service) -> None:
        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.server = make_server(service)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})

    def __enter__(self) -> ServerThread:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.listener.close()

    def send(self, data: bytes, announced: int | None = None) -> socket.socket:
        length = len(data) if announced is None else announced
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)
        head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode() + data)
        return connection


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_slow_upload_ends(predictor: PosePredictor) -> None:
    with ServerThread(Service(predictor, "small", Limits(timeout=0.5))) as server:
        with server.send(b"", announced=1000) as connection:
            assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_request_without_a_complete_head_ends(predictor: PosePredictor) -> None:
    """Neither a silent connection nor one that starts a second request keeps its place without limit."""
    with ServerThread(Service(predictor, "small", Limits(timeout=0.5))) as server:
        address = ("127.0.0.1", server.port)
        with socket.create_connection(address, SECONDS) as silent, socket.create_connection(address, SECONDS) as second:
            second.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            while b"the model has stopped" not in second.recv(4096):
                pass
            second.sendall(b"GET /hea")
            assert silent.recv(4096) == second.recv(4096) == b""


def test_silent_clients_on_all_connections_do_not_keep_others_out(
    predictor: PosePredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "MAX_CONNECTIONS", 8)
    with ServerThread(Service(predictor, "small", Limits(timeout=5))) as server, ExitStack() as silent:
        for _ in range(8):
            silent.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        with server.send(encoded()) as connection:
            assert whole_answer(connection).startswith("HTTP/1.1 503")

        def taken() -> bool:
            with server.send(b"text") as connection:
                return whole_answer(connection).startswith("HTTP/1.1 415")

        until(taken)


def test_a_connection_in_use_is_not_closed_as_silent() -> None:
    """The application is busy with one client for longer than the limit; another one is silent for as long."""

    async def busy(scope: Any, receive: Any, send: Any) -> None:
        await app.close_late()

    class Connection:
        def __init__(self, client: tuple[str, int]) -> None:
            self.client, self.closed, self.transport = client, False, self

        def close(self) -> None:
            self.closed = True

    app = HeadTimeout(busy, 0.0)
    active, silent = Connection(("127.0.0.1", 1)), Connection(("127.0.0.1", 2))
    app.connections = {active, silent}
    asyncio.run(app({"client": ("127.0.0.1", 1)}, None, None))
    assert (active.closed, silent.closed) == (False, True)


def whole_answer(connection: socket.socket) -> str:
    """All that comes until the server closes; the head and the body can come one after the other."""
    parts = []
    while part := connection.recv(4096):
        parts.append(part)
    return b"".join(parts).decode()


def test_clients_that_leave_or_wait_too_long_are_out_of_the_queue(predictor: PosePredictor) -> None:
    service = Service(predictor, "small", Limits(timeout=SECONDS))
    gate = Gate(service.batcher)  # the model is busy from here on
    with ServerThread(service) as server:
        gone = server.send(encoded())
        until(lambda: service.batcher.waiting == 1)
        gone.close()
        until(lambda: service.batcher.waiting == 0)
        service.limits = Limits(timeout=3)
        late = server.send(encoded())
        answer = whole_answer(late)
        assert answer.startswith("HTTP/1.1 504")
        assert "the poses were not ready within 3 s" in answer
        assert (service.batcher.waiting, service.batcher.admitted) == (0, 0)
        late.close()
        service.limits = Limits(timeout=SECONDS)
        gate.open.set()
        with server.send(encoded()) as third:
            assert third.recv(4096).startswith(b"HTTP/1.1 200")
    service.close()
    assert gate.sizes == [1, 1]
    assert not service.batcher.alive
