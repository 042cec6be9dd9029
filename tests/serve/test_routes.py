"""Every route except /v1/ask: search, images, samples, pages, status, and which hosts are allowed."""

import base64
import json
import re
import subprocess
import sys
from dataclasses import astuple

import httpx
import numpy as np
import pytest
from little_world import flag as little_flag
from little_world import png as little_png
from playback import BOXES, PlaybackPolicy, flag, png

from gog_edge.bundle import Sample
from gog_edge.config import Limits
from gog_edge.retrieval.registry import PackRegistry
from gog_edge.runtime import Runtime
from gog_edge.serve.pages import API_PAGE, KIOSK_PAGE, page_policy


def test_search_by_text_and_picture_in_one_batch(client):
    picture = base64.b64encode(png(flag("Italy"))).decode()
    body = {"queries": [{"text": "Romania", "question": "Which currency?"}, {"picture": picture},
                        {"sample": "three flags.png", "box": list(astuple(BOXES["France"]))}]}
    response = client.post("/v1/search", json=body)
    assert response.status_code == 200, response.text
    results = response.json()["results"]
    assert [result["evidence"][0]["titles"] for result in results] == [["Romania"], ["Italy"], ["France"]]
    assert results[0]["evidence"][0]["passages"][0]["text"].startswith("The currency")


def test_search_with_text_and_picture_is_two_searches(client):
    response = client.post("/v1/search", files={"picture": ("a.png", png(flag("Italy")))}, data={"text": "France"})
    results = response.json()["results"]
    assert [result["evidence"][0]["titles"] for result in results] == [["France"], ["Italy"]]


def test_each_box_of_a_picture_is_a_search(client):
    boxes = [list(astuple(BOXES[name])) for name in ("Romania", "France")]
    response = client.post("/v1/search", json={"sample": "three flags.png", "boxes": boxes})
    assert [result["evidence"][0]["titles"] for result in response.json()["results"]] == [["Romania"], ["France"]]


@pytest.fixture
def little(start, little_pack_folder, tiny_encoder, tmp_path):
    """A client of a server with the little world, searched for real."""
    picture = tmp_path / "two.png"
    picture.write_bytes(little_png(np.hstack([little_flag("Spain"), little_flag("Italy")])))
    packs = PackRegistry([little_pack_folder], tiny_encoder)
    runtime = Runtime("toy", PlaybackPolicy(), packs, Limits(), (Sample(picture, "Two", ()),))
    with httpx.Client(base_url=start(runtime), timeout=60) as client:
        yield client
    packs.close()


def test_a_fused_search_gives_one_cited_result(little):
    queries = [{"sample": "two.png", "boxes": [[0, 0, 60, 40], [60, 0, 120, 40]]}, {"text": "capital of Italy"}]
    response = little.post("/v1/search", json={"fuse": True, "queries": queries, "k": 3})
    assert response.status_code == 200, response.text
    (result,) = response.json()["results"]
    assert 0 < result["found"] <= 1 and len(result["evidence"]) == 3
    best, second = result["evidence"][:2]
    assert best["titles"] == ["Italy"] and second["titles"] == ["Spain"]
    assert {one["channel"]: one["rank"] for one in best["ranks"]} == {"image_to_image": 1, "words": 1}
    passage = best["passages"][0]
    assert (passage["pack"], passage["article"], passage["section"]) == ("little", "Italy", "Capital city")
    start, stop = passage["span"]
    assert stop - start == len(passage["text"]) and passage["paragraph"] and passage["licence"] == "CC0"
    image = little.get(f"/v1/images/{best['image']['pack']}/{best['image']['image']}")
    assert image.content == little_png(little_flag("Italy")) and best["image"]["licence"] == "MIT"
    assert best["score"] > second["score"] > 0


def test_results_of_single_queries_have_ranks(little):
    (result,) = little.post("/v1/search", json={"sample": "two.png", "box": [0, 0, 60, 40]}).json()["results"]
    assert result["evidence"][0]["ranks"] == [{"channel": "image_to_image", "rank": 1}]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"queries": [{"text": "a"}], "fuse": "yes"}, "'fuse' must be a valid boolean, got 'yes'"),
        ({"queries": [{"text": "a"}], "k": 3}, "needs 'fuse'"),
        ({"queries": [{"text": "a"}], "fuse": True, "k": 0}, "'k' must be greater than or equal to 1, got 0"),
        ({"queries": [{"text": "a"}], "fuse": True, "k": 51}, "'k' must be less than or equal to 50, got 51"),
        ({"queries": [{"text": "a"}], "fuse": True, "k": 2.5}, "'k' must be a valid integer, got 2.5"),
        ({"queries": [{"text": "a"}], "fuse": True, "k": True}, "'k' must be a valid integer, got True"),
        ({"fuse": True, "text": "a"}, "unknown field 'fuse'"),
        ({"sample": "three flags.png", "boxes": []}, "'boxes' must have at least 1 item, got []"),
        ({"sample": "three flags.png", "boxes": [[0, 0, 1]]}, "'boxes.0' must have at least 4 items"),
        ({"sample": "three flags.png", "boxes": [[0, 5, 9, 5]]}, "x0 < x1 and y0 < y1, got [0.0, 5.0, 9.0, 5.0]"),
        ({"sample": "three flags.png", "box": [0, 0, float("inf"), 5]}, "'box.2' must be a finite number"),
        ({"sample": "three flags.png", "boxes": [[0, 0, 1, 1]], "box": [0, 0, 1, 1]}, "one of them"),
        ({"text": "a", "boxes": [[0, 0, 1, 1]]}, "region of"),
        ({"queries": [{"sample": "three flags.png", "boxes": [[0, 0, 9, 9]] * 17}] * 2}, "at most 32 boxes, got 34"),
    ],
)
def test_an_invalid_search_is_refused_with_the_reason(client, body, message):
    content = json.dumps(body).encode()
    response = client.post("/v1/search", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 422 and message in response.json()["error"]["message"], response.text


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 422),
        ({"queries": []}, 422),
        ({"queries": [3]}, 422),
        ({"queries": [{"text": "a"}] * 17}, 422),
        ({"queries": [{"text": "a"}], "text": "b"}, 422),
        ({"text": "a", "box": [0, 0, 1, 1]}, 422),
        ({"sample": "three flags.png", "box": [5, 0, 1, 1]}, 422),
        ({"sample": "three flags.png", "box": "all"}, 422),
        ({"sample": "three flags.png", "box": [9000, 9000, 9001, 9001]}, 400),
        ({"text": "  "}, 400),
        ({"sample": "none"}, 404),
        ({"picture": "aGVsbG8="}, 400),
    ],
)
def test_status_of_invalid_searches(client, body, status):
    response = client.post("/v1/search", json=body)
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"type", "message"}


def test_the_sum_of_the_pictures_of_a_search_is_bounded(start, make_runtime):
    picture = flag("Italy")
    one = {"picture": base64.b64encode(png(picture)).decode()}
    pixels = picture.width * picture.height
    runtime = make_runtime(picture_pixels=3 * pixels // 2)  # so that three are too many, and two are not
    with httpx.Client(base_url=start(runtime), timeout=60) as client:
        assert client.post("/v1/search", json={"queries": [one] * 3}).status_code == 200
        response = client.post("/v1/search", json={"queries": [one] * 4})
    assert response.status_code == 413 and f"more than {3 * pixels // 2 * 2} pixels" in response.text


def test_image_of_a_pack(client):
    response = client.get("/v1/images/flags/2")
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    assert "max-age" in response.headers["cache-control"]
    assert response.content == png(flag("Romania"))
    again = client.get("/v1/images/flags/2", headers={"If-None-Match": response.headers["etag"]})
    assert again.status_code == 304 and again.content == b""


@pytest.mark.parametrize("path", ["/v1/images/flags/99", "/v1/images/none/1", "/v1/samples/none.png"])
def test_images_that_do_not_exist(client, path):
    response = client.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "NotFound"


@pytest.mark.parametrize("path", ["/v1/images/flags/x", "/redoc", "/v1/chat/completions", "/../a"])
def test_paths_that_do_not_exist(client, path):
    response = client.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "NoRoute"


def test_wrong_method(client):
    response = client.get("/v1/ask")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert set(client.post("/healthz").headers["allow"].split(", ")) == {"GET", "HEAD"}


@pytest.mark.parametrize("path", ["/", "/docs", "/healthz", "/metrics", "/openapi.json", "/v1/images/flags/1"])
def test_head_is_answered_like_get_without_the_body(client, path):
    head, get = client.head(path), client.get(path)
    assert head.status_code == get.status_code == 200 and head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]


def test_samples(client):
    (sample,) = client.get("/v1/samples").json()["samples"]
    assert sample["title"] == "Three flags" and len(sample["questions"]) == 2
    picture = client.get(sample["picture"])
    assert picture.status_code == 200 and picture.headers["content-type"] == "image/png"


def test_models_and_health(client):
    models = client.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["player"]
    assert models["limits"]["question_chars"] > 0
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready", "packs": []}


def test_metrics_count_by_outcome(client):
    client.post("/v1/ask", json={"sample": "three flags.png", "question": "Which?"})
    client.post("/v1/ask", json={"sample": "three flags.png", "question": ""})
    text = client.get("/metrics").text
    assert 'gog_edge_questions_total{outcome="answered"} 1' in text
    assert 'gog_edge_questions_total{outcome="refused"} 1' in text
    assert 'gog_edge_question_seconds_bucket{le="+Inf"} 1' in text
    assert "gog_edge_question_seconds_count 1" in text
    assert "python_info" not in text and "process_" not in text
    assert client.get("/metrics").headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_series_of_creation_times_are_omitted_here_and_kept_elsewhere():
    """In a process of its own, as an application that embeds this one and has metrics of its own."""
    code = ("from prometheus_client import Counter, generate_latest; from gog_edge.serve.metrics import Metrics; "
            "own = Metrics(lambda: 0, tuple).render().decode(); Counter('visits', 'Of the application.').inc(); "
            "assert 'gog_edge_questions_total' in own and '_created' not in own, own; "
            "assert 'visits_created' in generate_latest().decode()")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_each_application_has_metrics_of_its_own(start, make_runtime):
    urls = [start(make_runtime()) for _ in range(2)]
    httpx.post(urls[0] + "/v1/ask", json={"sample": "three flags.png", "question": "Which?"}, timeout=60)
    counts = [re.findall(r'outcome="answered"} (\S+)', httpx.get(url + "/metrics", timeout=60).text) for url in urls]
    assert counts == [["1.0"], ["0.0"]]


@pytest.mark.parametrize(("path", "page"), [("/", KIOSK_PAGE), ("/docs", API_PAGE)])
def test_pages_load_nothing_from_the_network(client, path, page):
    response = client.get(path)
    assert response.status_code == 200
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert policy.count("sha256-") == 2
    assert client.get(path, headers={"If-None-Match": response.headers["etag"]}).status_code == 304
    text = page.read_text(encoding="utf-8")
    assert "innerHTML" not in text and "insertAdjacentHTML" not in text
    assert "//" not in text.replace("http://www.w3.org/2000/svg", "").replace("//  ", "").split("<script>")[0]


def test_the_page_policy_allows_the_inline_blocks_by_hash():
    policy = page_policy("<style>a</style><script>b</script>")
    assert "style-src 'sha256-ypeBEsobvcr6wjGzmiPcTaeG7/gUfE5yuYB3ha/uSLs='" in policy
    assert "script-src 'sha256-PiPoFgA5WUoziU9lZOGxNIu9egCI1CxKy3PurtWcAJ0='" in policy


def test_every_response_has_the_security_headers(client):
    for path in ("/", "/healthz", "/nowhere", "/v1/images/flags/1"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "content-security-policy" in headers


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "evil.example:8080"])
def test_foreign_host_is_refused(client, host):
    response = client.get("/v1/samples", headers={"Host": host})
    assert response.status_code == 403
    assert response.json()["error"]["type"] == "Forbidden"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8080"])
def test_loopback_hosts_are_allowed(client, host):
    assert client.get("/healthz", headers={"Host": host}).status_code == 200


def test_requests_from_other_sites_are_refused(client):
    response = client.post("/v1/ask", headers={"Sec-Fetch-Site": "cross-site"}, content=b"")
    assert response.status_code == 403


def test_any_host_is_allowed_when_serving_other_machines(start, make_runtime):
    url = start(make_runtime(), hosts=None)
    assert httpx.get(url + "/healthz", headers={"Host": "museum.lan"}, timeout=60).status_code == 200
