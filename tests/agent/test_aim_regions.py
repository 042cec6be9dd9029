import numpy as np

from gog_edge.agent.actions import aim, picture_query
from gog_edge.config import GazeConfig
from gog_edge.picture import Picture
from gog_edge.retrieval.encoder import crops_of
from gog_edge.types import Box, GazeSearch, ImageSearch

PICTURE = Picture(np.random.default_rng(0).integers(0, 256, (80, 120, 3)).astype(np.uint8))
WHOLE = Box(0, 0, 120, 80)


def test_every_crop_says_where_it_was_cut():
    query = aim(GazeSearch(Box(20, 20, 60, 50)), PICTURE, "what?", GazeConfig()).query
    crops = crops_of(query)
    assert len(crops) == 1 + len(GazeConfig().framings) and {crop.picture for crop in crops} == {PICTURE.sha256}
    for crop in crops:
        assert (PICTURE.crop(crop.box) == crop.pixels).all()


def test_the_whole_picture_is_one_place_whichever_way_it_is_asked_for():
    asked = aim(ImageSearch(), PICTURE, "", GazeConfig()).query
    gazed = aim(GazeSearch(WHOLE), PICTURE, "", GazeConfig()).query
    assert asked.region == gazed.region == picture_query(PICTURE, "").region and asked.region.boxes == (WHOLE,)
    part = picture_query(PICTURE, "why?", Box(0, 0, 30, 40))
    assert part.pixels.shape == (40, 30, 3) and part.region.boxes == (Box(0, 0, 30, 40),) and part.question == "why?"
