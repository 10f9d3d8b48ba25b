"""The leak guard: planted copies are found, clean pictures are not, and a run stops or goes on as it is told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ssl_seg.cli import app, run
from ssl_seg.config import UserError, load
from ssl_seg.data.splits import Subset
from ssl_seg.data.workers import Workers
from ssl_seg.datasets import Example, numbering
from ssl_seg.datasets.folder import Folder
from ssl_seg.datasets.synthetic import Synthetic
from ssl_seg.leaks import guard, near_duplicates
from ssl_seg.leaks.guard import LeakError, Leaks, Question, compare, is_allowed
from ssl_seg.leaks.near_duplicates import SIDE, Fingerprints, fingerprint
from ssl_seg.leaks.record import Compared, Leak, read_fingerprints, say_leaks, sentence, write_fingerprints
from ssl_seg.runs.folder import leak_word
from ssl_seg.runs.schema import read_checked
from ssl_seg.stages.finetune import FinetuneConfig, finetune
from ssl_seg.stages.pretrain import PretrainConfig, pretrain
from ssl_seg.stages.setup import Options
from tests.small import Textured, finetuning, pretraining

T = TypeVar("T")
RAMPS = ((0, 255), (40, 90), (60, 180), (20, 200))
NAMELESS = Leaks(frames=0)  # pictures alone decide
SIZE = (72, 96)


@dataclass(frozen=True)
class Pictures:
    """Examples that a test holds in its hands."""

    images: Sequence[np.ndarray]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Example:
        return Example(self.images[index], None, self.names[index])

    def doubt(self, index: int) -> str:
        return ""

    def name(self, index: int) -> str:
        return self.names[index]


def finished(work: Generator[None, None, T]) -> T:
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def printed(images: Sequence[np.ndarray], names: Sequence[str] | None = None) -> Fingerprints:
    return finished(fingerprint(Pictures(images, names or [f"image{chr(97 + i)}" for i in range(len(images))])))


def found(trained: Fingerprints, scored: Fingerprints, config: Leaks = NAMELESS) -> list[Leak]:
    return finished(compare("pool", trained, "val", scored, config))


def streets(count: int, seed: int, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    drawn = load(Synthetic, {"kind": "street", "count": count, "size": size, "seed": seed})
    return [drawn.image(index).image for index in range(count)]


@pytest.fixture(scope="module")
def scenes() -> list[np.ndarray]:
    return streets(12, seed=1, size=(144, 192))


@pytest.fixture(scope="module")
def scored(scenes: list[np.ndarray]) -> Fingerprints:
    return printed(scenes, [f"scene{index}" for index in "abcdefghijkl"])


def as_jpeg(image: np.ndarray, quality: int = 50) -> np.ndarray:
    coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(coded, cv2.IMREAD_COLOR)


def cropped(image: np.ndarray, rows: tuple[float, float], columns: tuple[float, float]) -> np.ndarray:
    height, width = image.shape[:2]
    down, across = (slice(round(a * n), round(b * n)) for (a, b), n in ((rows, height), (columns, width)))
    return np.ascontiguousarray(image[down, across])


def toned(image: np.ndarray) -> np.ndarray:
    return np.clip((image.astype(np.float32) - 128) * 0.75 + 115, 0, 255).astype(np.uint8)


ALTERED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "coded anew": as_jpeg,
    "half the size": lambda image: cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "mirrored": lambda image: np.ascontiguousarray(image[:, ::-1]),
    "a corner of 64 % of the area": lambda image: cropped(image, (0, 0.8), (0.2, 1)),
    "the lower 60 %": lambda image: cropped(image, (0.4, 1), (0, 1)),
    "its width cut to 62 %": lambda image: cropped(image, (0, 1), (0.19, 0.81)),
    "cropped, mirrored and coded anew": lambda image: as_jpeg(cropped(image, (0.1, 0.9), (0, 0.8))[:, ::-1], 60),
    "toned": toned,
    "blurred": lambda image: cv2.GaussianBlur(image, (0, 0), 1.0),
}


@pytest.mark.parametrize("kind", ALTERED)
def test_altered_copies_are_found_with_the_image_they_were_made_of(
    kind: str, scenes: list[np.ndarray], scored: Fingerprints
) -> None:
    leaked = found(printed([ALTERED[kind](image) for image in scenes]), scored)
    assert [leak.kind for leak in leaked] == ["altered"] * len(scenes)
    assert {leak.scored for leak in leaked} == set(scored.names)
    assert all(("mirrored" in leak.detail) == ("mirrored" in kind) for leak in leaked)


def test_it_is_found_too_where_the_scored_image_is_the_part(scenes: list[np.ndarray]) -> None:
    parts = printed([cropped(image, (0.15, 0.95), (0.1, 0.9)) for image in scenes])
    leaked = found(printed(scenes), parts)
    assert len(leaked) == len(scenes)
    assert all("64% of the area" in leak.detail or "63%" in leak.detail or "65%" in leak.detail for leak in leaked)


def test_quarter_turns_are_found_where_they_are_asked_for(scenes: list[np.ndarray], scored: Fingerprints) -> None:
    turned = printed([np.ascontiguousarray(np.rot90(image)) for image in scenes[:4]])
    assert not found(turned, scored)
    leaked = found(turned, scored, Leaks(frames=0, turns=True))
    assert [leak.scored for leak in leaked] == list(scored.names[:4])
    assert all("turned" in leak.detail for leak in leaked)


def test_equal_pixels_are_exact_whatever_else_they_could_be(scenes: list[np.ndarray], scored: Fingerprints) -> None:
    leaked = found(printed([scenes[7], scenes[2]]), scored)
    assert [(leak.kind, leak.scored, leak.alike) for leak in leaked] == [
        ("exact", "sceneh", 1.0),
        ("exact", "scenec", 1.0),
    ]


def test_one_pixel_makes_an_altered_copy_of_an_exact_one(scenes: list[np.ndarray], scored: Fingerprints) -> None:
    changed = scenes[3].copy()
    changed[5, 5] ^= 1
    assert [leak.kind for leak in found(printed([changed]), scored)] == ["altered"]


@pytest.mark.parametrize("kind", ["street", "shapes", "squares"])
def test_drawn_images_of_other_seeds_are_clean(kind: str) -> None:
    one, other = (
        finished(fingerprint(load(Synthetic, {"kind": kind, "count": 12, "size": SIZE, "seed": seed})))
        for seed in (1, 2)
    )
    assert not found(one, other)


def test_flat_and_nearly_flat_images_are_clean() -> None:
    random = np.random.default_rng(0)
    flat = [np.full((60, 80, 3), grey, dtype=np.uint8) for grey in (0, 0, 128, 255)]
    noisy = [random.integers(100, 103, (60, 80, 3), dtype=np.uint8) for _ in range(20)]
    ramps = [np.repeat(np.linspace(a, b, 80).astype(np.uint8)[None, :, None], 60, 0).repeat(3, 2) for a, b in RAMPS]
    assert not found(printed([*flat, *noisy[:10], *ramps[:2]]), printed([*flat, *noisy[10:], *ramps[2:]]))


def test_a_plain_image_is_found_as_it_is_but_another_of_its_kind_is_not() -> None:
    boxes = [load(Synthetic, {"count": 30, "size": (96, 96), "seed": 4}).image(index).image for index in range(30)]
    scored = printed(boxes[:15])
    assert not found(printed(boxes[15:]), scored)
    leaked = found(printed([as_jpeg(box, 90) for box in boxes[:15]]), scored)
    assert {leak.detail for leak in leaked} == {"plain"}
    assert len(leaked) > len(boxes) // 4


def test_photographs_share_nothing_with_other_parts_of_themselves() -> None:
    """Two parts of one photograph that overlap by less than the guard promises: other content, the same light."""
    from sklearn.datasets import load_sample_images

    for photograph in load_sample_images().images:
        height, width = photograph.shape[:2]
        quarters = [
            photograph[y : y + height // 2, x : x + width // 2] for y in (0, height // 2) for x in (0, width // 2)
        ]
        assert not found(printed(quarters[:2]), printed(quarters[2:]))
        leaked = found(printed([as_jpeg(cropped(part, (0, 0.85), (0.15, 1))) for part in quarters]), printed(quarters))
        assert [leak.scored for leak in leaked] == ["imagea", "imageb", "imagec", "imaged"]


# ---- what a whole set shares ----


def clouds(count: int, seed: int) -> list[np.ndarray]:
    """Smooth random pictures."""
    return [moving(1, 1000 * seed + index)[0] for index in range(count)]


def in_white(picture: np.ndarray) -> np.ndarray:
    framed = np.full_like(picture, 255)
    framed[6:-6, 8:-8] = picture[6:-6, 8:-8]
    return framed


def in_a_circle(picture: np.ndarray) -> np.ndarray:
    down, across = np.mgrid[: picture.shape[0], : picture.shape[1]]
    inside = (down - 29.5) ** 2 + (across - 39.5) ** 2 < 28**2
    return picture * inside[..., None].astype(np.uint8)


@pytest.mark.parametrize("frame", [in_white, in_a_circle])
def test_one_margin_or_mask_around_all_pictures_makes_none_a_copy_and_hides_none(
    frame: Callable[[np.ndarray], np.ndarray],
) -> None:
    ours, theirs = ([frame(picture) for picture in clouds(30, seed)] for seed in (5, 6))
    assert not found(printed(ours), printed(theirs))
    copies = [as_jpeg(np.ascontiguousarray(picture[:, ::-1])) for picture in ours]
    assert len(found(printed(copies), printed(ours))) >= 29


def slide(seed: int) -> np.ndarray:
    """Three cells under a lamp that lights the middle."""
    random = np.random.default_rng(seed)
    down, across = np.mgrid[-0.5:0.5:256j, -0.5:0.5:256j]
    picture = np.repeat((240 - 400 * (down**2 + across**2))[..., None], 3, axis=2)
    for place in random.integers(5, 250, (3, 2)).tolist():
        cv2.circle(picture, place, 3, (90, 60, 110), -1)
    return np.clip(picture + random.normal(0, 3, picture.shape), 0, 255).astype(np.uint8)


def test_slides_under_one_lamp_are_clean_and_copies_of_them_are_not() -> None:
    ours, theirs = [slide(seed) for seed in range(40)], [slide(100 + seed) for seed in range(10)]
    assert not found(printed(ours), printed(theirs))
    assert len(found(printed([as_jpeg(picture, 90) for picture in theirs]), printed(theirs))) == 10


def test_thirty_copies_of_one_picture_are_not_taken_for_a_margin() -> None:
    scored = clouds(40, seed=7)
    copies = [as_jpeg(scored[11], quality) for quality in range(60, 90)]
    leaked = found(printed(copies), printed(scored, [f"scored{chr(97 + i)}" for i in range(40)]))
    assert [leak.scored for leak in leaked] == [f"scored{chr(97 + 11)}"] * 30


def test_a_handful_of_pictures_shares_nothing() -> None:
    few, many = (printed([in_white(picture) for picture in clouds(count, seed=8)]).thumbs for count in (5, 30))
    assert not near_duplicates.shared_structure(few).any()
    shared = near_duplicates.shared_structure(many)
    assert shared[6:58, 6].all()
    assert shared[20:44, 20:44].mean() < 0.15


# ---- neighbours in a sequence ----


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train/0016E5_07959.jpg", ("0016E5_#", 7959)),
        ("0006R0_f00930.png", ("0006R0_f#", 930)),
        ("train/aachen/aachen_000001_000019_leftImg8bit.png", ("aachen/aachen_000001_#_leftImg8bit", 19)),
        ("val/clip/12.png", ("clip/#", 12)),
        ("photo.jpg", None),
        ("2nd.png", None),
    ],
)
def test_the_number_of_a_frame_is_the_last_one_of_its_name(name: str, expected: tuple[str, int] | None) -> None:
    assert numbering(name) == expected


def moving(count: int, seed: int) -> list[np.ndarray]:
    """A camera that goes along a wide picture, a pixel each frame: those 80 apart share nothing."""
    wide = np.random.default_rng(seed).normal(size=(60, 80 + count))
    smooth = cv2.GaussianBlur(wide, (0, 0), 4)
    grey = np.clip(128 + 60 * smooth / smooth.std(), 0, 255).astype(np.uint8)
    return [np.repeat(grey[:, step : step + 80, None], 3, axis=2) for step in range(count)]


def split(count: int, held: Callable[[int], bool], name: Callable[[int], str]) -> tuple[Fingerprints, Fingerprints]:
    frames = moving(count, seed=0)
    parts = [[index for index in range(count) if held(index) == wanted] for wanted in (False, True)]
    trained, scored = (printed([frames[index] for index in part], [name(index) for index in part]) for part in parts)
    return trained, scored


def test_one_video_split_at_random_is_a_leak_of_nearly_every_frame() -> None:
    random = np.random.default_rng(1).random(120)
    trained, scored = split(120, lambda index: random[index] < 0.3, lambda index: f"clip_{index:04d}.png")
    leaked = found(trained, scored, Leaks(frames=3))
    assert len(leaked) > 0.9 * len(trained)
    assert sum(leak.kind == "sequence" for leak in leaked) > 0.8 * len(trained)
    assert "1 frames apart" in {leak.detail for leak in leaked}


@pytest.mark.parametrize("alike", [0.6, 1.0])
def test_coded_anew_under_its_own_name_a_frame_is_a_copy_and_no_neighbour(alike: float) -> None:
    """Else `leaks.allow=[sequence]` would let every scored frame into the pool. At 1.0 names and likeness tell."""
    frames = moving(40, seed=0)
    names = [f"clip_{index:04d}.png" for index in range(40)]
    leaked = found(printed([as_jpeg(frame) for frame in frames], names), printed(frames, names), Leaks(alike=alike))
    assert [leak.kind for leak in leaked] == ["altered"] * 40


def test_only_frames_close_enough_are_neighbours() -> None:
    trained, scored = split(120, lambda index: index >= 90, lambda index: f"clip_{index:04d}.png")
    leaked = [leak for leak in found(trained, scored, Leaks(frames=3)) if leak.kind == "sequence"]
    assert [leak.name for leak in leaked] == ["clip_0087.png", "clip_0088.png", "clip_0089.png"]
    assert not [leak for leak in found(trained, scored, Leaks(frames=0)) if leak.kind == "sequence"]


def test_numbers_that_are_no_time_are_no_neighbours() -> None:
    """As in Pascal VOC and Oxford Pets: one numbering over both sides, unrelated pictures."""
    order = np.random.default_rng(2).permutation(60)
    frames = [moving(1, seed)[0] for seed in range(60)]
    trained, scored = (
        printed([frames[index] for index in part], [f"2007_{index:06d}.jpg" for index in part])
        for part in (sorted(order[:40]), sorted(order[40:]))
    )
    assert not found(trained, scored, Leaks())


def test_another_clip_with_the_same_numbers_is_no_neighbour() -> None:
    trained, scored = (
        printed(moving(30, seed), [f"{clip}/frame_{index}.png" for index in range(30)])
        for seed, clip in ((3, "one"), (4, "two"))
    )
    assert not found(trained, scored, Leaks())


# ---- properties ----


@given(
    top=st.floats(0, 1), left=st.floats(0, 1), height=st.floats(0.8, 1), width=st.floats(0.8, 1), mirrored=st.booleans()
)
def test_any_crop_of_64_percent_and_more_is_found(
    top: float, left: float, height: float, width: float, mirrored: bool, scenes: list[np.ndarray], scored: Fingerprints
) -> None:
    start, begin = top * (1 - height), left * (1 - width)
    part = cropped(scenes[0], (start, start + height), (begin, begin + width))
    leaked = found(printed([np.ascontiguousarray(part[:, ::-1]) if mirrored else part]), scored)
    assert [leak.scored for leak in leaked] == ["scenea"]


def test_what_is_found_does_not_depend_on_the_blocks(
    scenes: list[np.ndarray], scored: Fingerprints, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = printed([cropped(image, (0, 0.8), (0, 0.8)) for image in scenes])
    whole = found(trained, scored)
    monkeypatch.setattr(near_duplicates, "BLOCK", 5)
    assert sorted(found(trained, scored), key=str) == sorted(whole, key=str)


def test_only_the_best_of_all_blocks_are_aligned(
    scenes: list[np.ndarray], scored: Fingerprints, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    monkeypatch.setattr(near_duplicates, "_align", lambda *_: tried.append(1))
    monkeypatch.setattr(near_duplicates, "NEAR", -1.0)
    monkeypatch.setattr(near_duplicates, "BLOCK", 4)
    assert not found(printed([as_jpeg(scenes[0])]), scored)
    assert len(tried) == near_duplicates.BEST


def test_the_thumbnails_are_the_digests_companions(scenes: list[np.ndarray]) -> None:
    prints = printed(scenes[:3])
    assert prints.thumbs.shape == (3, SIDE, SIDE)
    assert len(set(prints.digests)) == 3
    assert prints.digests == printed([image.copy() for image in scenes[:3]]).digests


def test_an_image_that_cannot_be_read_is_named() -> None:
    class Broken(Pictures):
        def image(self, index: int) -> Example:
            raise UserError(f"{self.names[index]}: damaged")

    with pytest.raises(UserError, match=r"b\.png: damaged"):
        finished(fingerprint(Broken([np.zeros((4, 4, 3), np.uint8)], ["b.png"])))


def test_workers_read_the_same() -> None:
    examples = Textured(count=5)
    one, two = (finished(fingerprint(examples, Workers(count))) for count in (0, 1))
    assert one.digests == two.digests
    assert (one.thumbs == two.thumbs).all()


# ---- in a run ----

SAME = {"type": "textured", "count": 3, "seed": 0}  # the first three of the pool


def leaking(**settings: Any) -> dict[str, Any]:
    values = pretraining(steps=1)
    return {**values, "data": {**values["data"], "val": SAME}, "leaks": settings}


def pretrained(values: dict[str, Any], out: Path) -> dict[str, Any]:
    pretrain(load(PretrainConfig, values), Options(out, quiet=True))
    return json.loads((out / "leaks.json").read_text())


def test_a_leak_stops_the_run_before_a_step_and_is_written_down(tmp_path: Path) -> None:
    with pytest.raises(LeakError) as caught:
        pretrained(leaking(), tmp_path / "run")
    line = str(caught.value)
    assert "\n" not in line
    assert "data.pool: leak into data.val: 3 exact: textured_0_0 ~ textured_0_0" in line
    assert "leaks.allow=[exact]" in line
    record = json.loads((tmp_path / "run" / "leaks.json").read_text())
    assert [leak["name"] for leak in record["leaks"]] == ["textured_0_0", "textured_0_1", "textured_0_2"]
    assert not any(leak["allowed"] for leak in record["leaks"])
    picture = cv2.imread(str(tmp_path / "run" / "leaks.png"))
    assert picture.shape[1] > 2 * 300
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


LEAK = Leak("exact", "pool", "a/7.png", "val", "b/8.png", 1.0, "the same pixels")


@pytest.mark.parametrize(
    ("allow", "passes"),
    [
        (["exact"], True),
        (["altered", "ex*"], True),
        (["a/*"], True),
        (["b/8.png"], True),
        ([], False),
        (["altered", "sequence"], False),
        (["7.png"], False),
        (["pool"], False),
        (["d[1].png"], True),
    ],
)
def test_a_glob_of_the_kind_or_of_either_name_allows_a_leak(allow: list[str], passes: bool) -> None:
    bracketed = replace(LEAK, name="d[1].png")
    assert is_allowed(bracketed if allow == ["d[1].png"] else LEAK, allow) is passes


def test_in_a_short_clip_copies_beside_the_runs_own_cut_are_taken_for_neighbours() -> None:
    """Of so few pictures nothing tells whether numbers are time; the run has parted these two, and not the user."""
    clip = load(Synthetic, {"kind": {"type": "street"}, "count": 8, "clip": 8, "size": [120, 160]})
    parts = {"labelled": Subset(clip, tuple(range(6))), "val": Subset(clip, (6, 7))}
    seen = {part: finished(near_duplicates.fingerprint(own)) for part, own in parts.items()}
    leaks = finished(compare("labelled", seen["labelled"], "val", seen["val"], Leaks()))
    assert {leak.kind for leak in leaks} == {"altered"}
    result = Compared(prints=seen, leaks=leaks)
    for own_cut in ((), {("labelled", "val")}):
        record = guard.make_record({}, result, {"val"}, Leaks(), own_cut)
        assert {written["allowed"] for written in record["leaks"]} == {bool(own_cut)}


def test_frames_beside_the_runs_own_cut_are_written_down_and_let_pass() -> None:
    at_cut = Leak("sequence", "labelled", "a_1", "val", "a_2", None, "1 frames apart")
    others = [
        replace(at_cut, part="pool"),
        replace(at_cut, kind="altered", alike=0.9),
        replace(at_cut, scored_part="test"),
    ]
    for own_cut in ((), {("labelled", "val")}):
        result = Compared(leaks=[at_cut, *others])
        record = guard.make_record({}, result, {"val", "test"}, Leaks(), own_cut)
        assert [leak["allowed"] for leak in record["leaks"]].count(True) == len(own_cut)
        assert {leak["part"] for leak in record["leaks"] if leak["allowed"]} == ({"labelled"} if own_cut else set())
        assert leak_word(record) == "found"
    alone = guard.make_record({}, Compared(leaks=[at_cut]), {"val"}, Leaks(), {("labelled", "val")})
    assert leak_word(alone) == "cut", "and not one that leaks.allow let pass"
    second = Compared(leaks=[replace(at_cut, part="labelled#2", scored_part="val#2")])
    record = guard.make_record({}, second, {"val#2"}, Leaks(), {("labelled", "val")})
    assert leak_word(record) == "found", "another data set of a study, which has a data.val of its own"


def test_what_is_allowed_by_name_passes_and_is_written_everywhere(tmp_path: Path) -> None:
    allow = ["textured_0_0", "textured_0_1", "*_2"]
    record = pretrained(leaking(allow=allow), tmp_path / "run")
    assert all(leak["allowed"] for leak in record["leaks"])
    assert len(record["leaks"]) == 3
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["leaks"]["allow"] == allow
    assert sentence(record) == (
        "LEAK: 3 exact among 12 images of pool compared with 3 images of val; all allowed by leaks.allow; "
        "too few images of pool to judge neighbours by name."
    )


def test_a_run_goes_on_only_if_every_leak_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(LeakError, match=r"2 exact: textured_0_1 ~ textured_0_1"):
        pretrained(leaking(allow=["textured_0_0"]), tmp_path / "run")


def test_a_resumed_run_does_not_look_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = pretrained(pretraining(steps=1), tmp_path / "run")
    assert record["leaks"] == []
    monkeypatch.setattr(guard, "fingerprint", None)
    assert pretrained(pretraining(steps=1), tmp_path / "run") == record


def test_a_check_that_is_off_is_said(tmp_path: Path) -> None:
    record = pretrained(leaking(check=False), tmp_path / "run")
    assert record["leaks"] == []
    assert "not checked (leaks.check=false)" in sentence(record)


def test_the_command_exits_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pretrain", "squares", "data.val.seed=0", "data.val.count=2", "data.pool.count=4", "data.pool.seed=0"]
    words += ["tracking=none", "train.workers=0", "--quiet", "--out", str(tmp_path / "run")]
    assert run(lambda: app(args=words, prog_name="ssl-seg", standalone_mode=False)) == 3
    told = capsys.readouterr().err
    assert told.startswith("ssl-seg: data.pool: leak into data.val: 2 exact")
    assert told.count("\n") == 1


def test_labels_are_compared_with_val_and_test(tmp_path: Path) -> None:
    values = finetuning(steps=1)
    data = {**values["data"], "test": {**values["data"]["labelled"], "count": 2}}
    with pytest.raises(LeakError, match=r"data\.labelled: leak into data\.test: 2 exact"):
        finetune(load(FinetuneConfig, {**values, "data": data}), Options(tmp_path / "run", quiet=True))


def test_the_pool_of_the_pretraining_is_compared_with_what_the_fine_tuning_is_scored_on(tmp_path: Path) -> None:
    pool = {"type": "textured", "count": 6, "seed": 7}  # that of data.test
    values = pretraining(steps=1)
    first = pretrained({**values, "data": {"pool": pool}}, tmp_path / "pretrained")
    assert sentence(first) == "No leak check: there is nothing to compare with."
    given = {**finetuning(steps=1), "init": str(tmp_path / "pretrained")}
    with pytest.raises(LeakError, match=r"init: the pool it was trained on: leak into data\.test: 3 exact"):
        finetune(load(FinetuneConfig, given), Options(tmp_path / "run", quiet=True))
    allowed = {**given, "leaks": {"allow": ["exact"]}}
    finetune(load(FinetuneConfig, allowed), Options(tmp_path / "run", quiet=True))


def test_altered_copies_in_the_pool_of_the_pretraining_are_found_by_what_it_has_stored(
    tmp_path: Path, scenes: list[np.ndarray]
) -> None:
    mirrored = [np.ascontiguousarray(image[:, ::-1]) for image in scenes]
    stored = printed(mirrored)

    place = Place(tmp_path)
    write_fingerprints(place, Compared({"pool": stored, "val": printed(scenes), "init.pool": stored}))
    read, unknown = read_fingerprints(str(tmp_path / "encoder"))
    assert set(read) == {"pool", "init.pool"}
    assert not unknown
    assert len(found(read["pool"], printed(scenes))) == len(scenes)
    assert found(replace(read["pool"], thumbs=None), printed(scenes)) == []


# ---- what is known, and what is not ----


@dataclass(frozen=True)
class Place:
    """A folder that keeps records, without a run."""

    folder: Path

    def read_json(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        return json.loads(path.read_text()) if path.is_file() else None

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(values))


def checked(
    folder: Path,
    pool: Textured | None = None,
    val: Textured | None = None,
    inits: dict[str, Path] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    starts = {name: str(run) for name, run in (inits or {}).items()}
    question = Question({"pool": pool}, {"val": val}, Leaks(**settings), starts)
    return guard.check(Place(folder), question, quiet=True)


ONE, OTHER = Textured(count=6, seed=7), Textured(count=6, seed=30)


GENERATOR = np.random.default_rng(0)


def photographs(root: Path, damage: bytes) -> Folder:
    """Four JPEGs, the third and the last with other bytes before their end."""
    root.mkdir()
    for number in range(4):
        image = Image.fromarray(GENERATOR.integers(0, 256, (*SIZE, 3), dtype=np.uint8))
        stream = BytesIO()
        image.save(stream, "JPEG")
        whole = stream.getvalue()
        if number >= 2:
            whole = whole[: int(0.8 * len(whole))] + whole[-2:] if not damage else whole[:-2] + damage + whole[-2:]
        (root / f"{number}.jpg").write_bytes(whole)
    return Folder(images=str(root))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_jpeg_that_was_cut_and_closed_again_stops_the_run(tmp_path: Path, workers: int) -> None:
    pool = photographs(tmp_path / "pool", b"")
    assert pool.read(2).image.shape == (*SIZE, 3)  # its lower part is grey
    with pytest.raises(
        UserError, match=r"pool/2\.jpg: damaged or cut off \(Corrupt JPEG data: premature end"
    ) as caught:
        guard.check(Place(tmp_path), Question({"pool": pool}, {}, Leaks()), Workers(workers))
    assert "\n" not in str(caught.value)


def test_doubts_are_told_once_and_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = photographs(tmp_path / "pool", bytes(20))
    record = guard.check(Place(tmp_path), Question({"pool": pool}, {}, Leaks()))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("CAUTION")]
    words = "a JPEG that may be damaged (Corrupt JPEG data: extraneous bytes before marker 0xd9)"
    assert lines == [f"CAUTION: pool: 2 images (2.jpg, 3.jpg): {words}"]
    assert record["doubts"] == {"pool": {"2.jpg": words, "3.jpg": words}}
    part = Subset(pool, (0, 1, 3))
    assert guard.check(Place(tmp_path), Question({"pool": part}, {}, Leaks()))["doubts"]["pool"] == {"3.jpg": words}


@pytest.mark.parametrize(("many", "announced"), [(12, True), (13, False)])
def test_reading_many_images_is_announced(
    many: int, announced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard, "MANY", many)
    guard.check(Place(tmp_path), Question({"pool": ONE}, {"val": OTHER}, Leaks()))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:-1] == ["looking for leaks: 12 images are read once"] * announced
    assert lines[-1].startswith("No leak: ")


def test_a_chain_of_inits_is_compared_to_its_beginning(tmp_path: Path) -> None:
    checked(tmp_path / "a", ONE)
    checked(tmp_path / "b", OTHER, inits={"init": tmp_path / "a"})
    with pytest.raises(LeakError, match=r"init: the pool that its own init was trained on: leak into data\.val: 6 e"):
        checked(tmp_path / "c", val=ONE, inits={"init": tmp_path / "b"})


def test_several_inits_are_told_apart(tmp_path: Path) -> None:
    checked(tmp_path / "a", OTHER)
    checked(tmp_path / "b", ONE)
    inits = {"init.1": tmp_path / "a", "init.2": tmp_path / "b"}
    with pytest.raises(LeakError) as caught:
        checked(tmp_path / "study", val=ONE, inits=inits)
    assert str(caught.value).startswith(f"init={tmp_path / 'b'}: the pool it was trained on: leak into data.val: 6")
    record = Place(tmp_path / "study").read_json("leaks.json")
    assert record["trained"] == {"init.1.pool": 6, "init.2.pool": 6}


def test_weights_of_unknown_images_are_said_also_further_down_the_chain(tmp_path: Path) -> None:
    (tmp_path / "copied").mkdir()
    record = checked(tmp_path / "a", ONE, OTHER, {"init": tmp_path / "copied"})
    assert read_checked(tmp_path / "a" / "leaks.json") == record
    assert [pair["pictures"] for pair in record["pairs"]] == ["compared", "unknown"]
    assert sentence(record) == (
        "No leak: 6 images of pool compared with 6 images of val; the images that init was trained on are unknown."
    )
    later = checked(tmp_path / "b", val=OTHER, inits={"init": tmp_path / "a"})
    assert "the images that init.init was trained on are unknown" in sentence(later)
    alone = checked(tmp_path / "c", val=OTHER, inits={"init": tmp_path / "copied"})
    assert sentence(alone) == "No leak check: the images that init was trained on are unknown."


def test_a_pool_too_large_to_store_is_compared_by_exact_copies_only_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_seg.leaks.record.MOST_STORED", 5)
    checked(tmp_path / "a", ONE)
    assert not (tmp_path / "a" / "fingerprints.safetensors").exists()
    record = checked(tmp_path / "b", val=OTHER, inits={"init": tmp_path / "a"})
    assert [pair["pictures"] for pair in record["pairs"]] == ["exact only"]
    assert "of init.pool only exact copies were looked for" in sentence(record)


def damaged(folder: Path, how: str) -> None:
    store, manifest = folder / "fingerprints.safetensors", folder / "images.json"
    payload = store.read_bytes()
    if how == "cut off":
        store.write_bytes(payload[:500])
    elif how == "zeroed":
        store.write_bytes(payload[:2000] + bytes(len(payload) - 2000))
    elif how == "another shape":
        manifest.write_text('{"pool": []}')
    else:
        values = json.loads(manifest.read_text())
        values["pool"]["names"].pop()
        manifest.write_text(json.dumps(values))


@pytest.mark.parametrize("how", ["cut off", "zeroed", "another shape", "a name less"])
def test_a_damaged_record_of_an_init_is_one_line(tmp_path: Path, how: str) -> None:
    checked(tmp_path / "a", ONE)
    damaged(tmp_path / "a", how)
    with pytest.raises(UserError, match=r"images\.json|fingerprints\.safetensors") as caught:
        checked(tmp_path / "b", val=ONE, inits={"init": tmp_path / "a"})
    assert "\n" not in str(caught.value)
    assert "make the run again" in str(caught.value)


class Renamed(Textured):
    """Images whose names say nothing of what they show."""

    def name(self, index: int) -> str:
        return f"image{index}"


def test_other_pixels_under_the_same_names_are_looked_at_again(tmp_path: Path) -> None:
    pool = Renamed(count=6, seed=0)
    assert checked(tmp_path, pool, Renamed(count=3, seed=9))["leaks"] == []
    with pytest.raises(LeakError, match="3 exact"):
        checked(tmp_path, pool, Renamed(count=3, seed=0))


def test_another_pool_of_the_same_init_is_looked_at_again(tmp_path: Path) -> None:
    checked(tmp_path / "a", OTHER)
    assert checked(tmp_path / "b", val=ONE, inits={"init": tmp_path / "a"})["leaks"] == []
    checked(tmp_path / "a", ONE)
    with pytest.raises(LeakError, match="6 exact"):
        checked(tmp_path / "b", val=ONE, inits={"init": tmp_path / "a"})


def test_the_answer_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(LeakError):
        checked(tmp_path, ONE, ONE)
    with monkeypatch.context() as patch:
        patch.setattr(guard, "sheet", killed)
        with pytest.raises(KeyboardInterrupt):
            checked(tmp_path, ONE, ONE, frames=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fingerprints.safetensors", "images.json"]
    with pytest.raises(LeakError):
        checked(tmp_path, ONE, ONE, frames=5)
    assert checked(tmp_path, ONE, OTHER)["leaks"] == []
    assert not (tmp_path / "leaks.png").exists()


def test_an_answer_to_no_question_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "leaks.json").write_text('{"leaks": []}')
    assert checked(tmp_path, ONE, OTHER)["checked"]


def test_the_refusal_counts_each_two_parts_for_themselves(tmp_path: Path) -> None:
    found = [replace(LEAK, part="labelled", scored_part="test#2"), LEAK, replace(LEAK, name="c", kind="altered")]
    record = guard.make_record({"inits": {}}, Compared(leaks=found), {"val", "test"}, Leaks(allow=("c",)))
    record["leaks"].append({**record["leaks"][0], "part": "scratch.pool"})
    assert (say_leaks(record, tmp_path) or "").startswith(
        "data.labelled: leak into data.test: 1 exact: a/7.png ~ b/8.png (the same pixels); data.pool: leak into "
        "data.val: 1 exact; pretrain.scratch.data.pool: leak into data.test: 1 exact; see"
    )


def test_so_few_images_that_names_are_not_judged_are_said() -> None:
    trained, scored = split(12, lambda index: index % 4 == 0, lambda index: f"clip_{index}.png")
    few = replace(trained, names=trained.names[:5], digests=trained.digests[:5], thumbs=trained.thumbs[:5])
    result = Compared({"labelled": few, "val": scored})
    record = guard.make_record({}, result, {"val"}, Leaks())
    assert sentence(record).endswith("; too few images of labelled to judge neighbours by name.")
    assert "too few" not in sentence(guard.make_record({}, result, {"val"}, NAMELESS))
    named = Compared({"labelled": replace(few, names=tuple("abcde")), "val": scored})
    assert "too few" not in sentence(guard.make_record({}, named, {"val"}, Leaks()))


def test_numbers_that_have_nothing_in_common_are_said() -> None:
    """Frames of one video in two folders: pictures alone decide, and of slow changes they see nothing."""
    pool, scored = split(12, lambda index: index % 4 == 0, lambda index: f"clip/{index:05d}.png")
    elsewhere = replace(scored, names=tuple(name.removeprefix("clip/") for name in scored.names))
    record = guard.make_record({}, Compared({"pool": pool, "val": elsewhere}), {"val"}, Leaks())
    assert [pair["names"] for pair in record["pairs"]] == ["no numbering in common"]
    words = "names of pool share no numbering with the scored ones, so no neighbours were looked for."
    assert sentence(record).endswith(words)
    other_clip = replace(scored, names=tuple(name.replace("clip", "other") for name in scored.names))
    for part in (scored, other_clip, replace(scored, names=tuple("abc"))):
        record = guard.make_record({}, Compared({"pool": pool, "val": part}), {"val"}, Leaks())
        assert "numbering" not in sentence(record)


def test_the_first_sentence_needs_no_torch() -> None:
    script = "import sys; from ssl_seg.leaks.record import sentence; sentence(None); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
