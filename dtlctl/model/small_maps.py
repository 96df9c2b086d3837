"""Convolutions on maps so small that every output sees the whole input: one matrix product instead.

A ResNet with ImageNet's stem ends in maps of 2x2 and 1x1 when its images have 32 pixels. A 3x3 kernel then has at most
four taps inside the map at any place; the others only ever meet zeros. Without AVX-512, oneDNN computes such a
convolution image by image: at 512 channels and 128 images it took 20 times as long as the product.
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
        size = [1 + (side + 2 * p - k) // s for side, p, k, s in zip(input.shape[-2:], *self._geometry(), strict=True)]
        # [outputs, places, inputs, height, width]: for every output place the taps that fall on the map
        taps = torch.stack([weight[:, :, rows, columns] for rows, columns in windows], 1)
        flat = F.linear(input.flatten(1), taps.flatten(2).flatten(0, 1))
        y = flat.unflatten(1, (self.out_channels, *size))
        return y if bias is None else y + bias[:, None, None]

    def _geometry(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Padding, kernel size and stride, each by dimension."""
        assert not isinstance(self.padding, str)
        return self.padding, self.kernel_size, self.stride

    def windows(self, height: int, width: int) -> list[tuple[slice, slice]] | None:
        """What of the kernel lies on the map, by output place; None where the map sticks out of the kernel."""
        if height * width > 4 or self.groups != 1 or self.dilation != (1, 1) or not unfoldable(self):
            return None
        lines = []
        for side, padding, kernel, stride in zip((height, width), *self._geometry(), strict=True):
            starts = range(padding, padding - (side + 2 * padding - kernel) - 1, -stride)
            if any(start < 0 or start + side > kernel for start in starts):
                return None
            lines.append([slice(start, start + side) for start in starts])
        return [(rows, columns) for rows in lines[0] for columns in lines[1]]


def unfoldable(layer: nn.Module) -> bool:
    """Whether it is a convolution that `unfold` takes: one that pads with zeros, by numbers."""
    return isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def unfold(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Rows that the convolution multiplies its weights with: x [B, C, H, W] -> [B, K, output places].

    K counts the taps, without those that only ever meet zeros where there is one place.
    """
    windows = conv.windows(*x.shape[-2:]) if isinstance(conv, SmallMapConv2d) else None
    if windows and len(windows) == 1:
        return x.flatten(1)[:, :, None]
    assert not isinstance(conv.padding, str)
    return F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)


def fold(model: nn.Module) -> None:
    """Let every plain convolution of the model be a `SmallMapConv2d`: same state, same names, same numbers."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = SmallMapConv2d
