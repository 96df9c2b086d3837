"""Convolutions on maps so small that every output sees the whole input: one matrix product instead.

A ResNet with ImageNet's stem ends in maps of 2x2 and 1x1 when its images have 32 pixels. Without AVX-512, oneDNN
computes such a convolution image by image: at 512 channels and 128 images it took 20 times as long as the product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallMapConv2d(nn.Conv2d):
    """A convolution that is one product on the CPU where every output place sees all of a map of at most 2x2."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        windows = None if input.device.type != "cpu" else self.windows(*input.shape[-2:])
        if windows is None:
            return super()._conv_forward(input, weight, bias)
        rows, columns = windows
        # [outputs, places, inputs, height, width]: for every output place the taps that fall on the map
        taps = torch.stack([weight[:, :, row, column] for row in rows for column in columns], 1)
        flat = F.linear(input.flatten(1), taps.flatten(2).flatten(0, 1))
        y = flat.unflatten(1, (self.out_channels, len(rows), len(columns)))
        return y if bias is None else y + bias[:, None, None]

    def windows(self, height: int, width: int) -> tuple[list[slice], list[slice]] | None:
        """What of the kernel lies on the map, by row and column of the output; None where the map sticks out of it."""
        if height * width > 4 or self.groups != 1 or self.dilation != (1, 1) or not unfoldable(self):
            return None
        assert not isinstance(self.padding, str)
        lines = []
        for side, pad, kernel, step in zip((height, width), self.padding, self.kernel_size, self.stride, strict=True):
            starts = range(pad, pad - (side + 2 * pad - kernel) - 1, -step)
            if any(start < 0 or start + side > kernel for start in starts):
                return None
            lines.append([slice(start, start + side) for start in starts])
        return lines[0], lines[1]


def unfoldable(layer: nn.Module) -> bool:
    """Whether it is a convolution that `unfold` takes: one that pads with zeros, by numbers."""
    return isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def unfold(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Rows that the convolution multiplies its weights with: x [B, C, H, W] -> [B, taps, output places].

    Where there is one place, without taps that only ever meet zeros.
    """
    windows = conv.windows(*x.shape[-2:]) if isinstance(conv, SmallMapConv2d) else None
    if windows and len(windows[0]) == len(windows[1]) == 1:
        return x.flatten(1)[:, :, None]
    assert not isinstance(conv.padding, str)
    return F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)


def fold(model: nn.Module) -> None:
    """Let every plain convolution of the model be a `SmallMapConv2d`: same state, same names, same numbers."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = SmallMapConv2d
