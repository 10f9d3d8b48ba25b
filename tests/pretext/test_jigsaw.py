from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from pydantic import ValidationError
from scipy import stats
from scipy.spatial.distance import pdist
from torch import Tensor, nn
from torch.nn import functional as F

from pretext.jigsaw import Jigsaw, PermutationHead, PlaceHead, assign, distant_permutations, recolour
from ssl_seg import rng
from ssl_seg.config import UserError
from ssl_seg.models import EncoderSpec, Features, evaluating
from ssl_seg.tasks import View
from ssl_seg.testing import check_pretext_task

RARE = 1e-4  # fixed keys: a test passes always or never
UNGUARDED = {"gap": 0.0, "jitter": 0.0, "colour": 0.0, "displace": 0}
RESNET = ((16, 16, 24, 32, 40), (2, 4, 8, 16, 32))
DILATED_TRANSFORMER = ((0, 8, 16, 32, 32), (2, 4, 8, 16, 16))


def keys(count: int, seed: int = 0) -> Tensor:
    return rng.fold_in(rng.as_key(seed), torch.arange(count))


def noise(count: int, height: int, width: int) -> Tensor:
    return rng.uniform(keys(count, 9), (3, height, width))


def spec(channels: tuple[int, ...] = RESNET[0], strides: tuple[int, ...] = RESNET[1]) -> EncoderSpec:
    return EncoderSpec(channels, strides, dense=lambda *_: nn.Identity())


def maps(
    count: int, side: int, channels: tuple[int, ...] = RESNET[0], strides: tuple[int, ...] = RESNET[1]
) -> Features:
    pairs = zip(channels, strides, strict=True)
    levels = [rng.normal(keys(count, stride), (width, side // stride, side // stride)) for width, stride in pairs]
    return Features(levels, strides)


def cut_out(task: Jigsaw, picture: Tensor) -> np.ndarray:
    """The tiles of puzzles `(B, 3, H, W)` as `(B, N, 3, h, w)`, found by other arithmetic than the task's."""
    layout = task.layout(*picture.shape[-2:])
    tops, lefts = (
        [(side - task.grid * cell) // 2 + (cell - tile) // 2 + number * cell for number in range(task.grid)]
        for side, cell, tile in zip(picture.shape[-2:], layout.cell, layout.tile, strict=True)
    )
    height, width = layout.tile
    tiles = [picture[..., top : top + height, left : left + width] for top in tops for left in lefts]
    return torch.stack(tiles, dim=1).numpy()


# The contract


@pytest.mark.parametrize(
    ("task", "size"),
    [
        (Jigsaw(), (64, 64)),
        (Jigsaw(grid=2), (41, 48)),
        (Jigsaw(grid=4), (64, 64)),
        (Jigsaw(**UNGUARDED), (48, 48)),
        (Jigsaw(answer="permutation", permutations=20), (48, 48)),
        (Jigsaw(answer="permutation", grid=2, permutations=24), (48, 64)),
    ],
    ids=repr,
)
def test_every_answer_and_grid_keeps_the_contract(task, size):
    check_pretext_task(task, size=size)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grid": 1}, "greater than or equal to 2"),
        ({"gap": 0.6}, "less than or equal to 0.5"),
        ({"gap": 0.5, "jitter": 0.5}, "gap \\+ jitter is 1"),
        ({"colour": 1.0}, "less than 1"),
        ({"displace": -1}, "greater than or equal to 0"),
        ({"answer": "permutation", "grid": 2, "permutations": 25}, "4 tiles have only 24 orders, not 25"),
        ({"answer": "permutation", "permutations": 1}, "greater than or equal to 2"),
        ({"answer": "order"}, "'permutation'"),
    ],
)
def test_jigsaw_refuses_options_without_meaning(options, words):
    with pytest.raises(ValidationError, match=words):
        Jigsaw.model_validate(options)


def test_an_image_too_small_for_its_tiles_is_refused_in_one_line():
    images = noise(1, 18, 60)
    with pytest.raises(
        UserError, match=r"18 x 60 in a 3 x 3 grid leaves tiles of . x 1. pixels, under 4; use a larger"
    ):
        Jigsaw().corrupt(images, keys(1))
    assert Jigsaw(grid=2).corrupt(images, keys(1)).input.shape == images.shape


# The puzzle


@settings(max_examples=30)
@given(
    grid=st.integers(2, 4),
    height=st.integers(36, 70),
    width=st.integers(36, 70),
    gap=st.sampled_from([0.0, 0.1, 0.2]),
    jitter=st.sampled_from([0.0, 0.15, 0.3]),
    displace=st.integers(0, 1),
    answer=st.sampled_from(["places", "permutation"]),
    seed=st.integers(0, 1000),
)
def test_every_tile_lies_in_the_cell_that_the_target_names(grid, height, width, gap, jitter, displace, answer, seed):
    task = Jigsaw(grid=grid, gap=gap, jitter=jitter, displace=displace, colour=0.0, answer=answer, permutations=9)
    images = noise(2, height, width)
    view = task.corrupt(images, keys(2, seed))
    layout, places = task.layout(height, width), task.places(view.target).numpy()
    before, after = layout.gap[0] // 2, layout.gap[0] - layout.gap[0] // 2
    for image, tiles, place in zip(images.numpy(), cut_out(task, view.input), places, strict=True):
        assert sorted(place) == list(range(grid**2))
        for tile, number in zip(tiles, place, strict=True):
            row, column = divmod(int(number), grid)
            top = (height % grid) // 2 + row * (height // grid)
            left = (width % grid) // 2 + column * (width // grid)
            cell = image[:, top : top + height // grid, left : left + width // grid]
            found = []
            for channel in range(3):  # noise: a tile's pixels are found in one place only
                windows = sliding_window_view(cell[channel], tile.shape[1:])
                found += np.argwhere((windows == tile[channel]).all(axis=(2, 3))).tolist()
            assert len(found) == 3
            assert np.ptp(found, axis=0).max() <= 2 * displace
            rows = [first for first, _ in found]
            assert before <= min(rows)
            assert max(rows) + tile.shape[1] <= height // grid - after


def test_tiles_and_their_channels_reach_all_they_may():
    task = Jigsaw(grid=2, gap=0.1, jitter=0.2, colour=0.0, displace=1)  # cells of 20: 2 of gap, 4 of jitter, 2 of lens
    ramp = torch.arange(1600.0).view(40, 40) / 1600  # tells row and column
    images = ramp.expand(400, 3, 40, 40)
    view = task.corrupt(images, keys(400))
    first = np.round(cut_out(task, view.input)[..., 0, 0] * 1600)  # (B, N, 3)
    place = view.target.numpy()[..., None]
    rows, columns = first // 40 - 20 * (place // 2), first % 40 - 20 * (place % 2)
    green_first = np.bincount(rows[..., 1].astype(int).ravel(), minlength=8)
    assert set(np.flatnonzero(green_first)) == {1, 2, 3, 4, 5, 6, 7}  # both draws together: a triangle with a flat top
    expected = np.convolve(np.full(5, 1 / 5), np.full(3, 1 / 3)) * green_first.sum()
    assert stats.chisquare(green_first[1:], expected).pvalue > RARE
    apart = (rows[..., 0] - rows[..., 1]).astype(int).ravel() + 2
    assert stats.chisquare(np.bincount(apart), np.array([1, 2, 3, 2, 1]) / 9 * apart.size).pvalue > RARE
    assert abs(np.corrcoef(apart, (columns[..., 0] - columns[..., 1]).ravel())[0, 1]) < 0.1
    assert abs(np.corrcoef(rows[..., 1].ravel(), columns[..., 1].ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("size", [(48, 48), (37, 61), (50, 40)])
def test_a_puzzle_without_guards_is_put_together_into_the_image_itself(size):
    task, images = Jigsaw(**UNGUARDED), noise(4, *size)
    view = task.corrupt(images, keys(4))
    inner = (..., *(slice(side % 3 // 2, side % 3 // 2 + side // 3 * 3) for side in size))
    assert not torch.equal(view.input[inner], images[inner])
    assert torch.equal(task.render_target(view)[inner], images[inner])
    border = torch.ones(size, dtype=torch.bool)
    border[inner] = False
    shown = images[inner].mean(dim=(2, 3))
    assert torch.allclose(view.input[..., border], shown.unsqueeze(2))


@pytest.mark.parametrize("answer", ["places", "permutation"])
def test_a_right_answer_is_counted_and_drawn_as_one(answer):
    task, images = Jigsaw(answer=answer), noise(3, 48, 60)
    view = task.corrupt(images, keys(3))
    classes = 9 if answer == "places" else 100
    right = F.one_hot(view.target, classes).movedim(-1, 1).float()
    assert task.metrics(right, view)["accuracy"].tolist() == [1.0] * 3
    assert task.metrics(right, view)["solved"].tolist() == [1.0] * 3
    assert torch.equal(task.render(right, view), task.render_target(view))
    ordered = cut_out(task, task.render_target(view))
    expected = np.stack(
        [
            tiles[np.argsort(place)]
            for tiles, place in zip(cut_out(task, view.input), task.places(view.target).numpy(), strict=True)
        ]
    )
    assert np.array_equal(ordered, expected)


def test_two_tiles_exchanged_cost_two_ninths_and_the_puzzle():
    task = Jigsaw()
    view = task.corrupt(noise(2, 48, 48), keys(2))
    swapped = view.target.clone()
    swapped[1, [3, 7]] = swapped[1, [7, 3]]
    guess = F.one_hot(swapped, 9).transpose(1, 2).float()
    figures = task.metrics(guess, view)
    assert figures["accuracy"].tolist() == pytest.approx([1.0, 7 / 9])
    assert figures["solved"].tolist() == [1.0, 0.0]
    assert (task.loss(50 * guess, view)[0] < 1e-6).item()
    assert task.loss(50 * guess, view)[1].item() == pytest.approx(50 * 2 / 9)


def test_a_class_of_255_and_more_is_counted():
    task = Jigsaw(grid=3, answer="permutation", permutations=300)
    view = View(noise(3, 48, 48), torch.tensor([0, 255, 299]))
    assert torch.allclose(task.loss(torch.zeros(3, 300), view), torch.full((3,), 300.0).log())


# Nothing but the tiles tells a place


def test_orders_are_uniform_over_keys():
    images = torch.zeros(1, 3, 40, 40)
    four = Jigsaw(grid=2).corrupt(images.expand(4800, -1, -1, -1), keys(4800)).target
    counts = torch.unique(four, dim=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > RARE
    nine = Jigsaw().corrupt(images.expand(900, -1, -1, -1), keys(900, 1)).target
    for tile in range(9):
        assert stats.chisquare(torch.bincount(nine[:, tile], minlength=9).numpy()).pvalue > RARE
    listed = Jigsaw(answer="permutation", permutations=20).corrupt(images.expand(1000, -1, -1, -1), keys(1000)).target
    assert stats.chisquare(torch.bincount(listed, minlength=20).numpy()).pvalue > RARE


def test_the_space_between_the_tiles_is_their_mean_colour():
    task, images = Jigsaw(gap=0.2), noise(3, 50, 64)
    view = task.corrupt(images, keys(3))
    tiles = torch.from_numpy(cut_out(task, view.input))
    mean = tiles.mean(dim=(1, 3, 4))
    between = torch.isclose(view.input, mean[..., None, None], atol=1e-5).all(dim=1).flatten(1).sum(dim=1)
    assert between.tolist() == [50 * 64 - tiles[0, :, 0].numel()] * 3


def test_a_flat_picture_gives_the_same_puzzle_whatever_the_order():
    images = torch.tensor([0.2, 0.5, 0.7]).view(1, 3, 1, 1).expand(20, 3, 52, 47)
    view = Jigsaw(colour=0.0).corrupt(images, keys(20))
    torch.testing.assert_close(view.input, images)
    assert len(view.target.unique(dim=0)) == 20


def test_colours_change_tile_by_tile_within_the_strength():
    tiles = torch.full((300, 3, 9, 2, 2), 0.4)
    factor = (recolour(tiles, 0.2, keys(300))[..., 0, 0] / 0.4).numpy()  # brightness times a channel's gain
    assert 0.8**2 <= factor.min() < 0.7
    assert 1.35 < factor.max() <= 1.2**2 + 1e-6
    one, other = factor[:, :, 0], factor[:, :, 1]
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.1
    brightness = np.corrcoef(factor[:, 0].ravel(), factor[:, 1].ravel())[0, 1]  # shared by channels, their gains not
    assert 0.4 < brightness < 0.6
    waves = 0.4 + 0.1 * torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).expand_as(tiles)
    changed = recolour(waves, 0.2, keys(300))
    relative = (changed.std(dim=(3, 4)) / changed.mean(dim=(3, 4)) / 0.25).numpy()  # contrast over brightness
    assert relative.std() > 0.1
    assert torch.equal(recolour(waves, 0.0, keys(300)), waves)


def borders(tiles: np.ndarray, normalized: bool) -> list[np.ndarray]:
    """The pixels along a tile's left, right, top and bottom edge, each `(N, 3, length)`."""
    edges = [tiles[..., :, 0], tiles[..., :, -1], tiles[..., 0, :], tiles[..., -1, :]]
    if not normalized:
        return edges
    centred = [edge - edge.mean(axis=2, keepdims=True) for edge in edges]
    return [edge / np.sqrt((edge**2).sum(axis=(1, 2), keepdims=True) + 1e-4) for edge in centred]


def solve_by_edges(tiles: np.ndarray, normalized: bool, orders: np.ndarray) -> np.ndarray:
    """The place of each of nine tiles `(9, 3, h, w)` by which edges go on best, over all arrangements.

    `normalized` compares their shapes, blind to each tile's colour.
    """
    left, right, top, bottom = borders(tiles, normalized)
    beside = ((right[:, None] - left[None]) ** 2).sum(axis=(2, 3))
    below = ((bottom[:, None] - top[None]) ** 2).sum(axis=(2, 3))
    cost = np.zeros(orders.shape[1])
    for place in range(9):  # orders[place]: the tile laid there
        if place % 3 < 2:
            cost += beside[orders[place], orders[place + 1]]
        if place < 6:
            cost += below[orders[place], orders[place + 3]]
    return np.argsort(orders[:, cost.argmin()])


def scenes(count: int, side: int) -> Tensor:
    """Random fields of several scales, as photographs have: smooth light and texture, `(B, 3, side, side)`."""
    image = torch.zeros(count, 3, side, side)
    for scale in (3, 6, 12, 24, 48):
        coarse = rng.normal(keys(count, scale), (3, scale, scale))
        shared = coarse.mean(dim=1, keepdim=True) * 1.5 + 0.5 * coarse
        image += F.interpolate(shared, size=(side, side), mode="bicubic") / scale**0.7
    return (0.5 + 0.3 * image).clamp(0, 1)


def test_a_solver_by_edges_fails_where_the_guards_are_on():
    orders = np.ascontiguousarray(np.array(list(permutations(range(9)))).T)
    images = scenes(8, 96)

    def accuracy(task: Jigsaw) -> float:
        view = task.corrupt(images, keys(len(images), 3))
        tiles = cut_out(task, view.input)
        by_solver = []
        for normalized in (False, True):
            found = np.stack([solve_by_edges(puzzle, normalized, orders) for puzzle in tiles])
            by_solver.append((found == view.target.numpy()).mean())
        return max(by_solver)

    assert accuracy(Jigsaw(**UNGUARDED)) > 0.95
    assert accuracy(Jigsaw()) < 0.4
    # Colour alone stops nothing: the distance between the tiles is what counts.
    assert accuracy(Jigsaw(**{**UNGUARDED, "colour": Jigsaw().colour})) > 0.9


# Permutations


@pytest.mark.parametrize(("size", "count"), [(4, 24), (5, 30), (9, 30), (16, 20)])
def test_permutations_are_distinct_and_farther_apart_than_random_ones(size, count):
    table = distant_permutations(size, count)
    assert table.shape == (count, size)
    assert torch.equal(table.sort(dim=1).values, torch.arange(size).expand(count, -1))
    assert len(table.unique(dim=0)) == count
    distance = pdist(table.numpy(), "hamming") * size
    random = pdist(rng.permutation(keys(count), size).numpy(), "hamming") * size
    assert distance.min() > random.min()
    assert distance.mean() > random.mean()


def merit(order: tuple[int, ...], chosen: list[tuple[int, ...]]) -> tuple[int, int]:
    distances = [sum(a != b for a, b in zip(order, other, strict=True)) for other in chosen]
    return min(distances), sum(distances)


def test_permutations_are_chosen_as_the_naive_algorithm_does():
    table = [tuple(order) for order in distant_permutations(4, 10).tolist()]
    for count in range(1, 10):
        best = max(merit(order, table[:count]) for order in permutations(range(4)))
        assert merit(table[count], table[:count]) == best


def test_permutations_are_the_same_ones_everywhere():
    # A head that was trained on other orders would say the wrong ones.
    expected = [[0, 5, 3, 2, 4, 7, 6, 8, 1], [8, 1, 7, 6, 5, 4, 2, 0, 3], [3, 8, 4, 5, 7, 2, 1, 0, 6]]
    assert distant_permutations(9, 30)[[0, 1, 29]].tolist() == expected
    assert torch.equal(distant_permutations(9, 30)[:10], distant_permutations(9, 10))


# Answers to places


@settings(max_examples=30)
@given(count=st.integers(1, 9), seed=st.integers(0, 1000))
def test_the_surest_answers_are_taken_first_and_no_place_twice(count, seed):
    logits = rng.normal(keys(3, seed), (count, count))
    places = assign(logits)
    for sample, place in zip(logits.log_softmax(dim=1), places.tolist(), strict=True):
        assert sorted(place) == list(range(count))
        score = sample.numpy().copy()
        for _ in range(count):
            row, column = np.unravel_index(score.argmax(), score.shape)
            assert place[column] == row
            score[row], score[:, column] = -np.inf, -np.inf


# Heads


@pytest.mark.parametrize(("channels", "strides"), [RESNET, DILATED_TRANSFORMER])
@pytest.mark.parametrize("answer", ["places", "permutation"])
def test_heads_fit_any_encoder_and_use_each_map_from_stride_8_on(channels, strides, answer):
    task = Jigsaw(answer=answer, permutations=12)
    head = task.head(spec(channels, strides))
    features = maps(2, 64, channels, strides)
    for level in features:
        level.requires_grad_()
    logits = head(features, (50, 61))
    assert logits.shape == ((2, 9, 9) if answer == "places" else (2, 12))
    logits.square().sum().backward()
    used = [level.grad is not None and bool(level.grad.any()) for level in features]
    assert used == [False, False, True, True, True]
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in head.modules())


@settings(max_examples=20)
@given(
    height=st.integers(40, 100),
    width=st.integers(40, 100),
    stride=st.sampled_from([8, 16, 32]),
    grid=st.integers(2, 3),
    gap=st.sampled_from([0.0, 0.2]),
)
def test_pooling_averages_over_each_tiles_own_pixels(height, width, stride, grid, gap):
    task = Jigsaw(grid=grid, gap=gap)
    rows, columns = (-(-side // 32) * 32 // stride for side in (height, width))
    level = rng.normal(keys(2), (5, rows, columns))
    pooled = task.layout(height, width).pool(level, stride)
    pixels = level.repeat_interleave(stride, 2).repeat_interleave(stride, 3)[..., :height, :width]
    expected = cut_out(task, pixels).mean(axis=(3, 4))
    np.testing.assert_allclose(pooled.numpy(), expected, atol=1e-5)


def test_tiles_that_change_places_take_their_answers_with_them():
    torch.manual_seed(0)
    head = PlaceHead(spec(), Jigsaw().layout, 9)
    features = maps(2, 96)
    order = rng.permutation(rng.as_key("order"), 9)

    def shuffled(level: Tensor) -> Tensor:
        side = level.shape[-1] // 3
        blocks = F.unfold(level, side, stride=side)  # (B, C*side*side, 9): the cells, row by row
        return F.fold(blocks[..., order], level.shape[-2:], side, stride=side)

    with evaluating(head):
        logits = head(features, (96, 96))
        again = head(replace(features, maps=[shuffled(level) for level in features]), (96, 96))
    assert logits.std() > 0.1
    torch.testing.assert_close(again, logits[..., order], atol=1e-5, rtol=1e-4)


def test_tiles_are_compared_with_each_other():
    torch.manual_seed(0)
    head = PlaceHead(spec(), Jigsaw().layout, 9)
    features = maps(1, 96)
    changed = replace(features, maps=[level.clone() for level in features])
    for level in changed:
        third = level.shape[-1] // 3
        level[..., -third:, -third:] *= -1.0  # the last tile
    with evaluating(head):
        moved = (head(changed, (96, 96)) - head(features, (96, 96))).abs().amax(dim=(0, 1))
    assert (moved > 1e-4).all()


def test_an_order_is_told_by_which_tile_lies_where():
    torch.manual_seed(0)
    head = PermutationHead(spec(), Jigsaw().layout, 9, 100)
    features = maps(1, 96)
    mirrored = replace(features, maps=[level.flip(3) for level in features])
    with evaluating(head):
        assert not torch.allclose(head(features, (96, 96)), head(mirrored, (96, 96)))


class Levels(nn.Module):
    """Five small convolutions of stride 2."""

    def __init__(self) -> None:
        super().__init__()
        channels = RESNET[0]
        pairs = zip((3, *channels), channels, strict=False)
        self.levels = nn.ModuleList(nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in pairs)

    def forward(self, image: Tensor) -> Features:
        image = F.pad(image, (0, -image.shape[-1] % 32, 0, -image.shape[-2] % 32))
        levels = []
        for level in self.levels:
            image = F.gelu(level(image))
            levels.append(image)
        return Features(levels, RESNET[1])


@pytest.mark.parametrize("grid", [2, 3])
def test_a_picture_whose_colour_tells_the_place_is_learnt_and_holds_for_new_puzzles(grid):
    task = Jigsaw(grid=grid, colour=0.05)
    row, column = torch.linspace(0.1, 0.9, 60).view(-1, 1), torch.linspace(0.1, 0.9, 52).view(1, -1)
    gradient = torch.stack(torch.broadcast_tensors(row, column, torch.tensor(0.5)))
    images = gradient.expand(16, -1, -1, -1)
    torch.manual_seed(0)
    encoder, head = Levels(), task.head(spec())
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=2e-3)
    for step in range(60):
        view = task.corrupt(images, keys(16, step))
        optimizer.zero_grad()
        task.loss(head(encoder(view.input), (60, 52)), view).mean().backward()
        optimizer.step()
    unseen = task.corrupt(images, keys(16, 1000))
    with evaluating(head):
        figures = task.metrics(head(encoder(unseen.input), (60, 52)), unseen)
    assert figures["accuracy"].mean() > 0.95
    assert figures["solved"].mean() > 0.8
