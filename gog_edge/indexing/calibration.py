"""Queries that a pack can answer and that it cannot, made of the pack itself: no outside data is needed.

What it cannot answer are looks at its own pictures, searched as if all that it has of their articles were not there,
and the names that it could have, by its own titles' letters, and has not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gog_edge.errors import PackError
from gog_edge.indexing.commit import changing, put_in_force
from gog_edge.indexing.index_planning import BATCH, look_at, sample_images
from gog_edge.picture import decode_picture
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.fusion import IMAGE_TO_CAPTION, Channels, Key, Look, Ranking, fuse, rank_words
from gog_edge.retrieval.manifest import IMAGE_FEATURES, TEXT_FEATURES, Calibration, Manifest
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.text.store import ImageRow, Store
from gog_edge.retrieval.text.words import name_key, raw_words
from gog_edge.retrieval.vectors.shards import Ids
from gog_edge.types import Vectors

MOST_ARTICLES = 16  # an image that stands in more of them is nobody's own: an icon, a flag beside a name
NEIGHBOURS = 64  # stored images among which near-duplicates of one are looked for
TITLES = 20_000  # whose letters are counted
PARAGRAPHS = 8  # of an article, whose sections are asked for
MOST_LETTERS = 14  # of a coined word
TRIES = 50  # to coin a name that is not taken


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Looks at things that are there and that are not; those of the same picture stand side by side."""

    present: list[Look]
    shows: list[frozenset[Key]]  # the articles of each of them
    absent: list[Look]


def held_out_looks(pack: Pack, encoder: Encoder, count: int, seed: int = 0) -> HeldOut:
    """Looks at up to `count` stored images (see `heldout.look_at`), in an order of chance.

    Each is searched as it is; where its articles have other images, also as if the image itself were not there; and as
    if all images of its articles and of near-duplicates' articles were not there: what is left is truly another thing.
    """
    found = HeldOut([], [], [])
    if not len(pack.images.shards):
        return found
    rng = np.random.default_rng([seed, 17])
    gone = np.array(sorted(pack.gone_images), dtype=np.int64)
    ids = rng.permutation(sample_images(pack.store.readers, gone, count, seed)).tolist()
    rows = pack.store.images(ids)
    channels = Channels([pack])
    own = [rows[image] for image in ids if 0 < len(rows[image].articles) <= MOST_ARTICLES]
    for row, vector in zip(own, _looks(pack, encoder, own, rng), strict=True):
        shows = frozenset((pack.name, article) for article in row.articles)
        siblings = _images_of(pack.store, row.articles)
        alone = siblings <= {row.id} | pack.gone_images
        for without in [None] if alone else [None, np.array([row.id], dtype=np.int64)]:
            found.present.append(_look(channels, vector, without))
            found.shows.append(shows)
        found.absent.append(_look(channels, vector, _family(pack, row, siblings)))
    return found


def _look(channels: Channels, vector: Vectors, without: Ids | None) -> Look:
    return channels.look([vector[None]], captions=lambda _: True, without=without)[0]


def _looks(pack: Pack, encoder: Encoder, rows: Sequence[ImageRow], rng: np.random.Generator) -> Iterator[Vectors]:
    for at in range(0, len(rows), BATCH):
        stored = [pack.store.picture(row.id) for row in rows[at : at + BATCH]]
        looks = [look_at(decode_picture(one.data).pixels, rng) for one in stored if one is not None]
        yield from encoder.embed_images(looks)


def _images_of(store: Store, articles: Collection[int]) -> set[int]:
    return {link.image for reader in store.readers for link in reader.links_in(articles)}


def _family(pack: Pack, row: ImageRow, siblings: set[int]) -> Ids:
    """An image, those of its articles, and near-duplicates with those of theirs: ids, sorted."""
    place = pack.images.shards.first_rows(np.array([row.id], dtype=np.int64))
    hits = pack.images.search(pack.images.shards.take(place), NEIGHBOURS)
    near = hits.ids[0][(hits.scores[0] >= pack.manifest.duplicate_cosine) & (hits.ids[0] >= 0)].tolist()
    articles = {article for one in pack.store.images(near).values() for article in one.articles}
    return np.array(sorted({row.id, *near} | siblings | _images_of(pack.store, articles)), dtype=np.int64)


# --- words --------------------------------------------------------------------------------------


def held_out_texts(store: Store, manifest: Manifest, count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Up to `count` queries that name an article, and as many of the same form with a name that is nobody's.

    A query is a title or another name, a title with a section's, or a caption that holds the title.
    """
    rng = np.random.default_rng([seed, 19])
    articles = _sample_articles(manifest, max(count, TITLES), rng)
    titles = store.titles(articles)
    coin = Coiner(list(titles.values()))
    present: list[str] = []
    absent: list[str] = []
    for article in articles[:count]:
        title = titles[article]
        name = coin.name(store, rng)
        if name is None or all(hit.article != article for hit in store.named([name_key(title)])):
            continue  # every sound is taken, or the article is gone
        forms = [title, *_longer_forms(store, article, title), *_redirect_near(store, title)]
        asked = forms[int(rng.integers(len(forms)))]
        present.append(asked)
        absent.append(asked.replace(title, name) if title in asked else name)
    return present, absent


def _sample_articles(manifest: Manifest, count: int, rng: np.random.Generator) -> list[int]:
    """Ids of articles of all segments, each once, in an order of chance; some may be gone."""
    spans = [segment.articles for segment in manifest.segments]
    sizes = [span.last - span.first + 1 for span in spans]
    starts = np.cumsum([0, *sizes])
    places = rng.choice(starts[-1], min(count, int(starts[-1])), replace=False)
    owners = np.searchsorted(starts, places, side="right") - 1
    return [spans[owner].first + int(place - starts[owner]) for owner, place in zip(owners, places, strict=True)]


def _longer_forms(store: Store, article: int, title: str) -> list[str]:
    first = store.leads([article]).get(article)
    rows = store.paragraphs(range(first, first + PARAGRAPHS)).values() if first else ()
    sections = dict.fromkeys(row.section for row in rows if row.title == title and row.section)
    captions = (link.caption for reader in store.readers for link in reader.links_in([article]))
    return [*(f"{title} {section}" for section in sections),
            *[caption for caption in captions if title in caption and caption != title][:1]]


def _redirect_near(store: Store, title: str) -> list[str]:
    """Another name of some article, from that place in the alphabet."""
    names = [name for reader in store.readers for name in reader.redirects(name_key(title), 1)]
    live = [name for name in names if store.named([name_key(name)])]
    return live[:1]


class Coiner:
    """Makes names that sound like a pack's own: each letter follows the two before it as it does in the titles."""

    def __init__(self, titles: Sequence[str]) -> None:
        self._follow: dict[str, list[str]] = {}
        self._lengths = [len(raw_words(title)) for title in titles]
        for word in (word for title in titles for word in raw_words(title)):
            letters = f"\n\n{word}\n"
            for at in range(2, len(letters)):
                self._follow.setdefault(letters[at - 2 : at], []).append(letters[at])

    def name(self, store: Store, rng: np.random.Generator) -> str | None:
        """A name that no article bears and that holds a word which the pack never uses; None where none comes."""
        for _ in range(TRIES if self._follow else 0):
            words = [self._word(rng) for _ in range(max(1, self._lengths[int(rng.integers(len(self._lengths)))]))]
            name = " ".join(words)
            if not store.named([name_key(name)]) and any(store.frequency(word.lower()) == 0 for word in words):
                return name
        return None

    def _word(self, rng: np.random.Generator) -> str:
        word = "\n\n"
        while len(word) < 2 + MOST_LETTERS:
            following = self._follow[word[-2:]]
            word += following[int(rng.integers(len(following)))]
            if word[-1] == "\n":
                break
        return word.strip()


RIDGE = 1e-3  # on standardised features: keeps separable data finite
STEPS = 50
LEAST = 20  # queries of each kind that a calibration needs; half of them are fitted to
TARGET_FALSE_ACCEPT = 0.05
QUERIES = 512  # pictures, and texts, that a pack is calibrated with
CAPTION_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0)
LEAST_GAIN = 0.02  # of recall or of accepted things, for which captions are worth a search of their own
Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Line:
    """logit = x @ weights + bias."""

    weights: Matrix  # [d]
    bias: float

    def logits(self, x: Matrix) -> Matrix:
        return x @ self.weights + self.bias


def calibrate_pack(folder: Path, encoder: Encoder | None, *, target_false_accept: float = TARGET_FALSE_ACCEPT,
                   queries: int = QUERIES, seed: int = 0) -> Manifest:
    """Calibrate a pack with looks at its own pictures and with its own words, and put the result in force.

    Where there are too few pictures or articles for a calibration, the manifest says that there is none.

    Args:
        folder: a pack; who has it open goes on with what it read.
        encoder: the pack's own; None for a pack of texts alone.
        target_false_accept: share, 0..1, of things that are not there that may count as found.
        queries: pictures, and texts, at most.
        seed: of what is drawn.

    Raises:
        PackError: no pack, another encoder, or another process writes it.
    """
    if not 0 <= target_false_accept < 1:
        raise PackError(f"a target of {target_false_accept} for false accepts; give a share from 0 to below 1")
    with changing(folder):
        pack = Pack.open(folder, encoder)
        try:
            image = _calibrate_looks_of(pack, encoder, target_false_accept, queries, seed)
            known, unknown = held_out_texts(pack.store, pack.manifest, queries, seed)
            text = calibrate_texts(pack, known, unknown, target_false_accept=target_false_accept) \
                if _enough(known, unknown) else None
        finally:
            pack.close()
        manifest = pack.manifest.calibrated(image, text)
        put_in_force(folder, manifest)
    return manifest


def _calibrate_looks_of(pack: Pack, encoder: Encoder | None, target: float, queries: int,
                        seed: int) -> Calibration | None:
    if encoder is None:
        return None
    looks = held_out_looks(pack, encoder, queries, seed)
    return calibrate_looks(looks, target) if _enough(looks.present, looks.absent) else None


def _enough(present: Sized, absent: Sized) -> bool:
    return min(len(present), len(absent)) >= LEAST


def calibrate_looks(looks: HeldOut, target_false_accept: float = TARGET_FALSE_ACCEPT) -> Calibration:
    """Fit to looks at things that a pack holds and that it does not, and weigh its captions by how they help."""
    features = [look.features for look in (*looks.present, *looks.absent)]
    labels = [1] * len(looks.present) + [0] * len(looks.absent)
    fit = fit_calibration(features, labels, names=IMAGE_FEATURES, target_false_accept=target_false_accept,
                          must_earn=("agreement",))
    half = len(looks.present) // 2
    return replace(fit, caption_weight=caption_weight(looks.present[:half], looks.shows[:half]))


def caption_weight(looks: Sequence[Look], shows: Sequence[frozenset[Key]]) -> float:
    """How much captions should count: the least of `CAPTION_WEIGHTS` that puts most of the right articles first."""
    recalls = [float(np.mean([first_of(look, weight) in right for look, right in zip(looks, shows, strict=True)]))
               for weight in CAPTION_WEIGHTS]
    best = int(np.argmax(recalls))
    return CAPTION_WEIGHTS[best] if recalls[best] >= recalls[0] + LEAST_GAIN else 0.0


def first_of(look: Look, weight: float) -> Key | None:
    """The article that comes first when captions have that weight; None where nothing was found."""
    captions = [Ranking(IMAGE_TO_CAPTION, ranks, weight) for ranks in look.captions.values() if weight]
    return next(iter(fuse([look.ranking, *captions])), None)


def calibrate_texts(pack: Pack, present: Sequence[str], absent: Sequence[str], *,
                    target_false_accept: float = TARGET_FALSE_ACCEPT) -> Calibration:
    """Fit to text queries that the pack can answer and that it cannot."""
    features = [rank_words(pack, text).features for text in (*present, *absent)]
    labels = [1] * len(present) + [0] * len(absent)
    return fit_calibration(features, labels, names=TEXT_FEATURES, target_false_accept=target_false_accept)


def fit_calibration(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    names: tuple[str, ...],
    target_false_accept: float = TARGET_FALSE_ACCEPT,
    must_earn: Sequence[str] = (),
) -> Calibration:
    """Fit a logistic model to the first half of each kind and measure it on the second; both kinds weigh alike.

    Args:
        features: [n, len(names)], one row a query, what belongs together (the same picture) side by side.
        labels: [n], 1 where the thing is in the pack, else 0.
        names: names of the columns.
        target_false_accept: share of absent things that may pass, 0..1.
        must_earn: columns that are left out unless they let more things be found.

    Raises:
        PackError: too few queries of a kind, or shapes that do not fit.
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if x.ndim != 2 or x.shape != (len(y), len(names)) or not np.isfinite(x).all():
        raise PackError(f"calibration: features {x.shape} for {len(y)} labels; wanted finite [n, {len(names)}]")
    present, absent = x[y > 0.5], x[y < 0.5]
    if not _enough(present, absent):
        raise PackError(f"calibration: {len(present)} present and {len(absent)} absent queries; give at least {LEAST} "
                        "of each")
    (fit_present, held_present), (fit_absent, held_absent) = (np.array_split(one, 2) for one in (present, absent))
    line = _fit(fit_present, fit_absent, target_false_accept)
    for name in must_earn:
        kept = (np.array(names) != name).astype(np.float64)
        without = _fit(fit_present * kept, fit_absent * kept, target_false_accept)
        gain = np.mean(line.logits(fit_present) >= 0) - np.mean(without.logits(fit_present * kept) >= 0)
        line = line if gain >= LEAST_GAIN else without
    return Calibration(
        features=names,
        weights=tuple(float(weight) for weight in line.weights),
        bias=line.bias,
        target_false_accept=target_false_accept,
        false_accept=float(np.mean(line.logits(held_absent) >= 0)),
        true_accept=float(np.mean(line.logits(held_present) >= 0)),
        present=len(present),
        absent=len(absent),
    )


def write_calibration(folder: Path, *, image: Calibration | None, text: Calibration | None) -> Manifest:
    """Put calibrations in force that were fitted elsewhere; who has the pack open keeps the old ones.

    Raises:
        PackError: no pack, or another process writes it.
    """
    with changing(folder) as manifest:
        calibrated = manifest.calibrated(image, text)
        put_in_force(folder, calibrated)
    return calibrated


def _fit(present: Matrix, absent: Matrix, target: float) -> _Line:
    """The line whose zero stands where at most `target` of the absent things pass."""
    x, y = np.concatenate([present, absent]), np.repeat([1.0, 0.0], [len(present), len(absent)])
    line = _fit_line(x, y, np.where(y > 0.5, 0.5 / len(present), 0.5 / len(absent)) * len(y))
    return _Line(line.weights, line.bias - _threshold(line.logits(present), line.logits(absent), target))


def _fit_line(x: Matrix, y: Matrix, cost: Matrix) -> _Line:
    """Weighted ridge logistic regression by Newton's method, on standardised columns."""
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale < 1e-9] = 1.0
    z = np.column_stack([(x - mean) / scale, np.ones(len(x))])  # [n, d + 1]
    ridge = np.full(z.shape[1], RIDGE * len(x))
    ridge[-1] = 0.0
    w = np.zeros(z.shape[1])
    for _ in range(STEPS):
        p = 1.0 / (1.0 + np.exp(-np.clip(z @ w, -60, 60)))
        gradient = z.T @ (cost * (p - y)) + ridge * w
        hessian = (z * (cost * p * (1 - p))[:, None]).T @ z + np.diag(ridge + 1e-9)
        step = np.linalg.solve(hessian, gradient)
        w = w - step
        if np.abs(step).max() < 1e-8:
            break
    weights = w[:-1] / scale
    return _Line(weights, float(w[-1] - mean @ weights))


def _threshold(present: Matrix, absent: Matrix, target: float) -> float:
    """A logit that one more absent thing reaches with a chance of at most `target`: split conformal prediction.

    Of n + 1 exchangeable things each is as likely as any other among the highest, so that the k-th highest of n, with
    k = target * (n + 1), is passed by the next one with a chance of k / (n + 1). With too few things, above them all.
    The logit lies halfway to the next one above, of either kind: rounding must not let equal things pass.
    """
    rank = max(1, int(np.floor(target * (len(absent) + 1))))
    lowest = float(np.sort(absent)[-rank])
    higher = np.concatenate([present, absent])
    higher = higher[higher > lowest]
    return 0.5 * (lowest + float(higher.min())) if len(higher) else lowest + 1.0
