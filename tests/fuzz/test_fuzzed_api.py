"""The HTTP API against its own description: schemathesis makes requests of it, and images are mutated."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import given
from hypothesis import strategies as st
from mutations import inputs, mutated_bytes, success_or_one_line, tried
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient
from test_fuzzed_images import FORMATS, encoded

from hpetr import HPetrImageProcessor, PosePredictor
from hpetr.checkpoints.folder import save_checkpoint
from hpetr.server.app import Service, create_app
from hpetr.server.limits import Limits
from tiny_model import tiny_model

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    processor = HPetrImageProcessor({"shortest_edge": 48, "longest_edge": 64}, threshold=0.0)
    save_checkpoint(tiny_model(num_keypoints=3, d_model=64), processor, folder)
    service = Service(PosePredictor(folder, device="cpu"), "tiny", Limits(max_bytes=100_000, max_pixels=100_000))
    service.start()
    yield service
    service.close()


@pytest.fixture(scope="module")
def client(service: Service) -> TestClient:
    return TestClient(create_app(service), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def operations(service: Service) -> list[schemathesis.APIOperation]:
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(service))
    found = [operation.ok() for operation in schema.get_all_operations()]
    assert {operation.path for operation in found} == {"/v1/predict", "/v1/model", "/health", "/metrics"}
    return found


@inputs(15, 10_000)
@given(data=st.data())
def test_requests_of_the_description(operations: list[schemathesis.APIOperation], data: st.DataObject) -> None:
    operation = data.draw(st.sampled_from([*operations, *[o for o in operations if o.method == "post"] * 3]))
    modes = list(GenerationMode) if operation.method == "post" else [GenerationMode.POSITIVE]
    case = data.draw(operation.as_strategy(generation_mode=data.draw(st.sampled_from(modes))))
    tried["HTTP API, requests of its description"] += 1
    case.call_and_validate(checks=CHECKS)


@inputs(25, 10_000)
@given(data=st.data())
def test_uploads(client: TestClient, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(FORMATS)))
    content = data.draw(mutated_bytes(encoded(name), first=200))
    threshold = data.draw(st.sampled_from(["", "0.5", "0", "1", "2", "-1", "nan", "x", "1e999", "é"]))
    with success_or_one_line("HTTP API, mutated images"):
        if data.draw(st.booleans()):
            answer = client.post("/v1/predict", content=content, params={"threshold": threshold})
        else:
            field = data.draw(st.sampled_from(["file", "file", "file", "image", ""]))
            files = {field: (data.draw(st.text(max_size=3)), content)}
            answer = client.post("/v1/predict", files=files, params={"threshold": threshold})
        assert answer.status_code in {200, 400, 413, 415, 422}, answer.text
        body = json.loads(answer.text)
        assert set(body) == {"kind", "detail"} or len(body["keypoint_names"]) == 3
        if answer.status_code != 200:
            assert len(body["detail"].splitlines()) == 1
