"""The table of encoders: its rows are what is found today, its page says what it holds, its command prints it."""

from __future__ import annotations

import re

import pytest
import torch

from ssl_seg import cli
from ssl_seg.models.support import matching, shipped, support_of
from ssl_seg.models.timm import Timm
from ssl_seg.models.timm_maps import Look, Sight
from ssl_seg.testing import check_encoder
from ssl_seg.testing.support import faults_of
from tests.faults import message_of
from tests.support import NAMES, PAGE, page

# Quick to build, and one of each way to be adapted.
CHEAP = ("resnet18", "mobilevitv2_050", "convmixer_768_32", "visformer_tiny", "levit_conv_128s", "legacy_xception")
ROWS = {row.encoder: row for row in shipped()}


def test_the_page_and_the_table_are_of_one_run() -> None:
    text = PAGE.read_text()
    day = re.search(r"\d{4}-\d\d-\d\d", text)
    assert day is not None
    assert page(shipped(), day[0]).splitlines()[7:] == text.splitlines()[7:], "python -m tests.support writes both"
    assert list(ROWS) == NAMES


@pytest.mark.parametrize("name", CHEAP)
def test_a_row_is_what_is_found(name: str) -> None:
    assert support_of(name) == ROWS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_what_is_found_and_holds(name: str) -> None:
    assert support_of(name) == ROWS[name]
    assert list(faults_of(ROWS[name])) == []


@pytest.mark.parametrize(
    "name",
    [
        "xcit_nano_12_p8_224",  # one stride, which is not 16
        "levit_conv_128s",  # one size, strides 16 to 64
        pytest.param("mobilevitv2_050", marks=pytest.mark.slow),  # multiples of 64
        pytest.param("efficientvim_m1", marks=pytest.mark.slow),  # a weight that reaches no map
        pytest.param("maxvit_rmlp_pico_rw_256", marks=pytest.mark.slow),  # windows
        pytest.param("legacy_xception", marks=pytest.mark.slow),  # convolutions without padding
    ],
)
def test_adapted_encoders_pass_the_public_check(name: str) -> None:
    check_encoder(Timm(name=name), sizes=[(33, 70)])


def test_the_maps_of_convolutions_without_padding_lie_where_the_image_is() -> None:
    """A bright spot is found at its place in each map, and nothing comes from the border."""
    torch.manual_seed(0)
    encoder = Timm(name="legacy_xception").build().eval()
    image = torch.full((1, 3, 128, 192), 0.5)
    spot = image.clone()
    spot[..., 32:48, 128:144] = 1.0
    with torch.no_grad():
        changes = [(a - b).abs().mean(dim=(0, 1)) for a, b in zip(encoder(image), encoder(spot), strict=True)]
    for change, stride in zip(changes[:3], encoder.strides, strict=False):
        rows, columns = (
            (change.sum(dim=axis) * torch.arange(side)).sum() / change.sum()
            for axis, side in ((1, change.shape[0]), (0, change.shape[1]))
        )
        assert abs((rows + 0.5) * stride - 40) < 1.5 * stride
        assert abs((columns + 0.5) * stride - 136) < 1.5 * stride


def test_a_network_of_one_size_sees_every_image_at_that_size() -> None:
    sight = Sight(unit=(224, 224), fixed=True)
    assert sight.shown(torch.zeros(1, 3, 64, 96)).shape[-2:] == (224, 224)
    many = Sight(unit=(224, 224))
    assert many.shown(torch.zeros(1, 3, 64, 448)).shape[-2:] == (224, 448)
    assert many.laid(torch.zeros(1, 5, 14, 28), 16, (64, 448)).shape == (1, 5, 4, 28)


def test_maps_of_two_sizes_at_one_stride_are_refused() -> None:
    class Two(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            return [image[:, :, ::12, ::12], image[:, :, ::16, ::16]]

    with pytest.raises(ValueError, match="several sizes at one stride"):
        Look.at(Two(), Sight(unit=(240, 240), fixed=True))


def test_the_command_prints_the_table_and_looks_at_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(lambda: cli.app(args=["models"], standalone_mode=False)) == 0
    printed = capsys.readouterr().out
    assert f"{len(NAMES)} networks of timm" in printed
    assert "hiera_tiny_224" in printed
    assert cli.run(lambda: cli.app(args=["models", "resnet10t"], standalone_mode=False)) == 0
    assert "1 networks of timm: 1 supported" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("resnt18", "did you mean resnet18"), ("*", "narrow it to 100 or fewer"), ("zzz*", "try a part of a name")],
)
def test_a_pattern_of_none_or_too_many_is_one_line(pattern: str, said: str) -> None:
    message = message_of(lambda: matching(pattern))
    assert message.startswith("models: ")
    assert said in message
    assert "\n" not in message


def test_a_part_of_a_name_finds_all_that_hold_it() -> None:
    assert matching("resnet18") == ["resnet18"]
    assert {"hiera_tiny_224", "sam2_hiera_tiny"} <= set(matching("hiera"))
