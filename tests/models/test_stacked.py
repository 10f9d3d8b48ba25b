"""The stacked network: its published sizes, where each map goes, and the drawing as a task's answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import densenet121

from pretext.colorize import Colorize
from pretext.denoise import Denoise
from pretext.inpaint import Inpaint
from pretext.jigsaw import Jigsaw
from ssl_seg import rng
from ssl_seg.config import load
from ssl_seg.models import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    RECONSTRUCTION,
    DecoderNet,
    DenseHead,
    Features,
    LightNet,
    ModelConfig,
    ReconstructionHead,
    SegmentationModel,
)
from ssl_seg.models.smp import FPN, DeepLabV3Plus, Segformer, Unet, UnetPlusPlus, UPerNet
from ssl_seg.models.stacked import STRIDES, Stacked, StackedDecoder
from ssl_seg.norm.convert import Kind, convert_norm, has_batch_norm
from ssl_seg.runs.folder import read_metrics
from ssl_seg.segment import Segment
from ssl_seg.stages.finetune import FinetuneConfig, finetune
from ssl_seg.stages.pretrain import PretrainConfig, pretrain
from ssl_seg.stages.setup import Options
from ssl_seg.stages.start import build_module
from ssl_seg.tasks import Batch, PretextTask
from ssl_seg.testing import check_decoder, check_encoder, check_pretext_task
from ssl_seg.training.multitask import make_views, weighted_total
from ssl_seg.weights.export import load_model
from tests.faults import message_of
from tests.small import UNTRACKED, learnt_by_heart

NARROW = StackedDecoder(widths=(16,) * 7)
SMALL = Stacked(growth_rate=16, blocks=(1, 1, 1, 1), width=16, decoder=NARROW)
SINGLE = Stacked(growth_rate=16, blocks=(1, 1, 1, 1), width=16, halves=1)
ADDED = StackedDecoder(widths=(32, 16, 16, 16, 16, 16, 16), merge="add")
TRANSPOSED = StackedDecoder(widths=(16,) * 7, upsampling="transposed")
DRAWN = {"type": "denoise", "decoder": "reconstruction"}


def network(encoder: Stacked, decoder: StackedDecoder = NARROW, classes: int = 2, norm: Kind = "keep") -> nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(encoder=encoder, decoder=decoder, norm=norm)
    built = config.build_encoder()
    return SegmentationModel(built, config.spec(built).dense(classes), ["a"] * classes)


def read_run(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())["config"]


def weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.requires_grad)


def images(count: int, height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count))


# As published


@pytest.mark.parametrize(("halves", "count"), [(2, 35_795_844), (1, 17_897_889)])
def test_it_has_as_many_weights_as_published(halves: int, count: int):
    with torch.device("meta"):
        model = network(Stacked(halves=halves), StackedDecoder(), classes=1)
        assert weights(model) == count
        for size in ((96, 128), (360, 480)):
            assert model(torch.empty(2, 3, *size)).shape == (2, 1, *size)


def test_the_whole_network_runs_and_answers():
    model = network(Stacked(halves=1), StackedDecoder(), classes=1)
    answer = model(images(2))
    assert answer.isfinite().all()
    assert answer.std() > 0


def test_the_dense_layers_are_those_of_torchvision():
    """The same maps as DenseNet-121's, whose first norm and activation are exchanged."""
    encoder = Stacked(halves=1).build().eval()
    theirs = densenet121().features.eval()
    stem, _, *stages = encoder.backbone
    theirs.norm0, theirs.relu0 = stem[1], stem[2]
    theirs.norm5 = nn.Identity()
    theirs.conv0.load_state_dict(stem[0].state_dict())
    for number, stage in enumerate(stages, start=1):
        parts = (stage,) if number == 4 else stage
        names = (f"denseblock{number}", f"transition{number}")
        for part, name in zip(parts, names, strict=False):
            theirs.get_submodule(name).load_state_dict(part.state_dict())
    image = images(1, 64, 128)
    wanted, level = [], (image - encoder.mean) / encoder.std
    for name, layer in theirs.named_children():
        level = layer(level)
        if name in ("relu0", "pool0", "transition1", "transition2", "transition3", "denseblock4"):
            wanted.append(level)
    with torch.no_grad():
        torch.testing.assert_close(encoder(image).maps, wanted)


def test_seven_blocks_double_the_resolution_and_the_second_is_pooled_again():
    model = network(SINGLE)
    decoder = model.head.decoder
    met: list[tuple[int, int]] = []
    for block in decoder.blocks:
        block.register_forward_hook(lambda _, given, made: met.append((given[0].shape[-1], made.shape[-1])))
    skips: list[int | None] = []
    for block in decoder.blocks:
        block.register_forward_hook(
            lambda _, given, made: skips.append(given[1] if given[1] is None else given[1].shape[-1])
        )
    model(images(1, 64, 128))
    strides = [(128 // before, 128 // after) for before, after in met]
    assert strides == [(64, 32), (32, 16), (32, 16), (16, 8), (8, 4), (4, 2), (2, 1)]
    assert skips == [None, 4, 4, 8, 16, 32, None]
    assert model.head.last.kernel_size == (1, 1)


# The drawing


def test_the_drawing_is_rgb_and_the_second_half_sees_it_normalized():
    encoder = SMALL.build().eval()
    backbone = encoder.backbone
    nn.init.zeros_(backbone.last.weight)
    with torch.no_grad():
        backbone.last.bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    seen: list[Tensor] = []
    backbone.second.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    drawn = encoder(images(1, 50, 70)).extras[RECONSTRUCTION]
    assert drawn.shape == (1, 3, 64, 128)
    colour = torch.tensor(IMAGENET_MEAN) + torch.tensor([0.0, 1.0, -1.0]) * torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(drawn[0, :, 3, 5], colour)
    torch.testing.assert_close((drawn - encoder.mean) / encoder.std, seen[0])


def test_a_single_network_draws_nothing():
    encoder = SINGLE.build()
    assert encoder.extras == ()
    assert encoder(images(1)).extras == {}


@pytest.mark.parametrize("encoder", [SMALL, SINGLE], ids=["two", "one"])
def test_the_answer_trains_every_weight(encoder: Stacked):
    """Of both halves, by the segmentation alone."""
    model = network(encoder)
    model(images(2)).square().mean().backward()
    # The last layer of a head starts near zero, and its gradient reaches what is below it all the same.
    assert all(weight.grad is not None and weight.grad.any() for weight in model.parameters())


def test_the_drawing_trains_the_first_half_alone():
    model = network(SMALL)
    head = ReconstructionHead(ModelConfig(encoder=SMALL, decoder=NARROW).spec(model.encoder), 3)
    assert not list(head.parameters())
    drawn = head(model.encoder(images(2, 50, 70)), (50, 70))
    assert drawn.shape == (2, 3, 50, 70)
    drawn.mean().backward()
    trained = {name.split(".")[1] for name, weight in model.encoder.named_parameters() if weight.grad is not None}
    assert trained == {"first", "decoder", "last"}


def test_a_task_whose_answer_is_the_drawing_passes_the_public_check():
    check_pretext_task(Denoise(decoder="reconstruction"), encoder=SMALL, steps=15, drop=0.9)


@pytest.mark.parametrize(
    "task",
    [Denoise(), Denoise(decoder="deep"), Inpaint(decoder="reconstruction"), Colorize(target="ab"), Jigsaw(grid=2)],
)
def test_heads_of_other_tasks_fit(task: PretextTask):
    config = ModelConfig(encoder=SMALL, decoder=NARROW)
    module = build_module(config, {"task": task}, 0)
    keys = torch.arange(2)
    view = task.corrupt(images(2, 64, 96), keys)
    prediction = module.predict({"task": view})["task"]
    assert task.loss(prediction, view).isfinite().all()


@pytest.mark.parametrize(
    ("encoder", "task", "message"),
    [
        (SINGLE, Denoise(decoder="reconstruction"), "decoder: reconstruction: model.encoder draws none; choose"),
        (SMALL, Colorize(decoder="reconstruction"), "decoder: reconstruction: is a picture, and the task asks for"),
    ],
)
def test_a_drawing_that_is_not_there_or_no_answer_is_one_line(encoder: Stacked, task: PretextTask, message: str):
    config = ModelConfig(encoder=encoder, decoder=NARROW)
    assert message_of(lambda: build_module(config, {"task": task}, 0)).startswith(message)


def test_noise_is_no_drawing():
    values = {**DRAWN, "target": "noise"}
    assert "decoder: reconstruction: is the picture; use" in message_of(lambda: load(PretextTask, values))


def test_the_usual_decoder_of_a_task_is_still_not_written_down():
    assert "decoder" not in Denoise().dump()
    assert load(PretextTask, Denoise(decoder="reconstruction").dump()) == Denoise(decoder="reconstruction")


# The contract


@pytest.mark.parametrize("encoder", [SMALL, SINGLE], ids=["two", "one"])
def test_encoders_pass_the_public_check(encoder: Stacked):
    check_encoder(encoder)


@pytest.mark.parametrize("decoder", [NARROW, ADDED, TRANSPOSED], ids=["usual", "added", "transposed"])
def test_decoders_pass_the_public_check(decoder: StackedDecoder):
    check_decoder(decoder, encoder=SINGLE)


@pytest.mark.parametrize("decoder", [ADDED, TRANSPOSED], ids=["added", "transposed"])
def test_the_first_half_has_a_decoder_of_its_own(decoder: StackedDecoder):
    encoder = SMALL.model_copy(update={"decoder": decoder})
    model = network(encoder)
    assert model(images(1, 33, 97)).shape == (1, 2, 33, 97)
    assert weights(model) != weights(network(SMALL))
    assert load(ModelConfig, ModelConfig(encoder=encoder).dump()).encoder == encoder


def test_added_skips_are_those_that_are_lifted_where_widths_differ():
    with torch.device("meta"):
        channels = Stacked().channels
        cat = StackedDecoder().build(channels, STRIDES)
        added = StackedDecoder(merge="add").build(channels, STRIDES)
    lifted = [tuple(block.lift.weight.shape[:2]) for block in added.blocks if isinstance(block.lift, nn.Conv2d)]
    assert lifted == [(256, 1024), (256, 512), (256, 128)]
    saved = 9 * (1024 * 256 + 512 * 256 + 256 * 256 + 128 * 64 + 64 * 32)
    assert weights(cat) - weights(added) == saved - 256 * (1024 + 512 + 128)


@pytest.mark.parametrize("size", [(64, 64), (96, 128), (360, 480), (33, 47)])
@torch.no_grad()
def test_any_size_is_answered_in_that_size(size: tuple[int, int]):
    model = network(SMALL).eval()
    answer = model(images(1, *size))
    assert answer.shape == (1, 2, *size)
    assert answer.isfinite().all()


@pytest.mark.filterwarnings("ignore:norm. sync. works on GPUs only")
@pytest.mark.parametrize("norm", get_args(Kind))
def test_norms_convert_and_group_norm_stays(norm: Kind):
    if norm == "frozen":
        model = network(SMALL)
        convert_norm(model.encoder, norm)
    else:
        model = network(SMALL, norm=norm)
    before = sum(isinstance(layer, nn.GroupNorm) for layer in network(SMALL).modules())
    kept = sum(type(layer) is nn.GroupNorm and layer.num_groups == 16 for layer in model.modules())
    assert kept >= before == 2 + 2 * (1 + 7 * 2), "two stems, two decoders of 15"
    assert has_batch_norm(model) == (norm in ("keep", "batch", "sync"))
    model.train()(images(2)).square().mean().backward()
    assert model.eval()(images(1, 33, 47)).isfinite().all()


@pytest.mark.parametrize(
    "decoder",
    [
        Unet(channels=(16, 16, 16, 16, 8, 8)),
        Segformer(channels=16),
        UPerNet(channels=16),
        DeepLabV3Plus(encoder_stride=32),
    ],
    ids=lambda decoder: decoder.type,
)
def test_other_decoders_read_its_maps(decoder: Any):
    model = network(SMALL, decoder)
    assert model.head.last.kernel_size == (3, 3)
    assert model(images(2, 64, 96)).shape == (2, 2, 64, 96)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"decoder": {"type": "stacked"}}, "model.decoder: stacked: wants maps at strides (4, 8, 16, 32, 32), not"),
        ({"encoder": {"type": "stacked"}}, "model.decoder.channels: unet: wants 6 numbers for maps at strides"),
        (
            {"encoder": {"type": "stacked"}, "decoder": {"type": "deeplabv3plus"}},
            "encoder stacked: has stride 32 only; choose another decoder",
        ),
        (
            {"encoder": {"type": "stacked", "halves": 1, "decoder": {"merge": "add"}}},
            "encoder: decoder: is that of the first of two halves; give model.decoder",
        ),
        (
            {"encoder": {"type": "stacked", "growth_rate": 5}},
            "encoder: the last map has 166 channels, no multiple of 16; choose another growth_rate",
        ),
        ({"encoder": {"type": "stacked", "width": 40}}, "encoder.width: "),
        ({"encoder": {"type": "stacked", "halves": 3}}, "encoder.halves: "),
        ({"decoder": {"type": "stacked", "widths": [16, 16]}}, "decoder.widths"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(model: dict[str, Any], message: str):
    def build() -> nn.Module:
        config = load(ModelConfig, model)
        return config.spec(config.build_encoder()).dense(2)

    assert message_of(build).startswith(message)


def test_maps_without_channels_are_refused():
    text = message_of(lambda: NARROW.build((16, 16, 16, 16, 16, 24), STRIDES))
    assert "of the last a multiple of 16, not (16, 16, 16, 16, 24); use" in text


# The last layer of a head


@pytest.mark.parametrize(
    "decoder",
    [
        Unet(channels=(16, 16, 16, 8, 8)),
        UnetPlusPlus(channels=(16, 16, 16, 8, 8)),
        FPN(pyramid_channels=16, channels=32),
        DeepLabV3Plus(channels=8, encoder_stride=32),
        UPerNet(channels=8),
        Segformer(channels=8),
        None,
    ],
    ids=lambda decoder: "light" if decoder is None else decoder.type,
)
def test_heads_of_other_decoders_are_as_ever(decoder: Any):
    """Bit for bit those of a 3 x 3 convolution that is drawn next, from the same state of torch's generator."""
    channels, strides = (16, 16, 24, 32, 48), (2, 4, 8, 16, 32)
    torch.manual_seed(0)
    net: DecoderNet = LightNet(48, 32) if decoder is None else decoder.build(channels, strides)
    torch.manual_seed(1)
    head = DenseHead(net, 3).eval()
    torch.manual_seed(1)
    last = nn.Conv2d(net.out_channels, 3, kernel_size=3, padding=1)
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)
    assert torch.equal(head.last.weight, last.weight)
    maps = [torch.randn(1, width, 64 // stride, 96 // stride) for width, stride in zip(channels, strides, strict=True)]
    with torch.no_grad():
        wanted = last(net(Features(maps, strides)))
        answer = head(Features(maps, strides), (64, 96))
    if wanted.shape[-2:] != (64, 96):
        wanted = F.interpolate(wanted, size=(64, 96), mode="bilinear", align_corners=False)
    assert torch.equal(answer, wanted)


# Learning


def test_it_learns_one_image_by_heart():
    model = network(SMALL, classes=3, norm="group")
    shares = learnt_by_heart(model, torch.optim.Adam(model.parameters(), lr=0.01), steps=60)
    assert min(shares) > 0.99


SQUARES = {"type": "synthetic", "kind": "squares", "size": [64, 64]}
LABELLED = {**SQUARES, "count": 4, "seed": 2}
COMMON = {
    "augment": {"crop": [64, 64], "zoom": [1.0, 1.0]},
    "train": {"steps": 2, "batch_size": 2, "warmup": 0, "workers": 0, "log_every": 1, "device": "cpu"},
    "tracking": UNTRACKED,
}
DRAWING = {**DRAWN, "distance": "smooth_l1"}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of denoising on the built-in squares."""
    values = {
        **COMMON,
        "data": {"pool": {**SQUARES, "count": 8}, "val": {**SQUARES, "count": 2, "seed": 1}},
        "model": ModelConfig(encoder=SMALL, decoder=NARROW).dump(),
        "tasks": {"denoise": DRAWING},
    }
    folder = tmp_path_factory.mktemp("stacked") / "pretrained"
    return pretrain(load(PretrainConfig, values), Options(folder, quiet=True)).folder


def learnt(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The parts of the encoder whose weights are others."""
    names = [name for name, _ in SMALL.build().named_parameters()]
    return {name.split(".")[1] for name in names if not torch.equal(before[name], after[name])}


def test_denoising_pretrains_the_first_half(pretrained: Path):
    config = load(PretrainConfig, read_run(pretrained))
    before = build_module(config.model, config.tasks, config.seed).encoder.state_dict()
    after = load_file(pretrained / "encoder" / "encoder.safetensors")
    assert learnt(before, after) == {"first", "decoder", "last"}
    assert not list(pretrained.glob("decoders/*"))


def test_denoising_joins_fine_tuning_with_the_labelled_images_as_the_pool(pretrained: Path, tmp_path: Path):
    values = {
        **COMMON,
        "data": {"labelled": LABELLED, "pool": LABELLED, "val": {**SQUARES, "count": 2, "seed": 3}},
        "tasks": {"denoise": {**DRAWING, "weight": 0.2}},
        "segment": {"weight": 0.8},
        "init": str(pretrained),
    }
    tuned = finetune(load(FinetuneConfig, values), Options(tmp_path / "tuned", quiet=True))
    lines = [line for line in read_metrics(tuned.folder) if "train/segment/loss" in line]
    assert len(lines) == 2
    assert all(line["train/denoise/loss"] > 0 for line in lines)
    tensors = load_file(tuned.folder / "model" / "model.safetensors")
    after = {name.removeprefix("encoder."): value for name, value in tensors.items() if name.startswith("encoder.")}
    before = load_file(pretrained / "encoder" / "encoder.safetensors")
    assert learnt(before, after) == {"first", "decoder", "last", "second"}
    model, _ = load_model(tuned.folder)
    assert model(images(1, 50, 70)).shape == (1, 2, 50, 70)


# One noisy image through both halves, as published: SmoothL1 of the drawing and of the mask
PUBLISHED = {
    "segment": {"sees": "denoise", "cross_entropy": 0.0, "smooth_l1": 1.0},
    "tasks": {"denoise": {**DRAWN, "stream": "labelled", "sigma": [0.2, 0.2], "weight": 0.02}},
}


def test_one_pass_draws_and_segments_as_published():
    drawing = load(PretextTask, PUBLISHED["tasks"]["denoise"])
    tasks = {"segment": load(Segment, {**PUBLISHED["segment"], "num_classes": 2}), "denoise": drawing}
    module = build_module(ModelConfig(encoder=SMALL, decoder=NARROW), tasks, 0)
    seen: list[Tensor] = []
    for half in (module.encoder.backbone.first, module.encoder.backbone.second):
        half.register_forward_hook(lambda _, given, made: seen.append(given[0]))
    clean, keys = images(2, 64, 64), torch.arange(2)
    mask = (clean.mean(dim=1) > 0.5).long()
    views = make_views(tasks, {"labelled": Batch(clean, keys, mask)})
    total = weighted_total(tasks, module(views))
    assert [len(given) for given in seen] == [2, 2], "each half once"
    noisy = drawing.corrupt(clean, rng.fold_in(keys, "denoise")).input
    torch.testing.assert_close(seen[0], (noisy - module.encoder.mean) / module.encoder.std)

    features = module.encoder(noisy)
    drawn, segmented = features.extras[RECONSTRUCTION], module.heads["segment"](features, (64, 64))
    assert (drawn - clean).abs().max() < 1, "else an error counts by its square here and by its size there"
    outputs = F.one_hot(mask).movedim(-1, 1).float()
    torch.testing.assert_close(total, F.smooth_l1_loss(drawn, clean) + F.smooth_l1_loss(segmented, outputs))

    total.backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in module.parameters())


def test_joint_training_needs_no_pool(tmp_path: Path):
    values = {
        **COMMON,
        **PUBLISHED,
        "data": {"labelled": LABELLED, "val": {**SQUARES, "count": 2, "seed": 3}},
        "model": ModelConfig(encoder=SMALL, decoder=NARROW).dump(),
    }
    config = load(FinetuneConfig, values)
    tuned = finetune(config, Options(tmp_path / "tuned", quiet=True))
    before = build_module(config.model, config.tasks, config.seed).encoder.state_dict()
    after = load_file(tuned.folder / "encoder" / "encoder.safetensors")
    assert learnt(before, after) == {"first", "decoder", "last", "second"}


def test_a_drawing_has_no_decoder_to_carry_on(pretrained: Path, tmp_path: Path):
    values = {**COMMON, "data": {"labelled": LABELLED}, "init": str(pretrained), "transfer": "encoder+denoise"}
    text = message_of(lambda: finetune(load(FinetuneConfig, values), Options(tmp_path / "tuned", quiet=True)))
    assert "no decoders/denoise.safetensors; name another" in text
