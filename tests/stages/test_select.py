"""`ssl-seg select`: from a folder of images to the folder of those to label."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from ssl_seg import cli, images
from ssl_seg.config import UserError, load, read_words
from ssl_seg.data.splits import Labels
from ssl_seg.data.workers import ALONE, Workers
from ssl_seg.datasets.folder import Folder
from ssl_seg.figures import panels
from ssl_seg.models import ModelConfig
from ssl_seg.stages.features import describe, embed
from ssl_seg.stages.finetune import FinetuneConfig, finetune
from ssl_seg.stages.pretrain import PretrainConfig, pretrain
from ssl_seg.stages.select import SelectConfig, select
from ssl_seg.stages.setup import Options
from ssl_seg.weights.export import load_model
from tests.small import Textured, finetuning, pretraining

SMALL = {"encoder": {"type": "timm", "name": "mobilenetv2_035"}}


def picture(kind: str, number: int) -> np.ndarray:
    """A dark field with bright dots, or a bright one with dark stripes."""
    random = np.random.default_rng([len(kind), number])
    image = random.normal(30 if kind == "dots" else 190, 6, (64, 96, 3))
    if kind == "dots":
        for top, left in random.integers(4, 54, (8, 2)):
            image[top : top + 6, left : left + 6] += 150
    else:
        image[:, :: 6 + number % 3] -= 120
    return image.clip(0, 255).astype(np.uint8)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Eleven pictures of dots and one of stripes."""
    folder = tmp_path / "photos"
    for number in range(11):
        images.write_image(folder / f"clip/{number:02}.png", picture("dots", number))
    images.write_image(folder / "other/stripes.png", picture("stripes", 0))
    return folder


def config_of(pool: Path, **values: Any) -> SelectConfig:
    data = {"pool": {"type": "folder", "images": str(pool)}, **values.pop("data", {})}
    return load(SelectConfig, {"data": data, "model": SMALL, "workers": 0, "device": "cpu", "count": 2, **values})


def test_the_rare_kind_is_chosen_and_the_folder_is_ready_to_label(pool: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = select(config_of(pool), tmp_path / "to_label", quiet=True)
    assert "other/stripes.png" in found.names
    assert sum(found.shares) == pytest.approx(1)
    assert found.shares[found.names.index("other/stripes.png")] == pytest.approx(1 / 12)
    for name in found.names:
        written = images.read_image(tmp_path / "to_label" / "images" / name)
        assert (written == images.read_image(pool / name)).all()
    record = json.loads((tmp_path / "to_label" / "selected.json").read_text())
    assert [entry["name"] for entry in record["images"]] == list(found.names)
    assert record["covered"] == pytest.approx(found.covered)
    assert images.read_image(tmp_path / "to_label" / "sheet.png").shape[1] > 900
    assert images.read_image(tmp_path / "to_label" / "map.png").std() > 1


def test_the_names_can_be_laid_on_a_fine_tuning(pool: Path, tmp_path: Path) -> None:
    found = select(config_of(pool), tmp_path / "to_label", quiet=True)
    labels = load(Labels, read_words([str(tmp_path / "to_label" / "labels.yaml")])["labels"])
    chosen = labels.choose(Folder(images=str(pool)))
    assert tuple(chosen.name(index) for index in range(2)) == found.names
    with pytest.raises(UserError, match=r"^labels.names: stripes.png is none of the 12 labelled images"):
        Labels(names=("stripes.png",)).choose(Folder(images=str(pool)))
    for wrong in ({"names": []}, {"names": ["a", "a"]}, {"names": ["a"], "fraction": 0.5}):
        with pytest.raises(UserError):
            load(Labels, wrong)


def test_labelled_images_count_as_covered_and_are_not_chosen_again(pool: Path, tmp_path: Path) -> None:
    labelled = tmp_path / "labelled"
    for name in ("clip/00.png", "other/stripes.png"):
        images.write_image(labelled / name, images.read_image(pool / name))
    data = {"labelled": {"type": "folder", "images": str(labelled)}}
    found = select(config_of(pool, data=data, count=12), tmp_path / "to_label", quiet=True)
    assert len(found.names) == 10
    assert not {"clip/00.png", "other/stripes.png"} & set(found.names)
    assert found.covered_before > 0
    with pytest.raises(UserError, match=r"^data.pool: of 12 images 12 are labelled"):
        select(config_of(pool, data={"labelled": {"type": "folder", "images": str(pool)}}), tmp_path / "none")


def test_what_will_be_scored_is_not_chosen(pool: Path, tmp_path: Path) -> None:
    scored = tmp_path / "scored"
    images.write_image(scored / "renamed.png", images.read_image(pool / "other" / "stripes.png"))
    data = {"scored": {"type": "folder", "images": str(scored)}}
    found = select(config_of(pool, data=data, count=11), tmp_path / "to_label", quiet=True)
    assert "other/stripes.png" not in found.names
    assert json.loads((found.out / "selected.json").read_text())["left_out_as_scored"] == ["other/stripes.png"]


def test_a_pretrained_run_compares(pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(load(PretrainConfig, pretraining(steps=1)), Options(tmp_path / "run", quiet=True))
    words = ["select", str(pool), "--count", "3", "--with", str(tmp_path / "run"), "workers=0", "device=cpu"]
    words += ["--out", str(tmp_path / "to_label")]
    call = partial(cli.app, args=words, prog_name="ssl-seg", standalone_mode=False)
    assert cli.run(call) == 0
    assert "3 images: " in capsys.readouterr().out
    assert len(list((tmp_path / "to_label" / "images").rglob("*.png"))) == 3
    assert cli.run(call) == 2
    assert "exists already" in capsys.readouterr().err


def test_features_are_the_same_in_batches_of_any_size_and_with_workers() -> None:
    torch.manual_seed(0)
    encoder = load(ModelConfig, SMALL).build_encoder()
    examples = Textured(count=20)
    seen = describe(encoder, examples, ALONE, torch.device("cpu"))
    again = describe(encoder, examples, Workers(2), torch.device("cpu"))
    assert seen.images.shape == (20, 20)
    assert seen.regions.shape == (20, 64, 32)
    assert (seen.images == again.images).all()
    assert (seen.regions == again.regions).all()


def test_a_folder_that_cannot_be_made_is_one_line(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/to_label: cannot be written \(Not a directory\)"):
        select(config_of(pool), tmp_path / "file" / "to_label", quiet=True)


@pytest.mark.parametrize("look", [describe, embed])
def test_features_that_are_not_finite_are_one_line_with_the_image(look: Callable[..., object]) -> None:
    encoder = load(ModelConfig, SMALL).build_encoder()
    next(encoder.parameters()).data[0] = torch.nan
    with pytest.raises(UserError, match=r"^textured_0_0: what the encoder sees in it is not finite; name another run$"):
        look(encoder, Textured(count=2), ALONE, torch.device("cpu"))


@pytest.fixture
def finetuned(tmp_path: Path) -> list[str]:
    """Two seeds of a fine-tuning on textured scenes."""
    runs = [tmp_path / f"run{seed}" for seed in range(2)]
    for seed, run in enumerate(runs):
        finetune(load(FinetuneConfig, {**finetuning(steps=2), "seed": seed}), Options(run, quiet=True))
    return list(map(str, runs))


def test_a_fine_tuned_run_tells_how_unsure_it_is_and_which_classes_lack_pixels(
    pool: Path, tmp_path: Path, finetuned: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the definition: entropy of the softmax over the log of the number of classes."""
    labelled = tmp_path / "labelled"
    images.write_image(labelled / "images" / "a.png", picture("dots", 99))
    images.write_mask(labelled / "masks" / "a.png", np.zeros((64, 96), np.uint8), panels.palette(2))
    folder = {"type": "folder", "images": str(labelled / "images"), "masks": str(labelled / "masks")}
    data = {"labelled": {**folder, "classes": ["ground", "disc"]}}
    found = select(config_of(pool, data=data, init=finetuned[0]), tmp_path / "one", quiet=True)
    assert found.unlabelled == ("disc",)
    record = json.loads((found.out / "selected.json").read_text())
    assert record["classes"]["ground"]["labelled_pixels"] == 64 * 96
    model, _ = load_model(finetuned[0])
    for entry, uncertain in zip(record["images"], found.uncertain, strict=True):
        image = torch.from_numpy(images.read_image(pool / entry["name"])).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            probabilities = model(image).softmax(dim=1)[0].flatten(1).numpy()
        assert entry["uncertain"] == uncertain == pytest.approx(entropy(probabilities, base=2).mean(), abs=1e-5)
        assert entry["predicted"]["disc"] == pytest.approx((probabilities.argmax(axis=0) == 1).mean())
        assert "seeds_differ" not in entry
    words = ["select", str(pool), "--with", finetuned[0], "--with", finetuned[1], "workers=0", "device=cpu"]
    words += ["--count", "2", "--out", str(tmp_path / "both")]
    assert cli.run(partial(cli.app, args=words, prog_name="ssl-seg", standalone_mode=False)) == 0
    out, err = capsys.readouterr()
    assert "uncertain: " in out
    assert "data.labelled: not given, so images that are labelled already may be chosen again" in err
    both = json.loads((tmp_path / "both" / "selected.json").read_text())["images"]
    assert all(0 < entry["seeds_differ"] < entry["uncertain"] for entry in both)


def test_several_runs_are_seeds_of_one_fine_tuning(pool: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^init: runs/a is no fine-tuned run; name one run, or several seeds"):
        select(config_of(pool, init=["runs/a", "runs/b"]), tmp_path / "to_label", quiet=True)
    assert not (tmp_path / "to_label").exists()
