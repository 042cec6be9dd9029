from itertools import combinations

import numpy as np
import pytest
from atlas_world import flags

from atlas.questions import PLACES
from atlas.scenes import MAX_FLAGS, RELATIONS, PlacedFlag, SceneSpec, draw_scene, make_spec, relations
from gog_edge.types import Size

ASPECTS = (4 / 3, 3 / 4, 1.0, 16 / 9)


@pytest.fixture(scope="module")
def specs():
    return [
        make_spec(seed, [f"flag {n}" for n in range(1 + seed % MAX_FLAGS)], aspect=ASPECTS[seed // 6 % 4])
        for seed in range(300)
    ]


def centres(spec):
    bounds = [item.bounds for item in spec.placed]
    xs, ys = ([(b[k] + b[k + 2]) / 2 for b in bounds] for k in (0, 1))
    return xs, ys, [(b[2] - b[0]) * (b[3] - b[1]) for b in bounds]


def test_flags_are_inside_the_picture_and_do_not_overlap(specs):
    size, slack = Size(1000, 1000), 30  # a flag that fills its cell may exceed it a little
    for spec in specs:
        boxes = [spec.box(n, size) for n in range(len(spec.placed))]
        for box in boxes:
            assert min(box.x0, box.y0) >= -slack and max(box.x1, box.y1) <= 1000 + slack
            assert box.width > 40 and box.height > 40
        for one, other in combinations(boxes, 2):
            shared = one.intersection(other)
            assert min(shared.width, shared.height) <= slack


def test_positions_and_angles_vary(specs):
    places = np.array([[x, y] for spec in specs for x, y in zip(*centres(spec)[:2], strict=True)])
    assert (places.min(0) < 0.25).all() and (places.max(0) > 0.75).all()
    tilts = [item.corners[1][1] - item.corners[0][1] for spec in specs for item in spec.placed]
    assert np.std(tilts) > 0.005


def test_a_scene_depends_on_its_seed_alone():
    names = list(flags())[:3]
    spec, again, other = (make_spec(seed, names) for seed in (5, 5, 6))
    assert spec == again != other
    drawn = draw_scene(spec, flags(), 200)
    assert np.array_equal(drawn, draw_scene(again, flags(), 200))
    assert not np.array_equal(drawn, draw_scene(other, flags(), 200))


@pytest.mark.parametrize("width", [24, 97, 400])
@pytest.mark.parametrize("aspect", ASPECTS)
def test_a_scene_is_drawn_at_any_size(width, aspect):
    for seed in range(2):
        spec = make_spec(seed, list(flags())[: 1 + 2 * seed], aspect=aspect, occluded=0)
        pixels = draw_scene(spec, flags(), width)
        assert pixels.shape == (round(width / aspect), width, 3) and pixels.dtype == np.uint8 and pixels.std() > 5


def test_the_box_encloses_the_drawn_flag():
    red = {"red": np.broadcast_to(np.array([250, 0, 0], np.uint8), (240, 320, 3))}
    for seed in range(3):
        spec = make_spec(seed, ["red"], occlusion_rate=0)
        pixels = draw_scene(spec, red, 400).astype(int)
        found = np.argwhere((pixels[..., 0] > pixels[..., 1] + 100) & (pixels[..., 0] > pixels[..., 2] + 100))
        box = spec.box(0, Size(400, 300))
        assert np.abs(found.min(0) - np.clip((box.y0, box.x0), 0, None)).max() <= 4
        assert np.abs(found.max(0) - np.clip((box.y1, box.x1), None, (299, 399))).max() <= 4


def test_an_occluder_covers_part_of_its_flag():
    for seed in range(40):
        spec = make_spec(seed, ["a", "b"], occluded=1, occlusion_rate=0)
        assert spec.placed[0].occluder is None
        x0, y0, x1, y1, _ = spec.placed[1].occluder
        left, top, right, bottom = spec.placed[1].bounds
        shared = (min(x1, right) - max(x0, left)) * (min(y1, bottom) - max(y0, top))
        assert 0.02 < shared / ((right - left) * (bottom - top)) < 0.5


def expected(name, xs, ys, areas):
    """Return the flag that a place word refers to, computed from centres and areas."""
    order, count = np.argsort(xs), len(xs)
    match name:
        case "left1" | "left2" | "left3":
            return order[int(name[-1]) - 1]
        case "right1" | "right2":
            return order[-int(name[-1])]
        case "middle":
            return order[1] if count == 3 else None
        case "top1":
            return np.argmin(ys)
        case "bottom1":
            return np.argmax(ys)
        case "largest":
            return np.argmax(areas)
        case "smallest":
            return np.argmin(areas)
    vertical, horizontal = name.split()
    sx, sy = (1 if horizontal == "left" else -1), (1 if vertical == "top" else -1)
    return np.argmin(sx * np.array(xs) + sy * np.array(ys))


def test_place_words_agree_with_geometry(specs):
    seen = set()
    for spec in specs:
        xs, ys, areas = centres(spec)
        meant = relations(spec)
        seen |= set(meant)
        assert len(xs) > 1 or not meant
        for name, index in meant.items():
            assert expected(name, xs, ys, areas) == index, (spec.seed, name)
    assert seen == set(RELATIONS) == set(PLACES)


def runner_up(values, index):
    return min(value for n, value in enumerate(values) if n != index) - values[index]


def test_ambiguous_place_words_are_not_used(specs):
    for spec in specs:
        xs, ys, areas = centres(spec)
        logs = np.log(areas)
        keys = {"left1": xs, "right1": -np.array(xs), "top1": ys, "bottom1": -np.array(ys)}
        for name, index in relations(spec).items():
            if name in keys:
                assert runner_up(keys[name], index) >= 0.06
            elif name in ("largest", "smallest"):
                assert runner_up(-logs if name == "largest" else logs, index) >= np.log(1.25)
            elif name in ("left2", "left3", "right2", "middle"):
                assert np.diff(np.sort(xs)).min() >= 0.06


def row_of(*corners):
    """Return a scene of equal flags with the given top left corners."""
    placed = [PlacedFlag("x", ((x, y), (x + 0.2, y), (x + 0.2, y + 0.2), (x, y + 0.2)), 1.0) for x, y in corners]
    return SceneSpec(0, 4 / 3, tuple(placed), 0.0, 1.0)


def test_relations_of_known_layouts():
    assert relations(row_of((0.4, 0.4))) == {}
    assert relations(row_of((0.7, 0.4), (0.1, 0.4), (0.4, 0.4))) == {
        "left1": 1, "left2": 2, "right1": 0, "right2": 2, "middle": 2,
    }  # fmt: skip
    square = relations(row_of((0.1, 0.1), (0.7, 0.1), (0.1, 0.7), (0.7, 0.7)))
    assert square == {"top left": 0, "top right": 1, "bottom left": 2, "bottom right": 3}
    assert relations(row_of((0.4, 0.7), (0.4, 0.1))) == {"top1": 1, "bottom1": 0}
