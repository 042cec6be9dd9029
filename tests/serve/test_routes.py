"""Everything but asking: search, images, samples, the page, and who may come."""

import base64
from dataclasses import astuple

import httpx
import numpy as np
import pytest
from little_world import flag as little_flag
from little_world import png as little_png
from played import BOXES, Player, flag, png

from gog_edge.bundle import Sample
from gog_edge.config import Limits
from gog_edge.retrieval.registry import Shelf
from gog_edge.runtime import Runtime
from gog_edge.serve.app import PAGE
from gog_edge.serve.security import page_policy


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
    shelf = Shelf([little_pack_folder], tiny_encoder)
    runtime = Runtime("toy", Player(), shelf, Limits(), (Sample(picture, "Two", ()),))
    with httpx.Client(base_url=start(runtime), timeout=60) as client:
        yield client
    shelf.close()


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


def test_unfused_results_say_their_ranks_too(little):
    (result,) = little.post("/v1/search", json={"sample": "two.png", "box": [0, 0, 60, 40]}).json()["results"]
    assert result["evidence"][0]["ranks"] == [{"channel": "image_to_image", "rank": 1}]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"queries": [{"text": "a"}], "fuse": "yes"}, "'fuse' is 'yes'"),
        ({"queries": [{"text": "a"}], "k": 3}, "needs 'fuse'"),
        ({"queries": [{"text": "a"}], "fuse": True, "k": 0}, "from 1 to 50"),
        ({"queries": [{"text": "a"}], "fuse": True, "k": 51}, "from 1 to 50"),
        ({"queries": [{"text": "a"}], "fuse": True, "k": 2.5}, "from 1 to 50"),
        ({"queries": [{"text": "a"}], "fuse": True, "k": True}, "from 1 to 50"),
        ({"fuse": True, "text": "a"}, "unknown field 'fuse'"),
        ({"sample": "three flags.png", "boxes": []}, "an empty one"),
        ({"sample": "three flags.png", "boxes": [[0, 0, 1]]}, "x0 < x1"),
        ({"sample": "three flags.png", "boxes": [[0, 0, 1, 1]], "box": [0, 0, 1, 1]}, "one of them"),
        ({"text": "a", "boxes": [[0, 0, 1, 1]]}, "cut from"),
        ({"queries": [{"sample": "three flags.png", "boxes": [[0, 0, 9, 9]] * 17}] * 2}, "34 boxes"),
    ],
)
def test_a_fused_search_says_what_is_wrong(client, body, says):
    response = client.post("/v1/search", json=body)
    assert response.status_code == 422 and says in response.json()["error"]["message"], response.text


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
def test_wrong_search(client, body, status):
    response = client.post("/v1/search", json=body)
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"type", "message"}


def test_pictures_of_one_search_are_bounded_together(start, make_runtime):
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
def test_image_that_is_not_there(client, path):
    response = client.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "NotFound"


@pytest.mark.parametrize("path", ["/v1/images/flags/x", "/docs", "/openapi.json", "/v1/chat/completions", "/../a"])
def test_path_that_is_not_served(client, path):
    response = client.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "NoRoute"


def test_wrong_method(client):
    response = client.get("/v1/ask")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"


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


def test_page_may_load_nothing_from_elsewhere(client):
    response = client.get("/")
    assert response.status_code == 200
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert policy.count("sha256-") == 2
    assert client.get("/", headers={"If-None-Match": response.headers["etag"]}).status_code == 304
    text = PAGE.read_text(encoding="utf-8")
    assert "innerHTML" not in text and "insertAdjacentHTML" not in text
    assert "//" not in text.replace("http://www.w3.org/2000/svg", "").replace("//  ", "").split("<script>")[0]


def test_page_policy_names_the_blocks_by_hash():
    policy = page_policy("<style>a</style><script>b</script>")
    assert "style-src 'sha256-ypeBEsobvcr6wjGzmiPcTaeG7/gUfE5yuYB3ha/uSLs='" in policy
    assert "script-src 'sha256-PiPoFgA5WUoziU9lZOGxNIu9egCI1CxKy3PurtWcAJ0='" in policy


def test_every_response_is_guarded(client):
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
def test_own_host_is_served(client, host):
    assert client.get("/healthz", headers={"Host": host}).status_code == 200


def test_other_sites_may_not_post(client):
    response = client.post("/v1/ask", headers={"Sec-Fetch-Site": "cross-site"}, content=b"")
    assert response.status_code == 403


def test_any_host_when_serving_others(start, make_runtime):
    url = start(make_runtime(), hosts=None)
    assert httpx.get(url + "/healthz", headers={"Host": "museum.lan"}, timeout=60).status_code == 200
