"""The ResNets of He et al. 2016 for CIFAR (arXiv:1512.03385, section 4.2), which torchvision lacks."""

from torch import Tensor, nn

DEPTHS = {f"resnet{6 * n + 2}": n for n in (1, 3, 5, 7, 9, 18)}
"""n by name: 6n+2 layers in three stages of n basic blocks."""


class CifarResNet(nn.Module):
    """3x3 stem, three stages of n basic blocks with w, 2w, 4w channels, global mean: [B, 3, H, W] -> [B, 4w]."""

    def __init__(self, n: int, width: int):
        from torchvision.models.resnet import BasicBlock

        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True))
        blocks, channels = [], width
        for stage in range(3):
            for block in range(n):
                out, stride = width << stage, 2 if stage and not block else 1
                down = None
                if stride != 1 or channels != out:
                    down = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
                blocks.append(BasicBlock(channels, out, stride, down))
                channels = out
        self.stages = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x)).mean((2, 3))
