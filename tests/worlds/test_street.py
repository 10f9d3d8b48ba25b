"""The street is a pure function of its key, holds CamVid's classes about as often, and moves as a drive does.

To accept a change of the pixels: `python -m tests.worlds.test_street`; look at a sheet of them, say in the commit why.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache, partial

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from ssl_seg import rng
from ssl_seg.config import UserError, load
from ssl_seg.datasets.camvid import CLASSES as CAMVID_CLASSES
from ssl_seg.datasets.synthetic import Synthetic
from ssl_seg.testing import check_dataset
from ssl_seg.worlds import Scene, street
from ssl_seg.worlds.drawing import Dice, tile
from ssl_seg.worlds.street import Street, facades, hiding
from ssl_seg.worlds.street.facades import Front
from ssl_seg.worlds.street.hiding import Thing, seen
from ssl_seg.worlds.street.materials import CLASSES, TURN, cosine, ramp, sensor, sine, texels
from ssl_seg.worlds.street.perspective import NEAR, SHIFT, Camera, Ends, Part, Picture, Solid, channels, pack, texture
from ssl_seg.worlds.street.plan import BLOCK, STEP, WEATHERS, Plan, camera, draw_plan
from ssl_seg.worlds.street.plants import hedge
from ssl_seg.worlds.street.things import Scenery
from tests import GOLDEN
from tests.processes import Child

KEPT = GOLDEN / "worlds_street.json"
SIZE = (90, 120)
SKY, BUILDING, ROAD, TREE, CAR, BICYCLIST = (
    CLASSES.index(name) for name in CAMVID_CLASSES if name in ("sky", "building", "road", "tree", "car", "bicyclist")
)


@cache
def scenes() -> list[Scene]:
    world = Synthetic(kind="street", count=100, size=SIZE, seed=1)
    return [world.scene(index) for index in range(len(world))]


def digests() -> dict[str, str]:
    found = {}
    for size in ((40, 56), (97, 61)):
        world = Synthetic(kind=Street(), count=6, size=size, clip=2)
        for index in range(len(world)):
            scene = world.scene(index)
            found[f"{world.name(index)} {size[0]}x{size[1]}"] = digest(scene)
    return found


def digest(scene: Scene) -> str:
    return hashlib.sha256(scene.image.tobytes() + scene.label.tobytes()).hexdigest()


def test_the_classes_are_those_of_camvid() -> None:
    assert CLASSES == CAMVID_CLASSES


def test_the_contract_of_a_data_set() -> None:
    check_dataset(Synthetic(kind="street", count=12, size=(40, 56)))


def test_the_pixels_are_those_that_were_kept() -> None:
    assert digests() == json.loads(KEPT.read_text())


def test_the_pixels_are_the_same_in_another_process_that_starts_elsewhere() -> None:
    """Tables are filled by whatever scene comes first, and must not depend on it."""
    world = Synthetic(kind="street", count=9, size=(40, 56))
    here = [digest(world.scene(index)) for index in (0, 3, 8)]
    stdout, stderr = Child(print_backwards, world).communicate()
    assert stdout.split() == here[::-1], stderr


def print_backwards(world: Synthetic) -> None:
    print(*[digest(world.scene(index)) for index in (8, 3, 0)])


class Digests(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> str:
        return digest(Synthetic(kind="street", count=4, size=(40, 56)).scene(index))


def test_the_pixels_do_not_depend_on_the_number_of_workers() -> None:
    alone, two = (list(DataLoader(Digests(), batch_size=None, num_workers=workers)) for workers in (0, 2))
    assert alone == two


def test_every_scene_is_another() -> None:
    assert len({digest(scene) for scene in scenes()}) == len(scenes())


def test_classes_appear_about_as_often_as_in_camvid() -> None:
    counts = sum(np.bincount(scene.label.ravel(), minlength=len(CLASSES)) for scene in scenes())
    share = dict(zip(CLASSES, counts / counts.sum(), strict=True))
    bands = {
        "sky": (0.13, 0.24),
        "building": (0.17, 0.30),
        "pole": (0.007, 0.03),
        "road": (0.27, 0.38),
        "pavement": (0.03, 0.08),
        "tree": (0.06, 0.15),
        "sign": (0.008, 0.03),
        "fence": (0.007, 0.03),
        "car": (0.04, 0.11),
        "pedestrian": (0.004, 0.02),
        "bicyclist": (0.002, 0.01),
    }
    outside = {name: round(share[name], 4) for name, (low, high) in bands.items() if not low < share[name] < high}
    assert not outside


def test_all_classes_appear_and_road_nearly_always() -> None:
    present = np.array([np.bincount(scene.label.ravel(), minlength=len(CLASSES)) > 0 for scene in scenes()])
    assert present.shape[1] == len(CLASSES)
    assert (present.mean(axis=0) > 0.2).all(), dict(zip(CLASSES, present.mean(axis=0), strict=True))
    assert present[:, [SKY, ROAD]].mean() > 0.95


def test_the_sky_is_above_the_road() -> None:
    for scene in scenes():
        rows = np.arange(SIZE[0])[:, None] * np.ones(SIZE[1], dtype=int)
        assert np.median(rows[scene.label == SKY]) < np.median(rows[scene.label == ROAD])
        assert not (scene.label[-SIZE[0] // 4 :] == SKY).any()


def test_the_label_follows_the_image() -> None:
    """Neighbours of two classes differ in colour more than neighbours of one."""
    across, within = [], []
    for scene in scenes()[:30]:
        step = np.abs(np.diff(scene.image.astype(int), axis=1)).sum(axis=-1)
        border = scene.label[:, 1:] != scene.label[:, :-1]
        across.append(step[border].mean())
        within.append(step[~border].mean())
    assert np.mean(across) > 3 * np.mean(within)


def test_weathers_look_different() -> None:
    level = {}
    for weather in sorted(set(WEATHERS)):
        world = Synthetic(kind=Street(weather=weather), count=6, size=(45, 60))
        level[weather] = np.mean([world.scene(index).image.mean() for index in range(6)])
    assert level["dusk"] < min(level["sunny"], level["overcast"])
    assert len(set(level.values())) == len(level)


def test_no_traffic_and_no_crowd_empty_the_street() -> None:
    empty = Synthetic(kind=Street(traffic=0, crowd=0), count=8, size=SIZE)
    busy = Synthetic(kind=Street(traffic=300, crowd=400), count=8, size=SIZE)
    for index in range(8):
        assert not (empty.scene(index).label >= BICYCLIST - 1).any()
    share = [np.mean([(world.scene(index).label == CAR).mean() for index in range(8)]) for world in (empty, busy)]
    assert share[0] < 0.01  # cars in the side streets stay
    assert share[1] > 0.05


def test_a_dial_out_of_range_is_one_line() -> None:
    with pytest.raises(UserError, match="traffic") as raised:
        load(Synthetic, {"kind": {"type": "street", "traffic": -1}})
    assert len(str(raised.value).splitlines()) == 1


def test_neighbouring_frames_are_alike() -> None:
    clips = Synthetic(kind="street", count=24, size=SIZE, clip=8)
    frames = [clips.scene(index) for index in range(24)]
    step = [_apart(frames[index], frames[index + 1]) for index in range(24) if index % 8 < 7]
    jump = [_apart(frames[index], frames[other]) for index in (0, 8, 16) for other in (0, 8, 16) if index < other]
    assert max(apart for apart, _ in step) < min(apart for apart, _ in jump)
    assert np.mean([agree for _, agree in step]) > 0.9
    assert min(agree for _, agree in step) > 0.8
    assert all(apart > 0 for apart, _ in step)


def test_a_clip_goes_on_for_as_long_as_one_drives() -> None:
    world, key = Street(), rng.as_key(4)
    for frame in (500, 5000):
        label = world.draw(key, SIZE, frame).label
        assert 0.1 < (label == ROAD).mean() < 0.6
        assert len(np.unique(label)) > 5


def test_the_street_stays_the_same_where_the_camera_enters_another_block() -> None:
    world = Street()
    for number in range(3):
        key = rng.as_key(number)
        start = camera(draw_plan(Dice(rng.fold_in(key, "plan")), "any", "any"), SIZE, 0).at[2]
        before = (BLOCK - NEAR - start - 1) // STEP
        _, agree = _apart(world.draw(key, SIZE, before), world.draw(key, SIZE, before + 1))
        assert agree > 0.8


@pytest.mark.parametrize("size", [(2, 2), (16, 16), (17, 61), (91, 33), (768, 1024)])
def test_any_size(size: tuple[int, int]) -> None:
    scene = Synthetic(kind="street", count=1, size=size).scene(0)
    assert scene.image.shape == (*size, 3)
    assert scene.label.shape == size
    assert scene.label.max() < len(CLASSES)


def test_no_pixel_is_left_without_a_class() -> None:
    world = Street()
    for size in ((36, 48), (120, 160)):
        for number in range(40):
            assert world.draw(rng.as_key(number), size, number).label.max() < len(CLASSES)


def _apart(scene: Scene, other: Scene) -> tuple[float, float]:
    """The mean difference of the colours, and the share of pixels with the same class."""
    difference = np.abs(scene.image.astype(int) - other.image.astype(int)).mean()
    return float(difference), float((scene.label == other.label).mean())


UNPAINTED = pack((1, 254, 3), 77)
CAMERA = Camera(size=(60, 80), focal=60 * 16, centre=(40 * 16, 30 * 16), at=(0, 150, 0))


def put_up(picture: Picture, ends: Ends, height: int, pixels: np.ndarray, holes: int | None = None) -> None:
    picture.wall(ends, (0, height), pixels.shape, pixels.__getitem__, holes=holes)


def test_lines_along_the_street_meet_at_the_vanishing_point() -> None:
    picture = Picture(CAMERA)
    for x, y in ((-300, 0), (300, 0), (500, 900)):
        column, row, away = picture.spot(x, y, 1_000_000)
        assert away == 1_000_000
        assert abs(column - CAMERA.centre[0]) <= 2
        assert abs(row - CAMERA.centre[1]) <= 2


def test_a_wall_is_drawn_where_its_outline_is() -> None:
    """The texture's own rasteriser against OpenCV's polygons, through the near plane too."""
    for ends in (((-400, -500), (-400, 3000)), ((300, 2500), (300, 200)), ((-200, 900), (250, 900))):
        wall, outline = Picture(CAMERA), Picture(CAMERA)
        put_up(wall, ends, 400, texture((40, 40), pack((9, 9, 9), 1)))
        (x, s), (end_x, end_s) = ends
        corners = [(x, 0, s), (end_x, 0, end_s), (end_x, 400, end_s), (x, 400, s)]
        outline.polygons(np.array([corners]), (9, 9, 9), 1)
        drawn, expected = wall.rgba[..., 3] == 1, outline.rgba[..., 3] == 1
        assert drawn.sum() > 100
        around = np.ones((3, 3), dtype=np.uint8)
        widest, inner = cv2.dilate(expected.astype(np.uint8), around), cv2.erode(expected.astype(np.uint8), around)
        assert not (drawn & (widest == 0)).any()
        assert drawn[inner == 1].all()


def test_a_texture_shrinks_with_distance() -> None:
    """Equal stripes on a wall along the street are narrower far away."""
    stripes = texture((4, 6), pack((0, 0, 0), 1))
    stripes[:, ::2] = pack((255, 0, 0), 2)
    picture = Picture(CAMERA)
    put_up(picture, ((-200, 300), (-200, 1500)), 300, stripes)
    row = picture.rgba[30, :, 3]
    row = row[row > 0]
    edges = np.flatnonzero(np.diff(row.astype(int)))
    widths = np.diff(edges)
    # The focal length is 60 pixels: edges at 500, 700, ... cm lie 60 * 200 / z pixels from the middle.
    assert np.abs(widths - [7, 4, 2, 2]).max() <= 1
    assert widths[0] > 2 * widths[-1]


def test_gaps_show_what_is_behind_and_holes_take_the_class() -> None:
    fence = texture((4, 4))
    fence[:, 0] = pack((1, 2, 3), 7)
    for holes, inside in ((None, 5), (7, 7)):
        picture = Picture(CAMERA)
        channels(picture.packed)[:] = (90, 91, 92, 5)
        put_up(picture, ((-300, 500), (300, 500)), 300, fence, holes)
        assert picture.rgba[30, 60].tolist() == [90, 91, 92, inside]
        assert picture.rgba[30, 15].tolist() == [1, 2, 3, 7]


def test_what_is_behind_the_camera_is_not_drawn() -> None:
    picture = Picture(CAMERA)
    behind = np.array([[(-100, 0, -500), (100, 0, -500), (100, 0, NEAR - 1), (-100, 0, NEAR - 1)]])
    picture.polygons(behind, (1, 1, 1), 3)
    for ends in (((-100, -900), (-100, 10)), ((-100, -50), (100, -50))):
        put_up(picture, ends, 300, texture((4, 4), pack((1, 1, 1), 3)))
    assert not picture.rgba.any()


def test_a_solid_shows_the_faces_towards_the_camera() -> None:
    corners = [(x, y, s) for x in (-100, 100) for y in (0, 100) for s in (-100, 100)]
    sides = {
        "front": (0, 2, 6, 4),
        "back": (1, 3, 7, 5),
        "top": (2, 3, 7, 6),
        "left": (0, 1, 3, 2),
        "right": (4, 5, 7, 6),
    }
    box = Solid(corners, [(numbers, part, 50) for part, numbers in sides.items()])
    colours = {part: (number + 1, 0, 0) for number, part in enumerate(sides)}
    for x, towards in ((0, {"front", "top"}), (-400, {"front", "top", "right"}), (400, {"front", "top", "left"})):
        picture = Picture(CAMERA)
        picture.solid((x, 0, 900), (1024, 0), box, lambda part, _: colours[part], 8)
        drawn = {list(sides)[number - 1] for number in np.unique(picture.rgba[..., 0]).tolist() if number}
        assert drawn == towards


FRONT = Front(
    width=900,
    storeys=3,
    storey=300,
    ground=340,
    wall=(150, 120, 100),
    trim=(210, 206, 200),
    base=(46, 58, 50),
    brick=True,
    bays=3,
    pane=(110, 150),
    shop=True,
    sign=True,
    gable=300,
    seed=29,
    lit=30,
)
SEEN = st.tuples(st.integers(0, 90), st.integers(1, 90), st.integers(0, 90), st.integers(1, 90))


@given(seen=SEEN, kind=st.sampled_from(["shop", "house", "far", "bars", "boards", "bricks", "hedge"]))
def test_part_of_a_texture_is_that_part_of_the_whole(seen: tuple[int, int, int, int], kind: str) -> None:
    scale = (4, 6) if kind == "far" else (12, 10)
    draw: Callable[[Part], np.ndarray]
    if kind in ("shop", "house", "far"):
        front = FRONT if kind == "shop" else FRONT._replace(shop=False, brick=False, seed=33)
        draw, (wide, high) = partial(facades.front, front, scale), (front.width, front.height)
    elif kind == "hedge":
        wide, high = 900, 180
        draw = partial(hedge, wide, high, scale, 17, ramp((20, 30, 16), (120, 130, 80), TREE))
    else:
        wide, high = 900, 140
        draw = partial(facades.railing, wide, high, scale, (90, 84, 70), kind)
    rows, columns = texels(scale, wide, high)
    top, tall, left, across = seen
    top, left = top % rows, left % columns
    part = slice(top, min(rows, top + tall)), slice(left, min(columns, left + across))
    whole = draw((slice(0, rows), slice(0, columns)))
    assert whole.shape == (rows, columns)
    assert np.array_equal(draw(part), whole[part])


def test_what_is_covered_leaves_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures are the same where all is painted that no house hides."""
    worlds = [Synthetic(kind="street", count=12, size=size, seed=7, clip=2) for size in ((97, 61), (180, 240))]
    shown = [(world, index, digest(world.scene(index))) for world in worlds for index in range(12)]
    count = 0

    def uncovered(things: list[Thing], camera: Camera) -> list[Thing]:
        nonlocal count
        found = seen([thing._replace(faces=()) for thing in things], camera)
        count += len(found) - len(seen(things, camera))
        return found

    monkeypatch.setattr(street, "seen", uncovered)
    for world, index, kept in shown:
        assert digest(world.scene(index)) == kept
    assert count > 5 * len(shown)


def test_things_stay_in_their_boxes_and_nothing_is_seen_through_their_faces(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[list[Thing], Picture]] = []

    class Kept(Scenery):
        def __init__(self, picture: Picture, plan: Plan, frame: int) -> None:
            super().__init__(picture, plan, frame)
            found.append((self.things, picture))

    monkeypatch.setattr(street, "Scenery", Kept)
    for size in ((97, 61), (180, 240)):
        for index in range(10):
            Synthetic(kind="street", count=10, size=size, seed=8).scene(index)
    covering = 0
    for things, picture in found:
        numbers, _, boxes = hiding.places(things, picture.camera)
        covers = hiding.covers(things, picture.camera)
        for number, (left, top, right, bottom) in zip(numbers, boxes, strict=True):
            picture.packed[:] = UNPAINTED
            things[number].paint()
            painted = picture.packed != UNPAINTED
            covered = np.zeros(picture.camera.size, dtype=np.uint8)
            for corners in covers.get(number, ()):
                cv2.fillConvexPoly(covered, corners, 1, cv2.LINE_8, SHIFT)
            assert not covered[~painted].any(), things[number]
            painted[top:bottom, left:right] = False
            assert not painted.any(), things[number]
            covering += bool(covered.any())
    assert covering > 200


def test_sines_are_those_of_the_library() -> None:
    angle = 2 * np.pi * np.arange(TURN) / TURN
    assert np.abs([sine(number) for number in range(TURN)] - 1024 * np.sin(angle)).max() < 1
    assert np.abs([cosine(number) for number in range(-TURN, 0)] - 1024 * np.cos(angle)).max() < 1


def test_a_tile_of_noise_meets_itself() -> None:
    noise = tile("seam", 64, 16, 3).astype(int)
    inner = np.abs(np.diff(noise, axis=0)).mean()
    for seam in (noise[0] - noise[-1], noise[:, 0] - noise[:, -1]):
        assert np.abs(seam).mean() < 2 * inner
    assert noise.std() > 10


def test_the_noise_of_the_sensor_is_even() -> None:
    values = sensor().astype(int)
    assert abs(values.mean()) < 1
    assert 25 < values.std() < 40


if __name__ == "__main__":
    KEPT.write_text(json.dumps(digests(), indent=1) + "\n")
