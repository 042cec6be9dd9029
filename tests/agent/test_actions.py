"""Actions become queries: regions of crops, and the cache of an episode's results."""

import numpy as np
import pytest

from gog_edge.agent.actions import SearchCache, full_box, pad_box, picture_query, resolve_action
from gog_edge.config import GazeConfig
from gog_edge.picture import Picture
from gog_edge.retrieval.encoder import query_crops
from gog_edge.types import Box, GazeSearch, ImageSearch, SearchResult, Size

PICTURE = Picture(np.random.default_rng(0).integers(0, 256, (80, 120, 3)).astype(np.uint8))
WHOLE = Box(0, 0, 120, 80)


def test_every_crop_names_its_region():
    query = resolve_action(GazeSearch(Box(20, 20, 60, 50)), PICTURE, "what?", GazeConfig()).query
    crops = query_crops(query)
    assert len(crops) == 1 + len(GazeConfig().framings) and {crop.picture for crop in crops} == {PICTURE.sha256}
    for crop in crops:
        assert (PICTURE.crop(crop.box) == crop.pixels).all()


def test_a_gaze_at_the_whole_picture_has_the_region_of_the_whole_picture():
    asked = resolve_action(ImageSearch(), PICTURE, "", GazeConfig()).query
    gazed = resolve_action(GazeSearch(WHOLE), PICTURE, "", GazeConfig()).query
    assert asked.region == gazed.region == picture_query(PICTURE, "").region and asked.region.boxes == (WHOLE,)
    part = picture_query(PICTURE, "why?", Box(0, 0, 30, 40))
    assert part.pixels.shape == (40, 30, 3) and part.region.boxes == (Box(0, 0, 30, 40),) and part.question == "why?"


@pytest.mark.parametrize(
    ("box", "padded"),
    [(Box(40, 20, 60, 30), Box(38, 19, 62, 31)), (Box(0, 0, 120, 80), Box(0, 0, 120, 80)),
     (Box(110, 70, 120, 80), Box(109, 69, 120, 80))],
)
def test_padding_is_a_fraction_of_each_side_and_stays_inside(box, padded):
    assert pad_box(box, 0.1, Size(120, 80)) == padded
    assert full_box(Size(120, 80)) == WHOLE


def test_the_cache_matches_boxes_by_overlap_and_texts_by_words():
    cache, first, second = SearchCache(same_iou=0.9), SearchResult((), 0.1), SearchResult((), 0.2)
    cache.put(Box(0, 0, 100, 100), first)
    cache.put("Flag of  Peru", second)
    assert cache.get(Box(0, 0, 100, 95)) == SearchResult((), 0.1, cached=True)  # IoU 0.95
    assert cache.get(Box(0, 0, 100, 89)) is None  # IoU 0.89
    assert cache.get("flag OF peru\n") == SearchResult((), 0.2, cached=True)
    assert cache.get("flag of Chile") is None
