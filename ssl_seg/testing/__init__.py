"""Conformance tests for plug-ins: one line in a third party's test file checks a task, a network part or a data set."""

from ssl_seg.testing.datasets import check_dataset
from ssl_seg.testing.networks import check_decoder, check_encoder
from ssl_seg.testing.tasks import check_pretext_task

__all__ = ["check_dataset", "check_decoder", "check_encoder", "check_pretext_task"]
