"""Small models in the shapes of the common architectures; forward passes of well under a ms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

IMAGE = (3, 16, 16)


class Block(nn.Module):
    """A residual block whose activations work in place, as torchvision's do."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        result: Tensor = self.relu(out)
        return result


class ResNetLike(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Block(4, 4), Block(4, 4))
        self.layer2 = nn.Sequential(Block(4, 8, 2), Block(8, 8))
        self.layer3 = nn.Sequential(Block(8, 16, 2), Block(16, 16))
        self.layer4 = nn.Sequential(Block(16, 32, 2), Block(32, 32))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


class VGGLike(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        width = 3
        for outputs in (4, 8, 16):
            parts += [nn.Conv2d(width, outputs, 3, 1, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
            width = outputs
        self.features = nn.Sequential(*parts)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Linear(64, 8), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(8, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


class Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, inputs * 2, 1, bias=False),
            nn.BatchNorm2d(inputs * 2),
            nn.ReLU6(inplace=True),
            nn.Conv2d(inputs * 2, inputs * 2, 3, stride, 1, groups=inputs * 2, bias=False),
            nn.BatchNorm2d(inputs * 2),
            nn.Conv2d(inputs * 2, outputs, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class MobileNetLike(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU6(inplace=True)),
            Inverted(4, 4, 1),
            Inverted(4, 8, 2),
            Inverted(8, 8, 1),
            Inverted(8, 16, 2),
            nn.Sequential(nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.ReLU6(inplace=True)),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        logits: Tensor = self.classifier(x)
        return logits


class AttentionBlock(nn.Module):
    """A vision transformer's block of its own, not PyTorch's fused one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, width * 2), nn.GELU(), nn.Linear(width * 2, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ViTLike(nn.Module):
    def __init__(self, classes: int = 5, depth: int = 6) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, 8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.blocks = nn.ModuleList(AttentionBlock(16) for _ in range(depth))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


class EncoderNet(nn.Module):
    """A text classifier on PyTorch's own encoder, which has a fused inference path."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.classifier = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2))
        logits: Tensor = self.classifier(self.encoder(x)[:, 0])
        return logits


class PlainCNN(nn.Module):
    """As in every first tutorial: attributes, and functional activations, one of them in place."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 2, 1)
        self.conv2 = nn.Conv2d(4, 8, 3, 2, 1)
        self.fc1 = nn.Linear(128, 16)
        self.fc2 = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu_(self.conv1(x))
        x = functional.relu_(self.conv2(x))
        logits: Tensor = self.fc2(functional.relu_(self.fc1(x.flatten(1))))
        return logits


def mlp(classes: int = 5) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(768, 16),
        nn.ReLU(inplace=True),
        nn.Linear(16, 16),
        nn.ReLU(inplace=True),
        nn.Linear(16, classes),
    )


@dataclass
class Output:
    """Like a model library's output class: the loss comes first, hidden states last."""

    loss: Tensor | None
    logits: Tensor
    hidden: Tensor


class Wrapped(nn.Module):
    """A ResNet that returns its logits in one of the ways that models do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.net = mlp()

    def forward(self, x: Tensor) -> Any:
        hidden = self.net[:-1](x)
        logits = self.net[-1](hidden)
        if self.how == "tuple":
            return hidden, logits
        if self.how == "dict":
            return {"hidden": hidden, "logits": logits}
        if self.how == "nested":
            return {"result": (torch.zeros(()), [logits])}
        if self.how == "dataclass":
            return Output(torch.zeros(()), logits, hidden)
        return logits


SHAPES: dict[str, type[nn.Module] | Any] = {
    "resnet": ResNetLike,
    "vgg": VGGLike,
    "mobilenet": MobileNetLike,
    "vit": ViTLike,
    "encoder": EncoderNet,
    "cnn": PlainCNN,
    "mlp": mlp,
}


def build(shape: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = SHAPES[shape]()
    return model.eval()


def images(rows: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(rows, *IMAGE, generator=torch.Generator().manual_seed(seed))
