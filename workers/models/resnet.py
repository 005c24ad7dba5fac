"""Residual networks (He et al., CVPR 2016) as torchvision builds and names them, without ``fc``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.models.resnet import ResNet as TorchvisionResNet

from workers.models import Encoder, Look

ARCHS = (
    "resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
    "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2", "resnet10_slim",
)  # fmt: skip
"""torchvision's, and smaller ones: ``resnet10`` has a single basic block in each stage, ``resnet10_slim`` a quarter of
its channels there."""
STEMS = ("imagenet", "cifar")  # 7 x 7 with stride 2 and a max pooling, or 3 x 3 for pictures of 32 pixels


class Slim(TorchvisionResNet):  # type: ignore[misc]  # torchvision has no types
    """Stages of 16, 32, 64 and 128 channels."""

    def _make_layer(self, block: Any, planes: int, *others: Any, **more: Any) -> Any:
        return super()._make_layer(block, planes // 4, *others, **more)


class ResNet(Encoder):
    """Its four stages are the ``blocks``; the token for the whole picture is the mean of the stage's map.

    A stage other than the last has fewer channels than ``width``. There is no attention to look at.
    """

    def __init__(self, network: Any, *, stem: str, image_size: int):
        super().__init__()
        self.conv1, self.bn1, self.maxpool = network.conv1, network.bn1, network.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = (getattr(network, f"layer{i}") for i in range(1, 5))
        last = self.layer4[-1]
        self.width: int = (last.bn3 if hasattr(last, "bn3") else last.bn2).num_features
        self.depth, self.heads = 4, 1
        if stem == "cifar":
            self.conv1 = nn.Conv2d(3, self.conv1.out_channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.maxpool = nn.Identity()
        side = image_size
        for _ in range(3 if stem == "cifar" else 5):  # each halving rounds up
            side = (side + 1) // 2
        self.image_size, self.grid = image_size, (side, side)
        self.to(memory_format=torch.channels_last)  # convolutions are quicker so, on the CPU too

    def forward(self, images: Tensor) -> Tensor:
        """The mean of the last map: (B, 3, H, W) -> (B, D)."""
        return self.map(images).mean((2, 3))

    def map(self, images: Tensor, stages: int = 4) -> Tensor:
        """The output of the first ``stages`` stages: (B, D, h, w)."""
        *_, last = self.stages(images, stages)
        return last

    def stages(self, images: Tensor, stages: int = 4) -> list[Tensor]:
        """The outputs of the first ``stages`` stages, each (B, D, h, w)."""
        x: Tensor = images.contiguous(memory_format=torch.channels_last)
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        found = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4)[:stages]:
            x = stage(x)
            found.append(x)
        return found

    def tokens(self, images: Tensor, *, block: int | None = None) -> Tensor:
        """The mean of a stage's map (None: the last), then the map: (B, 1 + h w, D)."""
        found = self.map(images, self.through(block)).flatten(2).transpose(1, 2)
        return torch.cat([found.mean(1, keepdim=True), found], dim=1)

    def final(self, tokens: Tensor) -> Tensor:
        """As they are: there is no norm after the last stage."""
        return tokens

    def look(self, images: Tensor) -> Iterator[Look]:
        raise ValueError(f"{self.kwargs['arch']}: a residual network has no attention to look at")


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Statistics over each of ``splits`` parts of the batch, as if as many processes had one each.

    One process then needs to shuffle keys as many do (MoCo: He et al., CVPR 2020, section 3.3). The running estimates
    move by the mean over the parts; in evaluation it is an ordinary BatchNorm.
    """

    def __init__(self, channels: int, splits: int):
        super().__init__(channels)
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        if len(x) % self.splits:
            raise ValueError(f"a batch of {len(x)} cannot be split in {self.splits} equal parts")
        means, variances = (
            [each.clone() for _ in range(self.splits)] for each in (self.running_mean, self.running_var)
        )
        parts = [
            F.batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
            for part, mean, variance in zip(x.chunk(self.splits), means, variances, strict=True)
        ]
        with torch.no_grad():
            self.running_mean.copy_(torch.stack(means).mean(0))
            self.running_var.copy_(torch.stack(variances).mean(0))
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        return torch.cat(parts)


def split_norms(network: nn.Module, splits: int) -> None:
    """Replace every fresh BatchNorm2d by one that is split; the names and shapes of the state stay the same."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                setattr(parent, name, SplitBatchNorm2d(child.num_features, splits))


def build(arch: str = "resnet50", stem: str = "imagenet", image_size: int = 224) -> ResNet:
    if arch not in ARCHS:
        raise ValueError(f"arch={arch}: unknown; choose one of {', '.join(ARCHS)}")
    if stem not in STEMS:
        raise ValueError(f"stem={stem}: unknown; choose one of {', '.join(STEMS)}")
    if arch in ("resnet10_slim", "resnet10"):
        network: Any = (TorchvisionResNet if arch == "resnet10" else Slim)(BasicBlock, [1, 1, 1, 1], num_classes=1)
    else:
        network = torchvision.models.get_model(arch, weights=None, num_classes=1)
    return ResNet(network, stem=stem, image_size=image_size)
