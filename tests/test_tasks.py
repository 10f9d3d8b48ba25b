from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from pretext.denoise import Denoise
from pretext.inpaint import Inpaint
from pretext.rotate import Rotate
from ssl_seg import losses, rng
from ssl_seg.config import Config, UserError, load
from ssl_seg.mixing import classmix_mask, copy_paste_mask
from ssl_seg.models import EncoderNet, EncoderSpec, Features, evaluating
from ssl_seg.rng import seeded
from ssl_seg.segment import Segment
from ssl_seg.tasks import Batch, Predict, PretextTask, Stream, Task, View, check_tasks, partners
from ssl_seg.training.multitask import MultiTask, dealing, make_views, weighted_total

SIZE = (16, 24)


class Backbone(nn.Module):
    """Five strided maps; counts its calls and what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, 2, 1) for i in range(5))
        self.batches: list[int] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        self.batches.append(len(x))
        maps = []
        for level in self.levels:
            x = F.gelu(level(x))
            maps.append(x)
        return maps


class Dense(nn.Module):
    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.last = nn.Conv2d(4, out_channels, 1)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        height, width = size
        return F.interpolate(self.last(features[0]), scale_factor=2)[..., :height, :width]


def network(tasks: dict[str, Task], seed: int = 0) -> MultiTask:
    torch.manual_seed(0)
    encoder = EncoderNet(Backbone(), (4,) * 5)
    spec = EncoderSpec(encoder.channels, encoder.strides, lambda channels, stride=1, decoder="full": Dense(channels))
    return MultiTask(encoder, spec, tasks, seed)


def batch(count: int = 4, labelled: bool = False, size: tuple[int, int] = SIZE) -> Batch:
    keys = rng.fold_in(rng.as_key(1), torch.arange(count))
    label = rng.randint(keys, size, 0, 3) if labelled else None
    return Batch(rng.uniform(keys, (3, *size)), keys, label, [f"image {i}" for i in range(count)])


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in module.named_parameters()}


# The batch and the contract


def test_a_batch_is_cut_like_a_list():
    whole = batch(5, labelled=True)
    part = whole[1::2]
    assert torch.equal(part.image, whole.image[[1, 3]])
    assert torch.equal(part.label, whole.label[[1, 3]])
    assert torch.equal(part.key, whole.key[[1, 3]])
    assert part.names == ["image 1", "image 3"]
    assert batch(3)[:2].label is None


@pytest.mark.parametrize("missing", ["corrupt", "head", "loss"])
def test_a_pretext_task_needs_its_three_methods(missing):
    methods = {name: lambda *_: None for name in ("corrupt", "head", "loss") if name != missing}
    incomplete = type("Incomplete", (PretextTask,), methods)
    with pytest.raises(TypeError, match=missing):
        incomplete()


def test_tasks_are_frozen_and_know_their_keys():
    with pytest.raises(ValidationError, match="frozen"):
        Rotate().weight = 2.0
    with pytest.raises(ValidationError, match="did you mean 'weight'"):
        Rotate(wieght=2.0)
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        Rotate(weight=-1.0)


def test_optional_methods_have_harmless_defaults():
    class Plain(PretextTask):
        def corrupt(self, image: Tensor, key: Tensor) -> View:
            return View(image, image)

        def head(self, encoder: EncoderSpec) -> nn.Module:
            return encoder.dense(3)

        def loss(self, prediction: Tensor, view: View) -> Tensor:
            return losses.regression("l1", prediction, view.target)

    task, some = Plain(), batch()
    view = task.view({"pool": some})
    assert task.prepare(some.image) is task
    assert task.metrics(view.input, view) == {}
    assert task.render(view.input, view) is None
    assert torch.equal(task.render_target(view), some.image)
    assert task.render_target(View(some.image, torch.zeros(4, dtype=torch.int64))) is None


# Segment


def test_segment_is_cross_entropy_plus_dice():
    some = batch(labelled=True)
    some.label[0, :4] = 255
    logits = torch.randn(4, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    view = Segment(num_classes=3).view({"labelled": some})
    assert torch.equal(view.input, some.image)
    assert torch.equal(view.target, some.label)
    entropy, dice = losses.cross_entropy(logits, some.label), losses.dice(logits, some.label)
    assert torch.equal(Segment(num_classes=3, dice=0).loss(logits, view), entropy)
    both = Segment(num_classes=3, cross_entropy=0.5, dice=2.0).loss(logits, view)
    assert torch.allclose(both, 0.5 * entropy + 2.0 * dice)
    with pytest.raises(ValidationError, match="nothing is learnt"):
        Segment(num_classes=3, cross_entropy=0.0)
    with pytest.raises(ValidationError, match="2 numbers for 3 classes"):
        Segment(num_classes=3, class_weights=(1.0, 2.0))


def test_segment_weights_its_classes():
    some = batch(labelled=True)
    logits = torch.randn(4, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    task = Segment(num_classes=3, dice=0, class_weights=(1.0, 5.0, 0.1))
    weights = torch.tensor([1.0, 5.0, 0.1])
    expected = [F.cross_entropy(logits[i : i + 1], some.label[i : i + 1], weight=weights) for i in range(4)]
    assert torch.allclose(task.loss(logits, task.view({"labelled": some})), torch.stack(expected))


def test_an_all_ignored_batch_has_no_loss_and_a_finite_gradient():
    task = Segment(num_classes=3, dice=1.0, class_weights=(1.0, 2.0, 3.0))
    some = batch(labelled=True)
    some.label[:] = 255
    logits = torch.randn(4, 3, *SIZE).requires_grad_()
    loss = task.loss(logits, task.view({"labelled": some}))
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(4))
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_a_loss_that_is_not_one_number_a_sample_is_refused_by_the_task_s_name():
    class Scalar(Rotate):
        def loss(self, prediction, view):
            return super().loss(prediction, view).mean()

    module = network({"scalar": Scalar()})
    with pytest.raises(ValueError, match=r"task scalar: its loss has the shape \(\)"):
        module(make_views(module.tasks, {"pool": batch()}))


def test_median_weights_balance_the_classes():
    pixels, beside = torch.tensor([600, 50, 100]), torch.tensor([1000, 250, 500])
    task = Segment(num_classes=3, class_weights="median").prepare(pixels, beside)
    # Frequencies where the class is seen: 0.6, 0.2, 0.2; the median is 0.2.
    assert task.class_weights == pytest.approx((1 / 3, 1.0, 1.0))


def test_median_weights_survive_an_absent_class():
    counts = torch.tensor([30, 0, 10])
    task = Segment(num_classes=3, class_weights="median").prepare(counts, torch.tensor([40, 0, 40]))
    assert task.class_weights == pytest.approx((2 / 3, 1.0, 2.0))  # of 0.75 and 0.25, the median is 0.5
    fixed = Segment(num_classes=3, class_weights=(1, 2, 3))
    assert fixed.prepare(counts, counts) is fixed


def test_the_balance_of_classes_has_a_power_and_a_cap():
    pixels, beside = torch.tensor([600, 50, 100, 0]), torch.tensor([1000, 250, 10000, 0])
    # Frequencies where the class is seen: 0.6, 0.2, 0.01; the median is 0.2.
    plain, full, root, capped = (
        Segment.model_validate({"num_classes": 4, "class_weights": weights}).prepare(pixels, beside).class_weights
        for weights in (
            "median",
            {"balance": "median"},
            {"balance": "median", "power": 0.5},
            {"power": 0.5, "cap": 2},
        )
    )
    assert plain == full == pytest.approx((1 / 3, 1.0, 20.0, 1.0))
    assert root == pytest.approx((3**-0.5, 1.0, 20**0.5, 1.0))
    assert capped == pytest.approx((3**-0.5, 1.0, 2.0, 1.0))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"balance": "mean"}, "segment.class_weights: balance: Input should be 'median', not \"mean\""),
        ({"power": 2}, "segment.class_weights: power: Input should be less than or equal to 1, not 2"),
        ({"power": 0}, "segment.class_weights: power: Input should be greater than 0, not 0"),
        ({"cap": 0.5}, "segment.class_weights: cap: Input should be greater than or equal to 1, not 0.5"),
        ({"pover": 0.5}, "segment.class_weights: config: unknown key 'pover'; did you mean 'power'?"),
        ("medium", "segment.class_weights: "),
    ],
)
def test_a_balance_that_is_none_is_one_line(weights, said):
    class Holder(Config):
        segment: Segment

    with pytest.raises(UserError) as caught:
        load(Holder, {"segment": {"class_weights": weights}})
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_what_changes_cross_entropy_is_refused_without_it():
    for changed in ({"label_smoothing": 0.1}, {"hardest": 0.25}):
        with pytest.raises(ValidationError, match=f"{next(iter(changed))}: changes cross_entropy, whose weight is 0"):
            Segment(num_classes=3, cross_entropy=0.0, lovasz=1.0, **changed)


def test_segment_is_the_sum_of_its_losses():
    some = batch(labelled=True)
    logits = torch.randn(4, 3, *SIZE, generator=torch.Generator().manual_seed(2))
    weights = torch.tensor([1.0, 5.0, 0.1])
    parts = {"cross_entropy": 0.5, "dice": 0.25, "focal": 2.0, "tversky": 3.0, "lovasz": 4.0}
    parts |= {"binary": 5.0, "smooth_l1": 6.0}
    options = {"focal_gamma": 1.5, "tversky_beta": 0.6, "label_smoothing": 0.2, "hardest": 0.3, "smooth_l1_beta": 0.4}
    task = Segment(num_classes=3, **parts, **options, class_weights=tuple(weights.tolist()))
    expected = (
        0.5 * losses.cross_entropy(logits, some.label, weights=weights, smoothing=0.2, hardest=0.3)
        + 0.25 * losses.dice(logits, some.label)
        + 2.0 * losses.focal(logits, some.label, weights=weights, gamma=1.5)
        + 3.0 * losses.tversky(logits, some.label, beta=0.6)
        + 4.0 * losses.lovasz(logits, some.label)
        + 5.0 * losses.binary(logits, some.label)
        + 6.0 * losses.smooth_l1(logits, some.label, beta=0.4)
    )
    assert torch.allclose(task.loss(logits, task.view({"labelled": some})), expected)


def test_segment_is_written_as_version_0_1_wrote_it_until_a_new_key_is_used():
    assert set(Segment().dump()) == {"weight", "num_classes", "cross_entropy", "dice", "class_weights"}
    used = Segment.model_validate({"lovasz": 1.0, "class_weights": {"power": 0.5, "cap": 10}})
    assert used.dump()["class_weights"] == {"balance": "median", "power": 0.5, "cap": 10.0}
    assert used.dump()["lovasz"] == 1.0
    assert load(Segment, used.dump()) == used
    regression = Segment.model_validate({"cross_entropy": 0, "smooth_l1": 1.0, "smooth_l1_beta": 0.5})
    assert {"smooth_l1", "smooth_l1_beta"} <= set(regression.dump())
    assert "binary" not in regression.dump()
    assert load(Segment, regression.dump()) == regression


def test_dice_stands_beside_cross_entropy_and_comes_with_no_other_loss_unasked():
    some = batch(labelled=True)
    logits = torch.randn(4, 3, *SIZE, generator=torch.Generator().manual_seed(3))
    view = Segment(num_classes=3).view({"labelled": some})
    both = losses.cross_entropy(logits, some.label) + losses.dice(logits, some.label)
    torch.testing.assert_close(Segment(num_classes=3).loss(logits, view), both)
    regression = Segment.model_validate({"num_classes": 3, "cross_entropy": 0, "smooth_l1": 1.0})
    torch.testing.assert_close(regression.loss(logits, view), losses.smooth_l1(logits, some.label))
    assert load(Segment, {"cross_entropy": "0.0", "focal": 1.0}).dice == 0
    assert load(Segment, {"cross_entropy": 0, "dice": 0.5}).dice == 0.5
    with pytest.raises(UserError, match="cross_entropy"):
        load(Segment, {"cross_entropy": "none"})


def test_segment_asks_for_labels():
    with pytest.raises(ValueError, match="needs labels"):
        Segment(num_classes=3).view({"labelled": batch()})


def coded(count: int, classes: int = 4) -> Batch:
    """Images that say who they are and what their label is, in blocks of four classes; one corner is ignored."""
    blocks = rng.randint(rng.fold_in(rng.as_key(2), torch.arange(count)), (4, 6), 0, classes)
    label = blocks.repeat_interleave(SIZE[0] // 4, 1).repeat_interleave(SIZE[1] // 6, 2)
    label[:, :2, :2] = 255
    own = torch.arange(count).view(-1, 1, 1).expand(label.shape) / 100
    image = torch.stack([own, label / 255, own], dim=1)
    return Batch(image, rng.fold_in(rng.as_key(1), torch.arange(count)), label)


@pytest.mark.parametrize("mix", ["cutmix", "classmix", "copy_paste"])
def test_what_is_pasted_from_the_partner_brings_its_labels(mix):
    some = coded(32)
    task = Segment(num_classes=4, mix=mix, mix_share=1.0)
    assert task.mixes
    view = task.view({"labelled": some})
    assert torch.equal(view.input[:, 1] * 255, view.target.float())
    own = torch.arange(32).view(-1, 1, 1)
    origin = (view.input[:, 0] * 100).round().long()
    assert ((origin == own) | (origin == own ^ 1)).all()
    pasted = origin != own
    assert pasted.flatten(1).any(dim=1).float().mean() > 0.9
    assert torch.equal(view.target, torch.where(pasted, partners(some.label), some.label))
    assert view.target.dtype == torch.int64
    if mix != "cutmix":  # whole classes of the partner
        for own_pasted, other in zip(pasted, partners(some.label), strict=True):
            assert torch.equal(own_pasted, torch.isin(other, other[own_pasted]))
    # The originals are as they were, and a pair by itself gives what it gives in the batch.
    assert torch.equal(some.image, coded(32).image)
    alone = task.view({"labelled": some[6:8]})
    assert torch.equal(alone.input, view.input[6:8])
    assert torch.equal(alone.target, view.target[6:8])


def test_classmix_pastes_whole_classes_half_of_those_that_are_shown():
    label = coded(64).label
    key = rng.fold_in(rng.as_key(5), torch.arange(64))
    pasted = classmix_mask(key, label)[:, 0]
    assert not pasted[label == 255].any()
    seen = set()
    for mask, ids in zip(pasted, label, strict=True):
        chosen, shown = set(ids[mask].tolist()), set(ids.unique().tolist()) - {255}
        assert len(chosen) == len(shown) // 2
        assert not chosen & set(ids[~mask].tolist())
        seen |= chosen
    assert seen == {0, 1, 2, 3}, "no class is spared"
    assert not classmix_mask(key, torch.full_like(label, 3)).any()
    assert not classmix_mask(key, torch.full_like(label, 255)).any()


def test_copy_paste_leaves_out_the_class_that_is_shown_most():
    label = coded(64).label
    key = rng.fold_in(rng.as_key(5), torch.arange(64))
    pasted = copy_paste_mask(key, label)[:, 0]
    for mask, ids in zip(pasted, label, strict=True):
        counts = torch.bincount(ids[ids != 255])
        chosen, others = set(ids[mask].tolist()), set(counts.nonzero().flatten().tolist()) - {counts.argmax().item()}
        assert chosen <= others
        assert len(chosen) == (len(others) + 1) // 2
        assert not chosen & set(ids[~mask].tolist())
    two = (label == 1).long()  # an object and its ground
    two[:, :2, :2] = 255
    rarer = torch.where((two == 1).sum(dim=(1, 2)) <= (two == 0).sum(dim=(1, 2)), 1, 0)
    assert torch.equal(copy_paste_mask(key, two)[:, 0], two == rarer.view(-1, 1, 1))
    assert not copy_paste_mask(key, torch.full_like(label, 3)).any()
    assert not copy_paste_mask(key, torch.full_like(label, 255)).any()


@pytest.mark.parametrize("mix", ["cutmix", "classmix", "copy_paste"])
def test_a_share_of_the_images_is_mixed_and_mixing_is_off_by_default(mix):
    some = coded(400)
    changed = []
    for share in (0.0, 0.5, 1.0):
        view = Segment(num_classes=4, mix=mix, mix_share=share).view({"labelled": some})
        changed.append((view.input != some.image).flatten(1).any(dim=1))
    assert not changed[0].any()
    assert changed[1].float().mean() == pytest.approx(0.5, abs=0.08)
    assert (changed[2] | ~changed[1]).all()
    plain = Segment(num_classes=4)
    assert not plain.mixes
    assert plain.view({"labelled": some}).input is some.image
    assert not {"mix", "mix_share"} & set(plain.model_dump())
    assert Segment(**Segment(mix=mix).model_dump()) == Segment(mix=mix)
    with pytest.raises(ValidationError, match="mix_share: nothing is mixed"):
        Segment(mix_share=0.3)


def test_labelled_images_that_are_mixed_stay_in_pairs():
    tasks = {"segment": Segment(num_classes=3, mix="cutmix"), "denoise": Denoise()}
    assert dealing(tasks, "labelled", split=True) == (1, 2)
    assert dealing(tasks, "pool", split=True) == (1, 1)
    assert dealing({"segment": Segment(num_classes=3)}, "labelled", split=True) == (1, 1)


# Views


def test_two_tasks_corrupt_one_image_independently():
    tasks = {"first": Denoise(), "second": Denoise()}
    views = make_views(tasks, {"pool": batch()})
    assert not torch.allclose(views["first"].input, views["second"].input)
    again = make_views({"second": Denoise()}, {"pool": batch()})
    assert torch.equal(again["second"].input, views["second"].input)  # whatever other tasks there are


def test_every_task_sees_its_own_stream():
    pool, labelled = batch(4), batch(2, labelled=True)
    views = make_views({"denoise": Denoise(), "segment": Segment(num_classes=3)}, {"pool": pool, "labelled": labelled})
    assert len(views["denoise"].input) == 4
    assert torch.equal(views["segment"].input, labelled.image)


def test_split_deals_the_pool_out_and_leaves_the_labels_whole():
    tasks = {"denoise": Denoise(), "segment": Segment(num_classes=3), "inpaint": Inpaint(), "again": Denoise()}
    pool, labelled = batch(8), batch(2, labelled=True)
    views = make_views(tasks, {"pool": pool, "labelled": labelled}, split=True)
    assert torch.equal(views["denoise"].target, pool.image[0::3])
    assert torch.equal(views["inpaint"].target, pool.image[1::3])
    assert torch.equal(views["again"].target, pool.image[2::3])
    assert torch.equal(views["segment"].input, labelled.image)


def test_split_deals_out_pairs_where_a_task_mixes():
    class Mixing(Denoise):
        mixes: ClassVar[bool] = True

        def corrupt(self, image: Tensor, key: Tensor) -> View:
            return View((image + partners(image)) / 2, image)

    tasks = {"denoise": Denoise(), "mixing": Mixing()}
    pool = batch(8)
    views = make_views(tasks, {"pool": pool}, split=True)
    assert torch.equal(views["denoise"].target, pool.image[[0, 1, 4, 5]])
    assert torch.equal(views["mixing"].target, pool.image[[2, 3, 6, 7]])
    assert torch.equal(views["mixing"].input[0], (pool.image[2] + pool.image[3]) / 2)
    assert batch(8)[[2, 3]].names == ["image 2", "image 3"]


def test_partners_change_places_and_a_last_one_alone_stays():
    assert partners(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]
    assert partners(torch.arange(5)).tolist() == [1, 0, 3, 2, 4]
    rows = torch.rand(4, 3, 2)
    assert torch.equal(partners(rows)[[1, 0, 3, 2]], rows)


class Agree(Task):
    """Reads both streams and answers through another task's head, which a teacher has to agree with."""

    streams: ClassVar[tuple[Stream, ...]] = ("pool", "labelled")
    borrowed_head: ClassVar[str | None] = "segment"
    asks_teacher: ClassVar[bool] = True

    def view(self, batches: Mapping[Stream, Batch], teacher: Predict | None = None) -> View:
        image = torch.cat([batches["pool"].image, batches["labelled"].image])
        return View(image, teacher(image))

    def loss(self, prediction: Tensor, view: View) -> Tensor:
        return losses.regression("mse", prediction, view.target)


def test_a_task_reads_both_streams_and_uses_the_head_of_another():
    tasks = {"segment": Segment(num_classes=3), "denoise": Denoise(), "agree": Agree()}
    module = network(tasks)
    assert set(module.heads) == {"segment", "denoise"}
    asked = []

    def teach(head: str, image: Tensor) -> Tensor:
        asked.append((head, len(image)))
        return torch.zeros(len(image), 3, *SIZE)

    pool, labelled = batch(4), batch(2, labelled=True)
    views = make_views(tasks, {"pool": pool, "labelled": labelled}, teach=teach)
    assert asked == [("segment", 6)]
    assert torch.equal(views["agree"].input, torch.cat([pool.image, labelled.image]))
    assert len(module(views)["agree"]) == 6
    assert module.encoder.backbone.batches == [2, 4, 6], "images of other streams are encoded apart"
    halves = make_views({**tasks, "again": Agree()}, {"pool": pool, "labelled": labelled}, split=True, teach=teach)
    assert torch.equal(halves["denoise"].target, pool.image[0::3])
    assert torch.equal(halves["agree"].input, torch.cat([pool.image[1::3], labelled.image])), "the labels stay whole"


SHARING = {"segment": Segment(num_classes=3, sees="denoise"), "denoise": Denoise(stream="labelled")}


def test_a_pretext_task_reads_the_stream_that_it_is_told():
    assert (Denoise().streams, Denoise(stream="labelled").streams) == (("pool",), ("labelled",))
    for kind in (Denoise, Rotate):
        assert "stream" not in kind().dump(), "a run without it is described as before"
        assert load(PretextTask, kind(stream="labelled").dump()) == kind(stream="labelled")
    assert "sees" not in Segment().dump()
    tasks = {"denoise": Denoise(stream="labelled"), "rotate": Rotate(), "segment": Segment(num_classes=3)}
    both = {"pool": batch(4), "labelled": batch(2, labelled=True)}
    views = make_views(tasks, both, split=True)
    assert torch.equal(views["denoise"].target, both["labelled"].image)
    assert len(views["rotate"].target) == 4, "the pool is dealt out to those that read it"
    module = network(tasks)
    module(views)
    assert module.encoder.backbone.batches == [2, 4, 2], "whoever reads labelled images is encoded apart"


def test_one_pass_of_a_noisy_image_answers_two_tasks():
    labelled = batch(2, labelled=True)
    views = make_views(SHARING, {"labelled": labelled})
    assert views["segment"].input is views["denoise"].input
    assert not torch.equal(views["segment"].input, labelled.image)
    assert torch.equal(views["segment"].target, labelled.label)
    module, by_hand = network(SHARING), network(SHARING)
    total = weighted_total(SHARING, module(views))
    total.backward()
    assert module.encoder.backbone.batches == [2]
    features = by_hand.encoder(SHARING["denoise"].corrupt(labelled.image, rng.fold_in(labelled.key, "denoise")).input)
    wanted = sum(
        task.weight * task.loss(by_hand.heads[name](features, SIZE), views[name]).mean()
        for name, task in SHARING.items()
    )
    wanted.backward()
    assert torch.equal(total, wanted)
    for name, gradient in gradients(by_hand).items():
        torch.testing.assert_close(gradients(module)[name], gradient, rtol=0, atol=0)
    alone = {name: network(SHARING).predict({name: view})[name] for name, view in views.items()}
    torch.testing.assert_close(network(SHARING).predict(views), alone, rtol=0, atol=0)


def test_a_shared_pass_keeps_its_bits_beside_others():
    tasks = {**SHARING, "rotate": Rotate(), "inpaint": Inpaint(stream="labelled")}
    module = network(tasks)
    views = make_views(tasks, {"pool": batch(4), "labelled": batch(2, labelled=True)})
    found = module.predict(views)
    assert module.encoder.backbone.batches == [2, 4, 2]
    alone = network(SHARING).predict(make_views(SHARING, {"labelled": batch(2, labelled=True)}))
    torch.testing.assert_close({name: found[name] for name in alone}, alone, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({}, "segment.sees: 'denoise' is no other task that has a weight; those are: none"),
        ({"denois": Denoise(stream="labelled")}, "no other task that has a weight; those are: denois"),
        ({"denoise": Denoise()}, "segment.sees: denoise shows the pool, which has no masks; give tasks.denoise.stream"),
        (
            {"denoise": Rotate(stream="labelled"), "inpaint": Inpaint()},
            "segment.sees: denoise does not leave each pixel at its place, .*; those that do: inpaint",
        ),
    ],
)
def test_an_input_that_cannot_be_segmented_is_refused_in_a_line(others: dict[str, Task], said: str):
    with pytest.raises(UserError, match=said) as caught:
        check_tasks({"segment": SHARING["segment"], **others}, ("labelled", "pool"), has_teacher=False)
    assert "\n" not in str(caught.value)
    check_tasks(SHARING, ("labelled",), has_teacher=False)


def test_the_tasks_whose_input_a_mask_fits():
    kinds = {name: PretextTask.choose(name) for name in PretextTask.names()}
    shipped = {name: kind for name, kind in kinds.items() if kind.__module__.startswith("pretext.")}
    assert {name for name, kind in shipped.items() if kind.in_place} == {"colorize", "denoise", "distill", "inpaint"}


def test_what_is_mixed_is_shown_by_no_other():
    with pytest.raises(ValidationError, match=r"sees: what denoise shows is not mixed; drop mix=cutmix, or sees"):
        Segment(sees="denoise", mix="cutmix")


def test_both_tasks_move_a_head_that_they_share():
    tasks = {"segment": Segment(num_classes=3), "agree": Agree(weight=0.5)}
    views = make_views(
        tasks,
        {"pool": batch(4), "labelled": batch(2, labelled=True)},
        teach=lambda head, image: torch.ones(len(image), 3, *SIZE),
    )
    found = []
    for shown in (["segment"], ["agree"], ["segment", "agree"]):
        module = network(tasks)
        weighted_total(tasks, module({name: views[name] for name in shown})).backward()
        found.append(module.heads["segment"].last.weight.grad)
    assert all(gradient.any() for gradient in found)
    torch.testing.assert_close(found[0] + found[1], found[2])


@pytest.mark.parametrize(
    ("tasks", "streams", "teacher", "said"),
    [
        ({"agree": Agree()}, ("pool", "labelled"), True, "the tasks with a head are: none"),
        ({"denoise": Denoise(), "agree": Agree()}, ("pool",), True, "reads labelled images, and this stage has none"),
        ({"segment": Segment(num_classes=2), "agree": Agree()}, ("pool", "labelled"), False, "give train.ema"),
        ({"segment": Agree(), "agree": Agree()}, ("pool", "labelled"), True, "tasks.segment: uses the head of"),
    ],
)
def test_a_task_that_misses_something_is_refused_in_a_line(tasks, streams, teacher, said):
    with pytest.raises(UserError, match=said) as caught:
        check_tasks(tasks, streams, teacher)
    assert "\n" not in str(caught.value)
    check_tasks({"segment": Segment(num_classes=2), "agree": Agree()}, ("pool", "labelled"), has_teacher=True)


def test_a_task_without_any_head_says_what_to_do():
    class Headless(Agree):
        borrowed_head: ClassVar[str | None] = None

    with pytest.raises(NotImplementedError, match="Headless: give it a head, or name a borrowed_head"):
        network({"headless": Headless()})


# MultiTask


def test_forward_gives_every_tasks_losses():
    tasks = {"denoise": Denoise(), "rotate": Rotate(), "segment": Segment(num_classes=3)}
    module = network(tasks)
    views = make_views(tasks, {"pool": batch(4), "labelled": batch(2, labelled=True)})
    values = module(views)
    assert {name: tuple(loss.shape) for name, loss in values.items()} == {
        "denoise": (4,),
        "rotate": (4,),
        "segment": (2,),
    }
    assert all(loss.dtype == torch.float32 for loss in values.values())
    predictions = module.predict(views)
    assert predictions["segment"].shape == (2, 3, *SIZE)
    for name, task in tasks.items():
        assert torch.equal(values[name], task.loss(predictions[name], views[name]))


def test_views_of_one_stream_and_size_share_an_encoder_pass():
    tasks = {"denoise": Denoise(), "inpaint": Inpaint(), "segment": Segment(num_classes=3)}
    module = network(tasks)
    views = make_views(tasks, {"pool": batch(4), "labelled": batch(2, labelled=True)})
    module(views)
    assert module.encoder.backbone.batches == [8, 2]
    small = replace(views["inpaint"], input=views["inpaint"].input[..., :8, :8])
    module.encoder.backbone.batches.clear()
    predictions = module.predict({**views, "inpaint": small})
    assert sorted(module.encoder.backbone.batches) == [2, 4, 4]
    assert predictions["inpaint"].shape[-2:] == (8, 8)


def test_together_and_task_by_task_give_the_same_gradients():
    tasks = {"denoise": Denoise(weight=0.5), "inpaint": Inpaint(), "rotate": Rotate(weight=2.0)}
    views = make_views(tasks, {"pool": batch()})
    together, in_turn = network(tasks), network(tasks)
    weighted_total(tasks, together(views)).backward()
    for name, view in views.items():
        weighted_total(tasks, in_turn({name: view})).backward()
    expected = gradients(in_turn)
    for name, gradient in gradients(together).items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_a_task_that_is_not_shown_leaves_its_head_alone():
    tasks = {"denoise": Denoise(), "rotate": Rotate()}
    module = network(tasks)
    views = make_views(tasks, {"pool": batch()})
    module({"denoise": views["denoise"]})["denoise"].sum().backward()
    assert all(weight.grad is None for weight in module.heads["rotate"].parameters())
    assert all(weight.grad is not None for weight in module.heads["denoise"].parameters())


def test_labelled_images_give_the_same_bits_with_and_without_a_pool():
    tasks = {"denoise": Denoise(), "segment": Segment(num_classes=3)}
    module = network(tasks)
    views = make_views(tasks, {"pool": batch(4), "labelled": batch(2, labelled=True)})
    both = module(views)["segment"]
    assert torch.equal(module({"segment": views["segment"]})["segment"], both)


def test_labelled_images_give_the_same_bits_beside_another_task_that_reads_them():
    tasks = {"segment": Segment(num_classes=3), "again": Segment(num_classes=3)}
    module = network(tasks)
    views = make_views(tasks, {"labelled": batch(2, labelled=True)})
    both = module(views)["segment"]
    assert module.encoder.backbone.batches == [2, 2]
    assert torch.equal(module({"segment": views["segment"]})["segment"], both)


def test_a_head_starts_the_same_whichever_other_tasks_there_are():
    few = network({"rotate": Rotate()})
    many = network({"denoise": Denoise(), "rotate": Rotate()})
    other = network({"rotate": Rotate()}, seed=1)
    assert torch.equal(few.heads["rotate"].linear.weight, many.heads["rotate"].linear.weight)
    assert not torch.equal(few.heads["rotate"].linear.weight, other.heads["rotate"].linear.weight)


def test_half_precision_predictions_are_judged_in_float32():
    tasks = {"denoise": Denoise(), "rotate": Rotate()}
    module = network(tasks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = module(make_views(tasks, {"pool": batch()}))
    assert all(loss.dtype == torch.float32 for loss in values.values())


def test_the_total_is_the_weighted_sum_of_means():
    tasks = {"a": Rotate(weight=2.0), "b": Rotate(weight=0.0), "c": Rotate()}
    values = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([9.0]), "c": torch.tensor([1.0, 1.0, 4.0])}
    assert weighted_total(tasks, values).item() == pytest.approx(2.0 * 2.0 + 0.0 + 2.0)


def test_seeded_draws_depend_on_the_key_and_leave_torchs_generator_alone():
    before = torch.get_rng_state()
    with seeded(rng.as_key(-5)):
        first = torch.rand(3)
    with seeded(rng.as_key(-5)):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_restores_the_mode_even_after_an_error(training):
    module = nn.Sequential(nn.Dropout()).train(training)
    seen = []

    def fail() -> None:
        with evaluating(module):
            seen.append((module[0].training, torch.is_grad_enabled()))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert seen == [(False, False)]
    assert module[0].training is training
    assert torch.is_grad_enabled()


def test_evaluating_leaves_a_frozen_part_frozen():
    module = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3))).train()
    module[0].eval()
    module[1][1].eval()
    with evaluating(module):
        assert not any(part.training for part in module.modules())
    assert [part.training for part in module.modules()] == [True, False, True, True, False]


def test_a_weight_rises_along_a_sigmoid_and_is_whole_after_it():
    task = Rotate(weight=2.0, ramp=10)
    assert task.weight_at(0) == pytest.approx(2 * math.exp(-5))
    assert task.weight_at(5) == pytest.approx(2 * math.exp(-1.25))
    assert all(task.weight_at(step) < task.weight_at(step + 1) for step in range(10))
    assert task.weight_at(10) == task.weight_at(999) == task.weight_at(None) == 2.0
    assert Rotate(weight=2.0).weight_at(0) == 2.0
    values = {"a": torch.tensor([3.0]), "b": torch.tensor([1.0])}
    total = weighted_total({"a": task, "b": Rotate()}, values, step=5)
    assert total.item() == pytest.approx(3 * 2 * math.exp(-1.25) + 1)


def test_runs_without_a_ramp_are_described_as_before_there_was_one():
    assert "ramp" not in Rotate().dump()
    assert "ramp" not in Segment().dump()
    assert Rotate(ramp=3).dump() == {"type": "rotate", "weight": 1.0, "ramp": 3}
