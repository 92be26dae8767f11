"""The HTTP application: its routes, and one JSON form for every error."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from importlib.resources import files
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from hpetr import __version__
from hpetr.errors import suggestion
from hpetr.images.read import encode_image
from hpetr.poses.predictor import Predictor
from hpetr.poses.result import PoseResult
from hpetr.server.batching import Batcher, Job
from hpetr.server.description import description_page
from hpetr.server.limits import FIELD, FORMAT_NAMES, PROBLEMS, STATUS, Limits, Refusal, check_image, read_upload
from hpetr.server.metrics import Metrics
from hpetr.server.schemas import Health, ModelInfo, NoParameters, Parameters, Prediction, Problem, to_prediction

logger = logging.getLogger(__name__)

# The page is one file without requests to other servers.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' blob: data:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
CLIENT_CLOSED_REQUEST = 499  # nginx's number; no client receives it
IMAGE_TYPES = {"image/jpeg": ".jpg", "image/png": ".png"}
IMAGE = {"type": "string", "format": "binary"}
BODY = {
    "required": True,
    "description": f"One image: {FORMAT_NAMES}.",
    "content": {
        "multipart/form-data": {"schema": {"type": "object", "required": [FIELD], "properties": {FIELD: IMAGE}}},
        "image/*": {"schema": IMAGE},
    },
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {media_type: {"schema": IMAGE} for media_type in IMAGE_TYPES},
        "description": "The poses, or the image with the poses drawn.",
    },
    **{status: {"model": Problem, "description": text} for status, (text, *_) in PROBLEMS.items()},
}
NO_PARAMETER: dict[int | str, dict[str, Any]] = {422: {"model": Problem, "description": "Wrong parameter."}}


class Service:
    """A model behind a bounded queue, with its limits and metrics.

    Args:
        predictor: the model.
        name: of the model, in answers.
        limits: on requests.
        batch_size: maximum number of images in a forward pass; None takes the predictor's own.
    """

    def __init__(
        self, predictor: Predictor, name: str, limits: Limits | None = None, batch_size: int | None = None
    ) -> None:
        self.predictor, self.name, self.limits = predictor, name, limits or Limits()
        size = batch_size or predictor.default_batch_size
        self.batcher = Batcher(predictor, self.limits.queue, size, self.limits.max_pixels)
        self.metrics = Metrics(lambda: self.batcher.waiting, lambda: self.batcher.admitted)
        self.batcher.on_batch = self.metrics.count_batch
        # One at a time each: a hostile header may take seconds, and a decoded image much memory.
        self._header_reader = ThreadPoolExecutor(1, "hpetr-header")
        self._painter = ThreadPoolExecutor(1, "hpetr-drawing")

    def start(self) -> None:
        """Run the model once, so that the first request does not wait for its first use, and start the queue."""
        self.predictor(np.zeros((64, 64, 3), np.uint8))
        self.batcher.start()

    def close(self) -> None:
        """Answer the requests that wait, within the time limit, and stop."""
        self.batcher.close(self.limits.timeout)
        self._header_reader.shutdown()
        self._painter.shutdown()

    async def predict(self, request: Request, parameters: Parameters) -> Response:
        """Return the poses in a request's image as JSON, or drawn on the image.

        Raises:
            Refusal: see `PROBLEMS`.
            ClientDisconnect: the client closed the connection; its image is out of the queue.
        """
        threshold, keypoint_threshold = parameters.threshold, parameters.keypoint_threshold
        threshold = self.predictor.threshold if threshold is None else threshold
        image_type = _image_type(request, parameters)
        self.batcher.admit()
        job = None
        late = Refusal("slow_upload", f"the upload did not arrive within {self.limits.timeout:g} s")
        try:
            async with asyncio.timeout(self.limits.timeout):
                data = await read_upload(request, self.limits)
                late = Refusal("timeout", f"the poses were not ready within {self.limits.timeout:g} s")
                loop = asyncio.get_running_loop()
                size = await loop.run_in_executor(self._header_reader, check_image, data, self.limits)
                job = Job(data, size, threshold)
                self.batcher.submit(job)
                result = await _unless_gone(request, job)
                if keypoint_threshold is not None:
                    result = result.with_keypoint_threshold(keypoint_threshold)
                if image_type is not None:
                    drawing = await loop.run_in_executor(self._painter, _draw, data, result, image_type)
                    return Response(drawing, media_type=image_type)
        except TimeoutError:
            raise late from None
        finally:
            if job is None:
                self.batcher.release()
            else:  # an image in the network keeps its place
                job.future.add_done_callback(lambda _: self.batcher.release())
        prediction = to_prediction(result, self.name, self.predictor.class_names, threshold)
        return Response(prediction.model_dump_json(), media_type="application/json")

    def info(self) -> ModelInfo:
        """Return the description of the model and the limits."""
        skeleton = self.predictor.skeleton
        return ModelInfo(
            model=self.name,
            classes=self.predictor.class_names,
            keypoint_names=list(skeleton.names),
            edges=[list(edge) for edge in skeleton.edges],
            threshold=self.predictor.threshold,
            keypoint_threshold=self.predictor.keypoint_threshold,
            max_poses=self.predictor.num_poses,
            max_bytes=self.limits.max_bytes,
            max_pixels=self.limits.max_pixels,
            timeout=self.limits.timeout,
            device=self.predictor.device_name,
            version=__version__,
        )


def _image_type(request: Request, parameters: Parameters) -> str | None:
    """Return the media type of the drawing that a request asks for, None if it asks for JSON."""
    accepted = [name.partition(";")[0].strip().lower() for name in request.headers.get("accept", "").split(",")]
    by_header = next((name for name in accepted if name in IMAGE_TYPES), None)
    if parameters.format == "image" or (parameters.format is None and "image/*" in accepted):
        return by_header or "image/jpeg"
    return by_header if parameters.format is None else None


def _draw(data: bytes, result: PoseResult, image_type: str) -> bytes:
    return encode_image(result.draw(data), IMAGE_TYPES[image_type])


async def _unless_gone(request: Request, job: Job) -> PoseResult:
    """Wait for the poses, or for the client to close the connection, which takes the image out of the queue."""
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
    """Return the application of a started service."""
    # FastAPI's own pages for the description load scripts from other servers.
    app = FastAPI(title="hpetr", version=__version__, docs_url=None, redoc_url=None)
    _add_error_handlers(app, service.metrics)
    _add_prediction(app, service)
    page = files("hpetr.server").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"})

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def show_description() -> HTMLResponse:
        return HTMLResponse(description_page(app.openapi()), headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/v1/model", responses=NO_PARAMETER)
    async def model(parameters: Annotated[NoParameters, Query()]) -> ModelInfo:
        """The model, its keypoints, and the limits on uploads."""
        return service.info()

    @app.get("/health", responses={503: {"model": Health, "description": "No images are taken."}})
    async def health() -> Health:
        """Whether images are taken."""
        if service.batcher.alive:
            return Health(status="ok")
        return JSONResponse({"status": "the model has stopped"}, HTTPStatus.SERVICE_UNAVAILABLE)  # type: ignore[return-value]

    @app.get("/metrics", response_class=PlainTextResponse, response_description="For Prometheus.")
    async def metrics() -> Response:
        """Requests, failures by kind, queue length, batch sizes, latencies, memory."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return app


def _add_prediction(app: FastAPI, service: Service) -> None:
    @app.post("/v1/predict", response_model=Prediction, responses=RESPONSES, openapi_extra={"requestBody": BODY})
    async def predict(request: Request, parameters: Annotated[Parameters, Query()]) -> Response:
        """The poses in one image, sent as the form field `file` or as the whole body."""
        start = time.perf_counter()
        service.metrics.requests.inc()
        try:
            names = [name for name, _ in request.query_params.multi_items()]
            if twice := {name for name in names if names.count(name) > 1}:
                raise Refusal("bad_parameter", f"{min(twice)} is given more than once")
            return await service.predict(request, parameters)
        except ClientDisconnect:
            service.metrics.failures.labels("disconnected").inc()
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except Exception as error:
            service.metrics.failures.labels(error.kind if isinstance(error, Refusal) else "internal").inc()
            raise
        finally:
            service.metrics.latency.observe(time.perf_counter() - start)


def _add_error_handlers(app: FastAPI, counted: Metrics) -> None:
    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        headers = None if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        return _problem(STATUS[error.kind], error.kind, error.detail, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name, message = first["loc"][-1], first["msg"]
        detail = f"{name} is {first['input']!r}: {message[0].lower()}{message[1:]}"
        if first["type"] == "extra_forbidden":
            known = Parameters.model_fields if request.method == "POST" else ()
            expected = f"expected {', '.join(known) or 'none'}"
            detail = f"{name}: no such parameter, {suggestion(name, known, expected)}"
        if request.method == "POST":
            counted.requests.inc()
            counted.failures.labels("bad_parameter").inc()
        return _problem(STATUS["bad_parameter"], "bad_parameter", detail)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        detail = f"{request.method} {request.url.path}: {HTTPStatus(error.status_code).phrase.lower()}"
        return _problem(error.status_code, "no_such_address", detail, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return _problem(STATUS["internal"], "internal", "the server failed on this request; its log says why")


def _problem(status: int, kind: str, detail: str, headers: Any = None) -> JSONResponse:
    return JSONResponse(Problem(kind=kind, detail=detail).model_dump(), status, headers=headers)
