"""What stages ask of a data set before any work is done."""

from __future__ import annotations

import pytest

from ssl_seg.config import UserError
from ssl_seg.stages.setup import check_images
from tests.small import Textured


class Dark(Textured):
    def caution(self) -> str:
        return f"textures of seed {self.seed}: nearly black"


def test_a_caution_is_told_once_and_by_the_first_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key in ("data.pool", "data.val", "pretrain.a.data.pool"):  # as the arms of a study have one folder
        check_images(key, Dark(seed=1))
    check_images("data.test", Textured())
    assert capsys.readouterr().err == "CAUTION: textures of seed 1: nearly black\n"
    monkeypatch.setenv("RANK", "1")
    check_images("data.pool", Dark(seed=2))
    assert capsys.readouterr().err == ""


def test_an_empty_data_set_is_refused_by_its_key() -> None:
    with pytest.raises(UserError, match=r"data\.pool: holds no image"):
        check_images("data.pool", Textured(count=0))
