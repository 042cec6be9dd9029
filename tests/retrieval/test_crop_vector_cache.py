from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gog_edge.retrieval.encoder import MAX_CROPS_PER_PICTURE, Crop, CropVectorCache, query_crops
from gog_edge.types import Box, ImageQuery, Region


def pixels(value):
    return np.full((2, 2, 3), value, dtype=np.uint8)


def crop(value, picture="", box=None):
    return Crop(pixels(value), picture, box)


class ColourEncoder:
    """Embeds a picture as its colour and records the calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, images):
        values = [int(image[0, 0, 0]) for image in images]
        self.calls.append(values)
        return np.array([[value, 1] for value in values], dtype=np.float32).reshape(-1, 2)


@pytest.fixture
def encode():
    return ColourEncoder()


@pytest.fixture
def cache():
    return CropVectorCache(capacity=100, same_iou=0.9)


BOX, NEAR, FAR = Box(0, 0, 100, 100), Box(0, 0, 95, 100), Box(0, 0, 60, 100)


def test_a_crop_that_nearly_covers_a_cached_one_gets_its_vector(cache, encode):
    first = cache.embed([crop(1, "a", BOX)], encode)
    again = cache.embed([crop(2, "a", NEAR), crop(3, "a", FAR), crop(4, "b", BOX)], encode)
    assert encode.calls == [[1], [3, 4]]
    assert again[0].tolist() == first[0].tolist() and again[:, 0].tolist() == [1, 3, 4]
    assert again.dtype == np.float32


def test_the_crop_with_the_largest_overlap_is_used(encode):
    cache = CropVectorCache(capacity=100, same_iou=0.5)
    cache.embed([crop(1, "a", BOX)], encode)
    cache.embed([crop(2, "a", Box(0, 0, 45, 100))], encode)
    assert cache.embed([crop(3, "a", Box(0, 0, 60, 100))], encode)[0, 0] == 2


def test_crops_of_one_call_share_vectors_and_keep_their_order(cache, encode):
    vectors = cache.embed([crop(1, "a", BOX), crop(2), crop(3, "a", NEAR), crop(2)], encode)
    assert encode.calls == [[1, 2, 2]]  # crops without a region are never shared
    assert vectors[:, 0].tolist() == [1, 2, 1, 2]


def test_no_crops_give_no_vectors(cache, encode):
    assert cache.embed([], encode).shape == (0, 2) and len(cache) == 0


def test_the_least_recently_used_picture_is_evicted(encode):
    cache = CropVectorCache(capacity=3, same_iou=0.9)
    for n, picture in enumerate("abc"):
        cache.embed([crop(n, picture, BOX)], encode)
    cache.embed([crop(9, "a", BOX)], encode)  # used again
    cache.embed([crop(3, "d", BOX)], encode)
    assert len(cache) == 3
    assert cache.embed([crop(8, "a", BOX), crop(8, "b", BOX)], encode)[:, 0].tolist() == [0, 8]


def test_one_picture_cannot_fill_the_cache(encode):
    cache = CropVectorCache(capacity=1_000, same_iou=0.9)
    for x in range(MAX_CROPS_PER_PICTURE + 20):
        cache.embed([crop(1, "a", Box(10 * x, 0, 10 * x + 10, 10))], encode)
    assert len(cache) == MAX_CROPS_PER_PICTURE


def test_an_error_of_the_encoder_caches_nothing(cache, encode):
    with pytest.raises(RuntimeError):
        cache.embed([crop(1, "a", BOX)], lambda images: (_ for _ in ()).throw(RuntimeError("no")))
    assert len(cache) == 0 and cache.embed([crop(5, "a", BOX)], encode)[0, 0] == 5


def test_many_threads_may_use_it(cache, encode):
    crops = [[crop(n % 7, str(n % 7), BOX), crop(n % 5, f"x{n % 5}", BOX)] for n in range(200)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda own: cache.embed(own, encode)[:, 0].tolist(), crops))
    assert found == [[n % 7, n % 5] for n in range(200)]


def test_each_view_of_a_query_has_its_region():
    query = ImageQuery(pixels(1), views=(pixels(2),), region=Region("a", (BOX, FAR)))
    assert [(one.picture, one.box, one.pixels[0, 0, 0]) for one in query_crops(query)] == [("a", BOX, 1), ("a", FAR, 2)]
    assert [one.box for one in query_crops(ImageQuery(pixels(1), views=(pixels(2),)))] == [None, None]
