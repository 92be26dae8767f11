"""A real `hpetr serve` process on a free port, and a checkpoint that takes milliseconds an image."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from hpetr import HPetrConfig, HPetrForPoseEstimation, HPetrImageProcessor
from hpetr.checkpoints.folder import save_checkpoint
from training_runs import SMALL_MODEL

SECONDS = 600.0  # until a process counts as hanging, also on a busy machine


def save_small_checkpoint(folder: Path, threshold: float, **config: Any) -> None:
    """Save a model that finds ten people in every image, with keypoints apart from each other, unlike a fresh one."""
    torch.manual_seed(0)
    model = HPetrForPoseEstimation(HPetrConfig.preset("h-petr-nano", **SMALL_MODEL, **config))
    with torch.no_grad():
        for head in (*model.pose_decoder.keypoint_heads, *model.joint_decoder.heads, model.joint_decoder.score_head):
            if head is not None:
                head[-1].weight.normal_(std=0.05)
        for head in model.pose_decoder.class_heads:
            head.bias.fill_(0)
    processor = HPetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}, threshold=threshold)
    save_checkpoint(model, processor, folder)


class ServerProcess:
    """A process that starts on entry, and is killed at the end if it still runs.

    Attributes:
        url: http://127.0.0.1:PORT.
    """

    def __init__(self, *options: Any) -> None:
        self._log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hpetr.cli", "serve", "--port", "0", *map(str, options)],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.url, self.port = "", 0

    def __enter__(self) -> ServerProcess:
        self.wait_for(lambda: re.search(r"http://127.0.0.1:(\d+) ", self.output()))
        found = re.search(r"http://127.0.0.1:(\d+) ", self.output())
        assert found is not None
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()

    def output(self) -> str:
        """Return all output so far."""
        self._log.seek(0)
        return self._log.read()

    def wait_for(self, true: Callable[[], object]) -> None:
        """Wait until something is true; fail when the process ends or it takes too long."""
        end = time.monotonic() + SECONDS
        while not true():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < end, self.output()
            time.sleep(0.02)

    def post(
        self, body: bytes | Iterable[bytes], headers: dict[str, str] | None = None, query: str = ""
    ) -> tuple[int, Any, Any]:
        """Return status, headers, and JSON or bytes of POST /v1/predict."""
        return self._ask("POST", f"/v1/predict{query}", body, headers)

    def get(self, path: str) -> tuple[int, Any, Any]:
        """Return status, headers, and JSON or bytes of a page."""
        return self._ask("GET", path)

    def begin_upload(self, length: int = 1000) -> socket.socket:
        """Begin a request for poses, without its body."""
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.sendall(f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
        return connection

    def accepts(self) -> bool:
        """Return whether new connections are taken."""
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
        except ConnectionRefusedError:
            return False
        return True

    def _ask(
        self, method: str, path: str, body: bytes | Iterable[bytes] | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            connection.request(method, path, body, headers or {}, encode_chunked=not isinstance(body, bytes | None))
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, answer.headers, json.loads(data) if is_json else data
