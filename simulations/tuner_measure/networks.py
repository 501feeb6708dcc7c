"""Small networks to measure tuners on: linear layers of three shapes, a convolution, an embedding.

Each runs in two ways. Stacked it is a classifier, for gradients. *Apart* every adapted layer reads a probe of its own
and nothing of the others, so the output is the layers' functions: of a layer that is affine in its input, exactly its
weight and bias.

Legend: N examples, T tokens.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fedlr.models.tuners.entry import Network

NUM_CLASSES, NUM_TOKENS, NUM_TASKS = 3, 3, 2
NARROW, WIDE = 16, 32
VOCABULARY, IMAGE = 11, 6


class LinearNetwork(nn.Module):
    """Three linear layers, narrow to wide to wide to narrow, and a layer norm; the mean over tokens is classified."""

    targets = ("first", "second", "third")

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(NARROW, WIDE)
        self.norm = nn.LayerNorm(WIDE)
        self.second = nn.Linear(WIDE, WIDE)
        self.third = nn.Linear(WIDE, NARROW)
        self.head = nn.Linear(NARROW, NUM_CLASSES)

    def forward(self, x: Tensor, apart: bool = False) -> Any:
        """Map (N, T, narrow) to logits (N, classes); apart: (N, T, wide) to the outputs of the layers."""
        if apart:
            return SimpleNamespace(logits=joined(self.first(x[..., :NARROW]), *(f(x) for f in self._wide())))
        hidden = self.second(self.norm(torch.tanh(self.first(x))))
        return SimpleNamespace(logits=self.head(self.third(torch.tanh(hidden)).mean(dim=1)))

    def _wide(self) -> tuple[nn.Module, ...]:
        return self.norm, self.second, self.third


class ConvolutionNetwork(nn.Module):
    """One convolution, and a linear head that stays as it is."""

    targets = ("kernel",)

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv2d(2, 8, 3, padding=1)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor, apart: bool = False) -> Any:
        """Map (N, 2, height, width) to logits (N, classes); apart: to the convolution's output."""
        hidden = self.kernel(x)
        return SimpleNamespace(logits=joined(hidden) if apart else self.head(torch.tanh(hidden).mean(dim=(2, 3))))


class TokensNetwork(nn.Module):
    """One embedding, and a linear head that stays as it is."""

    targets = ("embedding",)

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, NARROW)
        self.head = nn.Linear(NARROW, NUM_CLASSES)

    def forward(self, x: Tensor, apart: bool = False) -> Any:
        """Map (N, T) token ids to logits (N, classes); apart: to the embeddings."""
        hidden = self.embedding(x)
        return SimpleNamespace(logits=joined(hidden) if apart else self.head(torch.tanh(hidden).mean(dim=1)))


NETWORKS: Mapping[Network, type[Any]] = {
    "linear": LinearNetwork,
    "convolution": ConvolutionNetwork,
    "tokens": TokensNetwork,
}


def joined(*outputs: Tensor) -> Tensor:
    """Return all outputs as one vector."""
    return torch.cat([output.flatten() for output in outputs])


def examples(network: Network, num: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Return made-up inputs and labels of `num` examples, N first; floats are float64."""
    labels = torch.randint(NUM_CLASSES, (num,), generator=generator)
    if network == "tokens":
        return {"x": torch.arange(num * NUM_TOKENS).view(num, NUM_TOKENS) % VOCABULARY}, labels
    shape = (num, 2, IMAGE, IMAGE) if network == "convolution" else (num, NUM_TOKENS, NARROW)
    return {"x": torch.randn(shape, generator=generator, dtype=torch.float64)}, labels


def probe(network: Network) -> Tensor:
    """Return what shows the whole function of every layer, apart: unit vectors, zero, and a few rough vectors."""
    if network == "tokens":
        return torch.arange(VOCABULARY)[None]
    if network == "convolution":
        pixels = torch.zeros(5, 2, IMAGE, IMAGE, dtype=torch.float64)
        pixels[0, 0, 2, 2], pixels[1, 1, 2, 2] = 1.0, 1.0  # the response to one pixel is the kernel
        pixels[3:] = torch.sin(torch.arange(2 * 2 * IMAGE * IMAGE, dtype=torch.float64)).view(2, 2, IMAGE, IMAGE)
        return pixels
    unit = torch.eye(WIDE, dtype=torch.float64)
    rough = torch.sin(torch.arange(4 * WIDE, dtype=torch.float64)).view(4, WIDE)
    return torch.cat([unit, torch.zeros(1, WIDE, dtype=torch.float64), rough])[None]
