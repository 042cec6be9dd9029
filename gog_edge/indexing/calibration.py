"""Calibrates the probability that the subject of a query is in a pack, from queries that the pack itself provides.

Present subjects are random views of stored images and names of articles. Absent subjects are the same views searched as
if the images of their articles were not stored, and generated names that resemble the pack's titles.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gog_edge.errors import PackError
from gog_edge.indexing.commit import modify_pack, publish_manifest
from gog_edge.indexing.vectors.embedding import BATCH, random_view, sample_images
from gog_edge.picture import decode_picture
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.fusion import (
    IMAGE_TO_CAPTION,
    ArticleKey,
    ImageMatches,
    Ranking,
    VectorChannels,
    fuse,
    match_paragraphs,
    rank_articles,
)
from gog_edge.retrieval.manifest import IMAGE_FEATURES, TEXT_FEATURES, Calibration, Manifest
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.text.encoder import TextEncoder
from gog_edge.retrieval.text.store import ImageRow, Store
from gog_edge.retrieval.text.tokens import name_key, tokenize
from gog_edge.retrieval.vectors.shards import Ids
from gog_edge.types import Vectors

TARGET_FALSE_ACCEPT = 0.05
QUERIES = 512  # images, and texts, that a pack is calibrated with
MIN_QUERIES = 20  # present and absent ones that a calibration needs; half of them are fitted to
CAPTION_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0)
MIN_GAIN = 0.02  # of recall or of accepted queries, from which searching captions is worth its time


def calibrate_pack(folder: Path, encoder: Encoder | None, *, target_false_accept: float = TARGET_FALSE_ACCEPT,
                   queries: int = QUERIES, seed: int = 0, text_encoder: TextEncoder | None = None) -> Manifest:
    """Calibrate a pack and write the result into its manifest.

    A channel with too few images or articles has no calibration in the manifest.

    Args:
        folder: the pack. Processes that have it open keep the calibration that they read.
        encoder: the pack's encoder; None for a pack without images.
        target_false_accept: share, 0..1, of absent subjects that may count as found.
        queries: maximum number of images, and of texts.
        seed: of the random queries.
        text_encoder: the pack's text encoder; None for a pack without vectors of paragraphs.

    Raises:
        PackError: there is no pack, an encoder differs, or another process writes the pack.
    """
    if not 0 <= target_false_accept < 1:
        raise PackError(f"the target of false accepts must be from 0 to below 1, got {target_false_accept}")
    with modify_pack(folder):
        pack = Pack.open(folder, encoder, text_encoder=text_encoder)
        try:
            if pack.manifest.text_encoder is not None and text_encoder is None:
                raise PackError(f"pack '{pack.name}' has vectors of paragraphs; calibrate it with its text encoder "
                                f"'{pack.manifest.text_encoder.name}'")
            image = _calibrate_images(pack, encoder, target_false_accept, queries, seed)
            present, absent = held_out_text_queries(pack.store, pack.manifest, queries, seed)
            text = calibrate_texts(
                pack, present, absent, target_false_accept=target_false_accept, text_encoder=text_encoder
            ) if _suffice(present, absent) else None  # fmt: skip
        finally:
            pack.close()
        manifest = pack.manifest.with_calibration(image, text)
        publish_manifest(folder, manifest)
    return manifest


def write_calibration(folder: Path, *, image: Calibration | None, text: Calibration | None) -> Manifest:
    """Write given calibrations into the manifest of a pack.

    Raises:
        PackError: there is no pack, or another process writes it.
    """
    with modify_pack(folder) as manifest:
        calibrated = manifest.with_calibration(image, text)
        publish_manifest(folder, calibrated)
    return calibrated


def _calibrate_images(pack: Pack, encoder: Encoder | None, target: float, queries: int,
                      seed: int) -> Calibration | None:
    if encoder is None:
        return None
    held_out = held_out_image_queries(pack, encoder, queries, seed)
    return calibrate_images(held_out, target) if _suffice(held_out.present, held_out.absent) else None


def _suffice(present: Sized, absent: Sized) -> bool:
    return min(len(present), len(absent)) >= MIN_QUERIES


# --- image queries ------------------------------------------------------------------------------

MAX_ARTICLES = 16  # an image of more articles is a symbol and does not represent any of them
DUPLICATE_CANDIDATES = 64  # nearest images that are compared with the duplicate cosine


@dataclass(frozen=True, slots=True)
class HeldOutImageQueries:
    """Matches of image queries whose subject is present or absent; those of the same image are adjacent."""

    present: list[ImageMatches]
    articles: list[frozenset[ArticleKey]]  # correct articles of each present query
    absent: list[ImageMatches]


def held_out_image_queries(pack: Pack, encoder: Encoder, count: int, seed: int = 0) -> HeldOutImageQueries:
    """Search random views of up to `count` stored images, in random order.

    Each view is searched over the whole pack; without the image itself if its articles have other images; and without
    all images of its articles and of the articles of near-duplicates, so that its subject is absent.
    """
    found = HeldOutImageQueries([], [], [])
    if not len(pack.images.shards):
        return found
    rng = np.random.default_rng([seed, 17])
    deleted = np.array(sorted(pack.deleted_images), dtype=np.int64)
    ids = rng.permutation(sample_images(pack.store.readers, deleted, count, seed)).tolist()
    rows = pack.store.images(ids)
    channels = VectorChannels([pack])
    sampled = [rows[image] for image in ids if 0 < len(rows[image].articles) <= MAX_ARTICLES]
    for row, vector in zip(sampled, _embed_views(pack, encoder, sampled, rng), strict=True):
        articles = frozenset((pack.name, article) for article in row.articles)
        siblings = _images_of(pack.store, row.articles)
        only_image = siblings <= {row.id} | pack.deleted_images
        for without in [None] if only_image else [None, np.array([row.id], dtype=np.int64)]:
            found.present.append(_match(channels, vector, without))
            found.articles.append(articles)
        found.absent.append(_match(channels, vector, _related_images(pack, row, siblings)))
    return found


def _match(channels: VectorChannels, vector: Vectors, without: Ids | None) -> ImageMatches:
    return channels.match_images([vector[None]], captions=lambda _: True, without=without)[0]


def _embed_views(pack: Pack, encoder: Encoder, rows: Sequence[ImageRow], rng: np.random.Generator) -> Iterator[Vectors]:
    for at in range(0, len(rows), BATCH):
        files = [pack.store.image_file(row.id) for row in rows[at : at + BATCH]]
        views = [random_view(decode_picture(file.data).pixels, rng) for file in files if file is not None]
        yield from encoder.embed_images(views)


def _images_of(store: Store, articles: Collection[int]) -> set[int]:
    return {link.image for reader in store.readers for link in reader.links_of_articles(articles)}


def _related_images(pack: Pack, row: ImageRow, siblings: set[int]) -> Ids:
    """Return the sorted ids of an image, of its articles' images, and of near-duplicates with their articles'."""
    position = pack.images.shards.first_rows(np.array([row.id], dtype=np.int64))
    hits = pack.images.search(pack.images.shards.take(position), DUPLICATE_CANDIDATES)
    near = hits.ids[0][(hits.scores[0] >= pack.manifest.duplicate_cosine) & (hits.ids[0] >= 0)].tolist()
    articles = {article for image in pack.store.images(near).values() for article in image.articles}
    return np.array(sorted({row.id, *near} | siblings | _images_of(pack.store, articles)), dtype=np.int64)


def calibrate_images(queries: HeldOutImageQueries, target_false_accept: float = TARGET_FALSE_ACCEPT) -> Calibration:
    """Fit the image calibration, and choose the weight of the captions in the ranking."""
    features = [matches.features for matches in (*queries.present, *queries.absent)]
    labels = [1] * len(queries.present) + [0] * len(queries.absent)
    fit = fit_calibration(features, labels, names=IMAGE_FEATURES, target_false_accept=target_false_accept,
                          optional=("agreement",))
    half = len(queries.present) // 2
    return replace(fit, caption_weight=caption_weight(queries.present[:half], queries.articles[:half]))


def caption_weight(queries: Sequence[ImageMatches], articles: Sequence[frozenset[ArticleKey]]) -> float:
    """Return the smallest of CAPTION_WEIGHTS that ranks most correct articles first; 0 if the gain is small."""
    recalls = [float(np.mean([top_article(matches, weight) in correct
                              for matches, correct in zip(queries, articles, strict=True)]))
               for weight in CAPTION_WEIGHTS]
    best = int(np.argmax(recalls))
    return CAPTION_WEIGHTS[best] if recalls[best] >= recalls[0] + MIN_GAIN else 0.0


def top_article(matches: ImageMatches, weight: float) -> ArticleKey | None:
    """Return the article that is ranked first with this weight of the captions; None if nothing was found."""
    captions = [Ranking(IMAGE_TO_CAPTION, ranks, weight) for ranks in matches.captions.values() if weight]
    return next(iter(fuse([matches.ranking, *captions])), None)


# --- text queries -------------------------------------------------------------------------------

MODEL_TITLES = 20_000  # that the letter model is built from
MODEL_PARAGRAPHS = 8  # of an article, whose sections are used in queries
MAX_WORD_LETTERS = 14  # of a generated word
MAX_TRIES = 50  # to generate a name that does not exist
# A word as written, with the vowel signs that \w does not include.
_WORD = re.compile(r"[^\W_](?:[^\W_]|[^\x00-\xbf\s\u2000-\u206f\u3000-\u303f\uff00-\uff0f])*")


def held_out_text_queries(store: Store, manifest: Manifest, count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Return up to `count` queries that name an article, and as many of the same form with a generated name.

    A query is a title or a redirect, a title with a section title, or a caption that contains the title.
    """
    rng = np.random.default_rng([seed, 19])
    articles = _sample_articles(manifest, max(count, MODEL_TITLES), rng)
    titles = {article: title for reader in store.readers for article, title in reader.titles(articles).items()}
    generator = NameGenerator(list(titles.values()))
    present: list[str] = []
    absent: list[str] = []
    # Ids of deleted articles have no title any more once the pack was compacted.
    for article in [article for article in articles if article in titles][:count]:
        title = titles[article]
        name = generator.generate(store, rng)
        if name is None or all(match.article != article for match in store.find_names([name_key(title)])):
            continue  # no free name was found, or the article is deleted
        forms = [title, *_longer_forms(store, article, title), *_redirect_near(store, title)]
        query = forms[int(rng.integers(len(forms)))]
        present.append(query)
        absent.append(query.replace(title, name) if title in query else name)
    return present, absent


def _sample_articles(manifest: Manifest, count: int, rng: np.random.Generator) -> list[int]:
    """Return distinct ids of articles of all segments in random order; some may be deleted."""
    ranges = [segment.articles for segment in manifest.segments]
    sizes = [ids.last - ids.first + 1 for ids in ranges]
    starts = np.cumsum([0, *sizes])
    places = rng.choice(starts[-1], min(count, int(starts[-1])), replace=False)
    owners = np.searchsorted(starts, places, side="right") - 1
    return [ranges[owner].first + int(place - starts[owner]) for owner, place in zip(owners, places, strict=True)]


def _longer_forms(store: Store, article: int, title: str) -> list[str]:
    """Return the title with each of its sections, and a caption that contains the title."""
    first = store.lead_paragraphs([article]).get(article)
    rows = store.paragraphs(range(first, first + MODEL_PARAGRAPHS)).values() if first else ()
    sections = dict.fromkeys(row.section for row in rows if row.title == title and row.section)
    captions = (link.caption for reader in store.readers for link in reader.links_of_articles([article]))
    return [*(f"{title} {section}" for section in sections),
            *[caption for caption in captions if title in caption and caption != title][:1]]


def _redirect_near(store: Store, title: str) -> list[str]:
    """Return a live redirect that follows the title in the alphabet, if there is one nearby."""
    names = [name for reader in store.readers for name in reader.redirects_from(name_key(title), 1)]
    live = [name for name in names if store.find_names([name_key(name)])]
    return live[:1]


class NameGenerator:
    """A generator of names that resemble a pack's titles: a second-order Markov model of their letters."""

    def __init__(self, titles: Sequence[str]) -> None:
        self._next_letters: dict[str, list[str]] = {}  # by the two letters before
        words = [_WORD.findall(unicodedata.normalize("NFC", title)) for title in titles]
        self._lengths = list(map(len, words))
        for word in (word for own in words for word in own):
            letters = f"\n\n{word}\n"
            for at in range(2, len(letters)):
                self._next_letters.setdefault(letters[at - 2 : at], []).append(letters[at])

    def generate(self, store: Store, rng: np.random.Generator) -> str | None:
        """Return a name that no article has, with a word that the pack does not contain; None if none was found."""
        for _ in range(MAX_TRIES if self._next_letters else 0):
            words = [self._word(rng) for _ in range(max(1, self._lengths[int(rng.integers(len(self._lengths)))]))]
            name = " ".join(words)
            if not store.find_names([name_key(name)]) and not all(map(store.knows, tokenize(name))):
                return name
        return None

    def _word(self, rng: np.random.Generator) -> str:
        word = "\n\n"
        while len(word) < 2 + MAX_WORD_LETTERS:
            letters = self._next_letters[word[-2:]]
            word += letters[int(rng.integers(len(letters)))]
            if word[-1] == "\n":
                break
        return word.strip()


def calibrate_texts(pack: Pack, present: Sequence[str], absent: Sequence[str], *,
                    target_false_accept: float = TARGET_FALSE_ACCEPT,
                    text_encoder: TextEncoder | None = None) -> Calibration:
    """Fit the text calibration to queries that the pack can answer and queries that it cannot."""
    texts, names = (*present, *absent), pack.manifest.text_features
    features = [rank_articles(pack, text).features for text in texts]
    if pack.paragraphs is not None and text_encoder is not None:
        dense = match_paragraphs(pack, text_encoder.embed_queries(texts))
        features = [(*words, *one.features) for words, one in zip(features, dense, strict=True)]
    labels = [1] * len(present) + [0] * len(absent)
    return fit_calibration(features, labels, names=names, target_false_accept=target_false_accept,
                           optional=names[len(TEXT_FEATURES):])


# --- the model ----------------------------------------------------------------------------------

RIDGE = 1e-3  # on standardised features: keeps the weights of separable data finite
MAX_STEPS = 50  # of Newton's method
Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _LinearModel:
    """logit = x @ weights + bias."""

    weights: Matrix  # [d]
    bias: float

    def logits(self, x: Matrix) -> Matrix:
        return x @ self.weights + self.bias


def fit_calibration(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    names: tuple[str, ...],
    target_false_accept: float = TARGET_FALSE_ACCEPT,
    optional: Sequence[str] = (),
) -> Calibration:
    """Fit a logistic model to the first half of each class and measure it on the second. Both classes weigh the same.

    Args:
        features: [n, len(names)], one row per query; queries of the same picture are adjacent.
        labels: [n], 1 if the subject is in the pack, else 0.
        names: names of the columns.
        target_false_accept: share of absent subjects that may count as found, 0..1.
        optional: columns that are left out unless they raise the share of accepted present subjects by MIN_GAIN.

    Raises:
        PackError: there are too few queries of a class, or the shapes do not agree.
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if x.ndim != 2 or x.shape != (len(y), len(names)) or not np.isfinite(x).all():
        raise PackError(f"calibration: features must be finite and of shape [{len(y)}, {len(names)}], got {x.shape}")
    present, absent = x[y > 0.5], x[y < 0.5]
    if not _suffice(present, absent):
        raise PackError(f"calibration: at least {MIN_QUERIES} present and absent queries are needed, got "
                        f"{len(present)} and {len(absent)}")
    (fit_present, test_present), (fit_absent, test_absent) = (np.array_split(part, 2) for part in (present, absent))
    used = np.ones(len(names))  # 0 for a column that is left out
    model = _fit(fit_present, fit_absent, target_false_accept)
    for name in optional:
        others = used * (np.array(names) != name)
        reduced = _fit(fit_present * others, fit_absent * others, target_false_accept)
        gain = np.mean(model.logits(fit_present * used) >= 0) - np.mean(reduced.logits(fit_present * others) >= 0)
        if gain < MIN_GAIN:
            model, used = reduced, others
    return Calibration(
        features=names,
        weights=tuple(float(weight) for weight in model.weights),
        bias=model.bias,
        target_false_accept=target_false_accept,
        false_accept=float(np.mean(model.logits(test_absent) >= 0)),
        true_accept=float(np.mean(model.logits(test_present) >= 0)),
        present=len(present),
        absent=len(absent),
    )


def _fit(present: Matrix, absent: Matrix, target: float) -> _LinearModel:
    """Return the model whose decision boundary lets at most `target` of the absent subjects pass."""
    x, y = np.concatenate([present, absent]), np.repeat([1.0, 0.0], [len(present), len(absent)])
    model = _logistic_regression(x, y, np.where(y > 0.5, 0.5 / len(present), 0.5 / len(absent)) * len(y))
    return _LinearModel(model.weights, model.bias - _threshold(model.logits(present), model.logits(absent), target))


def _logistic_regression(x: Matrix, y: Matrix, cost: Matrix) -> _LinearModel:
    """Fit a weighted logistic regression with a ridge penalty on standardised columns, by Newton's method.

    Args:
        x: [n, d] features.
        y: [n] labels, 0 or 1.
        cost: [n] weight of each row.
    """
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale < 1e-9] = 1.0
    z = np.column_stack([(x - mean) / scale, np.ones(len(x))])  # [n, d + 1]
    ridge = np.full(z.shape[1], RIDGE * len(x))
    ridge[-1] = 0.0
    w = np.zeros(z.shape[1])
    for _ in range(MAX_STEPS):
        p = 1.0 / (1.0 + np.exp(-np.clip(z @ w, -60, 60)))
        gradient = z.T @ (cost * (p - y)) + ridge * w
        hessian = (z * (cost * p * (1 - p))[:, None]).T @ z + np.diag(ridge + 1e-9)
        step = np.linalg.solve(hessian, gradient)
        w = w - step
        if np.abs(step).max() < 1e-8:
            break
    weights = w[:-1] / scale
    return _LinearModel(weights, float(w[-1] - mean @ weights))


def _threshold(present: Matrix, absent: Matrix, target: float) -> float:
    """Return a logit that a further absent subject exceeds with a probability of at most `target`.

    This is split conformal prediction: of n + 1 exchangeable values the new one is among the k highest with probability
    k / (n + 1), so the k-th highest of n with k = target * (n + 1) is the threshold. With too few values it is the
    highest. The logit lies halfway to the next higher value of either class, so that rounding does not let equal values
    pass.
    """
    rank = max(1, int(np.floor(target * (len(absent) + 1))))
    lowest = float(np.sort(absent)[-rank])
    higher = np.concatenate([present, absent])
    higher = higher[higher > lowest]
    return 0.5 * (lowest + float(higher.min())) if len(higher) else lowest + 1.0
