"""/openapi.json describes what the server accepts and sends, and /docs renders it without the network."""

import base64
import json
import os
import shutil
from pathlib import Path

import httpx
import jsonschema
import pytest
from playback import QUESTION, SCRIPT, PlaybackPolicy, png, scene
from test_ask import read_events

from gog_edge.types import Answer

ROW = {"sample": "three flags.png", "question": QUESTION}
BOX = [400, 60, 520, 140]


@pytest.fixture
def document(client):
    response = client.get("/openapi.json")
    assert response.status_code == 200
    return response.json()


@pytest.fixture
def check(document):
    """Validates a value against a schema of the document."""

    def validate(value, schema):
        whole = {**schema, "components": document["components"]}
        jsonschema.Draft202012Validator(whole).validate(value)

    return validate


def declared(document, response, path=None):
    """The schema that the document declares for a response."""
    request = response.request
    operation = document["paths"][path or request.url.path][request.method.lower()]
    responses = operation["responses"]
    answer = responses.get(str(response.status_code)) or responses["4XX"]
    return answer["content"][response.headers["content-type"].split(";")[0]]["schema"]


def references(value):
    if isinstance(value, dict):
        yield from ([value["$ref"]] if "$ref" in value else [])
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from references(item)


def test_the_schemas_are_valid_and_all_references_resolve(document):
    assert document["openapi"].startswith("3.1") and document["info"]["title"] == "gog_edge"
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    found = set(references(document))
    assert found
    for reference in found:
        at = document
        for key in reference.removeprefix("#/").split("/"):
            at = at[key]
    used = {reference.split("/")[3] for reference in found}
    assert used == set(schemas)  # nothing is described that no operation has


def test_every_operation_has_a_description_and_an_id(document):
    operations = {(path, method): details for path, methods in document["paths"].items()
                  for method, details in methods.items()}
    assert {f"{method} {path}" for path, method in operations} == {
        "post /v1/ask", "post /v1/search", "get /v1/images/{pack}/{image}", "get /v1/samples",
        "get /v1/samples/{name}", "get /v1/models", "get /healthz", "get /readyz", "get /metrics"}
    assert all(details["description"] for details in operations.values())
    assert len({details["operationId"] for details in operations.values()}) == len(operations)


@pytest.mark.parametrize("path", ["/v1/samples", "/v1/models", "/healthz", "/readyz"])
def test_get_responses_match_their_schemas(client, document, check, path):
    response = client.get(path)
    check(response.json(), declared(document, response))


def test_an_answer_matches_its_schema(start, make_runtime, client, document, check):
    cited = client.post("/v1/ask", json=ROW)
    assert cited.json()["citations"] and not cited.json()["related"]
    url = start(make_runtime(PlaybackPolicy([SCRIPT[0], ("", Answer("a sort of money"))])))
    related = httpx.post(url + "/v1/ask", json=ROW, timeout=60)
    assert related.json()["related"] and not related.json()["citations"]
    direct = client.post("/v1/ask", json={**ROW, "workflow": "direct"})
    for response in (cited, related, direct):
        check(response.json(), declared(document, response))


def test_every_event_matches_its_schema(start, make_runtime, client, document, check):
    malformed = PlaybackPolicy([("Hmm.", None), *SCRIPT])
    failing = PlaybackPolicy(fault=RuntimeError("no details"))
    media = document["paths"]["/v1/ask"]["post"]["responses"]["200"]["content"]["text/event-stream"]
    event, data = (media["itemSchema"]["properties"][key] for key in ("event", "data"))
    kinds = set()
    for policy in (PlaybackPolicy(), malformed, failing):
        url = start(make_runtime(policy))
        reply = httpx.post(url + "/v1/ask", json=ROW, headers={"Accept": "text/event-stream"}, timeout=60)
        for kind, value in read_events(reply):
            check(kind, event)
            check(value, data["contentSchema"])
            kinds.add(kind)
    assert kinds == set(event["enum"])


@pytest.mark.parametrize(
    "body",
    [
        {"text": "Romania"},
        {"sample": "three flags.png", "box": BOX},
        {"sample": "three flags.png", "boxes": [BOX, [40, 60, 160, 140]], "text": "France", "question": "What?"},
        {"queries": [{"text": "Italy"}, {"sample": "three flags.png"}]},
    ],
)
def test_searches_match_their_schemas(client, document, check, body):
    check(body, document["paths"]["/v1/search"]["post"]["requestBody"]["content"]["application/json"]["schema"])
    response = client.post("/v1/search", json=body)
    assert response.status_code == 200, response.text
    check(response.json(), declared(document, response))


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/ask", {**ROW, "colour": 1}, 422),
        ("/v1/ask", {**ROW, "budget": {"turns": 0}}, 422),
        ("/v1/ask", {**ROW, "workflow": "hasty"}, 422),
        ("/v1/search", {"queries": []}, 422),
        ("/v1/search", {"queries": [{"text": 3}]}, 422),
        ("/v1/search", {"text": "a", "box": [0, 1, 2]}, 422),
    ],
)
def test_bodies_that_the_schema_refuses_are_refused(client, document, check, path, body, status):
    with pytest.raises(jsonschema.ValidationError):
        check(body, document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"])
    response = client.post(path, json=body)
    assert response.status_code == status
    check(response.json(), declared(document, response))


@pytest.mark.parametrize(
    "body",
    [
        ROW,
        {**ROW, "workflow": "full_image", "budget": {"turns": 2, "tokens": 100, "deadline_ms": 1000}},
        {"picture": base64.b64encode(png(scene())).decode(), "question": QUESTION},
        {"picture": None, **ROW},
    ],
)
def test_bodies_that_the_schema_allows_are_answered(client, document, check, body):
    check(body, document["paths"]["/v1/ask"]["post"]["requestBody"]["content"]["application/json"]["schema"])
    assert client.post("/v1/ask", json=body).status_code == 200


def test_the_multipart_form_has_the_declared_fields(client, document):
    form = document["paths"]["/v1/ask"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"].keys() == {"picture", "sample", "question", "workflow", "budget"}
    fields = {"question": QUESTION, "workflow": "gog", "budget": json.dumps({"turns": 3})}
    assert client.post("/v1/ask", files={"picture": png(scene())}, data=fields).status_code == 200


@pytest.mark.parametrize(
    ("path", "template"),
    [("/v1/images/none/1", "/v1/images/{pack}/{image}"), ("/v1/samples/none.png", "/v1/samples/{name}")],
)
def test_missing_pictures_match_the_error_schema(client, document, check, path, template):
    response = client.get(path)
    assert response.status_code == 404
    check(response.json(), declared(document, response, template))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_page_shows_every_operation_and_schema(start, make_runtime):
    playwright = pytest.importorskip("playwright.sync_api")
    url = start(make_runtime())
    document = httpx.get(url + "/openapi.json", timeout=60).json()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"),
                                         args=["--headless", "--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        hosts, problems = set(), []
        page.on("request", lambda request: hosts.add(request.url.split("/")[2] if "://" in request.url else ""))
        page.on("console", lambda line: problems.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url + "/docs")
        page.wait_for_selector("#Workflow")
        shown = page.inner_text("body")
        if folder := os.environ.get("KIOSK_SHOTS"):
            page.screenshot(path=Path(folder) / "api.png", full_page=True)
        sections = page.evaluate("[...document.querySelectorAll('section')].map((section) => section.id)")
        links = page.evaluate("[...document.querySelectorAll('a[href^=\"#\"]')].map((link) => link.hash.slice(1))")
        browser.close()
    operations = [details["operationId"] for methods in document["paths"].values() for details in methods.values()]
    assert sections == [*operations, *document["components"]["schemas"]]
    assert set(links) <= set(sections) and "undefined" not in shown and "[object" not in shown
    assert "multipart/form-data" in shown and "text/event-stream" in shown
    assert hosts - {""} == {url.split("/")[2]} and problems == []
