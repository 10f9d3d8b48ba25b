"""Depthwise convolutions in bf16 on a CPU, whose gradients are computed in single precision.

Ours, because oneDNN's are slow there (torch 2.14, AVX-512 with bf16, channels last): of 8 x 1152 maps of 3 x 3 under a
kernel of 5 the gradient of the weights takes 10 ms in bf16 and 2.8 in fp32, that of the input of 8 x 672 maps of 9 x 9
at stride 2 takes 7.7 and 0.2. A third of a step of an EfficientNet went there. What is kept for them stays bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Along = int | Sequence[int]  # both axes, or each


class DepthwiseGradients(TorchFunctionMode):
    """While it is entered, and autocast to bf16, every depthwise `conv2d` has its gradients in single precision."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.conv2d and not kwargs and _is_depthwise(*args):
            return _Depthwise.apply(*args)
        return func(*args, **(kwargs or {}))


def _is_depthwise(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Along = 1,
    padding: Along | str = 0,
    dilation: Along = 1,
    groups: int = 1,
) -> bool:
    """Whether `torch.conv2d` is so called that it convolves each map alone; not where torch is to find the padding."""
    return image.ndim == 4 and weight.shape[1] == 1 and groups > 1 and not isinstance(padding, str)


class _Depthwise(torch.autograd.Function):
    """`torch.conv2d`, from its second argument on as it takes them."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any) -> Tensor:
        image = image.bfloat16()
        ctx.save_for_backward(image, weight)
        ctx.of_bias = None if bias is None else list(bias.shape)
        ctx.options = options
        return torch.conv2d(image, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        exact = (gradients[0].float(), *(kept.float() for kept in ctx.saved_tensors))
        stride, padding, dilation, groups = (*ctx.options, *(1, 0, 1, 1)[len(ctx.options) :])
        along = [_both(stride), _both(padding), _both(dilation)]
        wanted = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.convolution_backward(*exact, ctx.of_bias, *along, False, [0, 0], groups, wanted)
        return (*found, *[None] * len(ctx.options))


def _both(value: Along) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
