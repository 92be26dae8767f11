"""The HTTP application: routes, and one JSON form for everything that goes wrong."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from importlib.resources import files
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from hpetr import __version__
from hpetr.poses.predictor import Predictor
from hpetr.poses.result import PoseResult
from hpetr.server.batching import Batcher, Job
from hpetr.server.limits import FIELD, FORMAT_NAMES, Limits, Refusal, check_image, read_upload
from hpetr.server.metrics import Metrics
from hpetr.server.schemas import Health, ModelInfo, Prediction, Problem, to_prediction

logger = logging.getLogger(__name__)
T = TypeVar("T")

# The page is one file that asks nobody but this server.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' blob: data:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
CLIENT_CLOSED_REQUEST = 499  # nobody sees it; nginx's number
Threshold = Annotated[
    float | None, Query(ge=0, le=1, description="Poses with a higher score are given. Default: the model's own.")
]
IMAGE = {"type": "string", "format": "binary"}
BODY = {
    "required": True,
    "description": f"One image: {FORMAT_NAMES}.",
    "content": {
        "multipart/form-data": {"schema": {"type": "object", "required": [FIELD], "properties": {FIELD: IMAGE}}},
        "image/*": {"schema": IMAGE},
    },
}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "Empty upload, or a form that cannot be read."},
    408: {"model": Problem, "description": "The upload took too long."},
    413: {"model": Problem, "description": "Too many bytes or pixels."},
    415: {"model": Problem, "description": "Not an image."},
    422: {"model": Problem, "description": "Wrong form field or parameter, or a truncated or broken image."},
    500: {"model": Problem, "description": "The model failed."},
    503: {"model": Problem, "description": "The queue is full; `Retry-After` says when to come again."},
    504: {"model": Problem, "description": "The poses were not ready in time."},
}


class Service:
    """A model behind a bounded line, with its limits and metrics.

    Args:
        predictor: the model.
        name: of the model, as answers give it.
        limits: what requests may cost.
        batch_size: images that go through the network together at most; None takes the predictor's own.
    """

    def __init__(
        self, predictor: Predictor, name: str, limits: Limits | None = None, batch_size: int | None = None
    ) -> None:
        self.predictor, self.name, self.limits = predictor, name, limits or Limits()
        self.batcher = Batcher(
            predictor, self.limits.queue, batch_size or predictor.default_batch_size, self.limits.max_pixels
        )
        self.metrics = Metrics(lambda: self.batcher.waiting, lambda: self.batcher.admitted)
        self.batcher.on_batch = self._count_batch
        # Headers are read one at a time: a hostile one may take seconds, which must not stop the answers of others.
        self._header_reader = ThreadPoolExecutor(1, "hpetr-header")

    def start(self) -> None:
        """Try the model once, so that the first request does not wait for what is built at first use; start."""
        self.predictor(np.zeros((64, 64, 3), np.uint8))
        self.batcher.start()

    def close(self) -> None:
        """End after the requests that wait, within the time limit."""
        self.batcher.close(self.limits.timeout)
        self._header_reader.shutdown()

    @property
    def threshold(self) -> float:
        """Taken when a request names none."""
        return self.predictor.threshold

    async def predict(self, request: Request, threshold: float) -> PoseResult:
        """The poses of a request's image.

        Raises:
            Refusal: see `PROBLEMS`.
            ClientDisconnect: the client went away; its image is out of the line.
        """
        self.batcher.admit()
        submitted = False
        deadline = asyncio.get_running_loop().time() + self.limits.timeout
        try:
            data = await _until(deadline, read_upload(request, self.limits), self._late_upload())
            loop = asyncio.get_running_loop()
            check = loop.run_in_executor(self._header_reader, check_image, data, self.limits)
            job = Job(data, await _until(deadline, check, self._late()), threshold)
            self.batcher.submit(job)
            submitted = True
        finally:
            if not submitted:
                self.batcher.release()
        return await _until(deadline, _unless_gone(request, job), self._late())

    def info(self) -> ModelInfo:
        """What runs here."""
        skeleton = self.predictor.skeleton
        return ModelInfo(
            model=self.name,
            classes=self.predictor.class_names,
            keypoint_names=list(skeleton.names),
            edges=[list(edge) for edge in skeleton.edges],
            threshold=self.threshold,
            max_poses=self.predictor.num_poses,
            max_bytes=self.limits.max_bytes,
            max_pixels=self.limits.max_pixels,
            timeout=self.limits.timeout,
            device=self.predictor.device_name,
            version=__version__,
        )

    def _count_batch(self, images: int, seconds: float) -> None:
        self.metrics.batch_size.observe(images)
        self.metrics.inference.observe(seconds)

    def _late_upload(self) -> Refusal:
        seconds = f"{self.limits.timeout:g} s"
        return Refusal(HTTPStatus.REQUEST_TIMEOUT, "slow_upload", f"the upload did not arrive within {seconds}")

    def _late(self) -> Refusal:
        seconds = f"{self.limits.timeout:g} s"
        return Refusal(HTTPStatus.GATEWAY_TIMEOUT, "timeout", f"the poses were not ready within {seconds}")


async def _until(deadline: float, result: Awaitable[T], late: Refusal) -> T:
    try:
        async with asyncio.timeout_at(deadline):
            return await result
    except TimeoutError:
        raise late from None


async def _unless_gone(request: Request, job: Job) -> PoseResult:
    """Wait for the poses or for the client to go, whichever is first; an image that nobody waits for is dropped."""
    poses: asyncio.Future[PoseResult] = asyncio.wrap_future(job.future)
    gone = asyncio.ensure_future(request.receive())  # after the body there is only the end of the connection
    try:
        waits: set[asyncio.Future[Any]] = {poses, gone}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not poses.done():
            raise ClientDisconnect
        return poses.result()
    finally:
        gone.cancel()
        poses.cancel()


def create_app(service: Service) -> FastAPI:
    """The application of one service that has been started."""
    # The pages that FastAPI has for the description load scripts from other servers.
    app = FastAPI(title="hpetr", version=__version__, docs_url=None, redoc_url=None)
    _add_error_handlers(app, service.metrics)
    _add_prediction(app, service)
    page = files("hpetr.server").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"})

    @app.get("/v1/model")
    async def model() -> ModelInfo:
        """The model, its keypoints, and the limits on uploads."""
        return service.info()

    @app.get("/health", responses={503: {"model": Health, "description": "No images are taken."}})
    async def health() -> Health:
        """Whether images are taken."""
        if service.batcher.alive:
            return Health(status="ok")
        return JSONResponse({"status": "the model has stopped"}, HTTPStatus.SERVICE_UNAVAILABLE)  # type: ignore[return-value]

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}, "description": "For Prometheus."}})
    async def metrics() -> Response:
        """Requests, failures by kind, queue length, batch sizes, latencies, memory."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return app


def _add_prediction(app: FastAPI, service: Service) -> None:
    @app.post("/v1/predict", response_model=Prediction, responses=PROBLEMS, openapi_extra={"requestBody": BODY})
    async def predict(request: Request, threshold: Threshold = None) -> Response:
        """The poses of one image, which comes as the form field `file` or as the whole body."""
        wanted = service.threshold if threshold is None else threshold
        start = time.perf_counter()
        service.metrics.requests.inc()
        try:
            result = await service.predict(request, wanted)
        except Refusal as refusal:
            service.metrics.failures.labels(refusal.kind).inc()
            raise
        except ClientDisconnect:
            service.metrics.failures.labels("disconnected").inc()
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except Exception:
            service.metrics.failures.labels("internal").inc()
            raise
        finally:
            service.metrics.latency.observe(time.perf_counter() - start)
        prediction = to_prediction(result, service.name, service.predictor.class_names, wanted)
        return Response(prediction.model_dump_json(), media_type="application/json")


def _add_error_handlers(app: FastAPI, counted: Metrics) -> None:
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        headers = None if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        return _problem(error.status, error.kind, error.detail, headers)

    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        counted.requests.inc()
        counted.failures.labels("bad_parameter").inc()
        detail = f"{first['loc'][-1]} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
        return _problem(HTTPStatus.UNPROCESSABLE_ENTITY, "bad_parameter", detail)

    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        detail = f"{request.method} {request.url.path}: {HTTPStatus(error.status_code).phrase.lower()}"
        return _problem(error.status_code, "no_such_address", detail, error.headers)

    async def failed(request: Request, error: Exception) -> JSONResponse:
        return _problem(
            HTTPStatus.INTERNAL_SERVER_ERROR, "internal", "the server failed on this request; its log says why"
        )

    handlers: tuple[tuple[Any, Any], ...] = (
        (Refusal, refused),
        (RequestValidationError, invalid),
        (HTTPException, http_error),
        (Exception, failed),
    )
    for kind, handler in handlers:
        app.add_exception_handler(kind, handler)


def _problem(status: int, kind: str, detail: str, headers: Any = None) -> JSONResponse:
    return JSONResponse(Problem(kind=kind, detail=detail).model_dump(), status, headers=headers)
