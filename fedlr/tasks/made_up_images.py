"""Made-up labelled pictures that a tiny model can learn: for tests, and for a first run offline.

A picture shows one shape (its label) at a random place, in the colours of one of four domains (the `groups`), under
noise. The domains differ as styles do: colour and brightness say nothing of the shape.
"""

from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from fedlr.data.images import LabelledImages
from fedlr.errors import InputError, in_range
from fedlr.streams import Purpose, stream

SHAPES = ("bar", "cross", "disc", "frame", "pillar")
# Of each domain the colours of ground and shape.
DOMAINS = {
    "ink": ((255, 255, 255), (20, 20, 20)),
    "chalk": ((30, 60, 40), (230, 235, 225)),
    "sky": ((120, 180, 240), (255, 240, 90)),
    "clay": ((190, 110, 80), (70, 30, 20)),
}
MOST_PIXELS = 100_000_000  # of all pictures together


def made_up_images(
    num_examples: int, seed: int, *, num_labels: int = 3, image_size: int = 16, noise: float = 20.0
) -> LabelledImages:
    """Make `num_examples` pictures with labels in equal number; `groups` is one of four domains.

    Args:
        num_examples: of all labels together.
        seed: the same arguments give the same pictures.
        num_labels: how many of `SHAPES`.
        image_size: side, in pixels.
        noise: standard deviation, of pixels in [0, 255].

    Raises:
        InputError: for a number out of range.
    """
    in_range(2, len(SHAPES), num_labels=num_labels)
    in_range(8, 512, image_size=image_size)
    in_range(num_labels, 200_000, num_examples=num_examples)
    in_range(0, 255, noise=noise)
    if num_examples * image_size**2 > MOST_PIXELS:
        raise InputError(
            f"Expected num_examples <= {MOST_PIXELS // image_size**2} of image_size={image_size}, got {num_examples}"
        )
    generator = stream(seed, Purpose.DATA)
    labels = generator.permutation(np.arange(num_examples, dtype=np.int64) % num_labels)
    domains = tuple(DOMAINS)
    groups = tuple(domains[i] for i in generator.integers(len(domains), size=num_examples))
    pixels = np.empty((num_examples, image_size, image_size, 3), dtype=np.uint8)
    for row, (label, domain) in enumerate(zip(labels, groups, strict=True)):
        ground, ink = (np.array(colour, dtype=float) for colour in DOMAINS[domain])
        mask = _shape(SHAPES[label], image_size, generator)[:, :, None]
        drawn = ground + mask * (ink - ground) + generator.normal(scale=noise, size=(image_size, image_size, 3))
        pixels[row] = np.clip(drawn, 0, 255).astype(np.uint8)
    return LabelledImages(
        pixels=pixels,
        rows=np.arange(num_examples, dtype=np.int64),
        identities=tuple(sha256(picture.tobytes()).hexdigest() for picture in pixels),
        labels=labels,
        label_names=SHAPES[:num_labels],
        groups=groups,
        source=f"made-up images (seed {seed})",
    )


def _shape(name: str, side: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Return where one shape lies, (side, side), half as large as the picture and at a random place."""
    size = side // 2
    top, left = generator.integers(side - size + 1, size=2)
    y, x = np.mgrid[:side, :side]
    y, x = (y - top + 0.5) / size * 2 - 1, (x - left + 0.5) / size * 2 - 1  # in [-1, 1] inside the shape's square
    inside = (abs(y) <= 1) & (abs(x) <= 1)
    parts = {
        "bar": abs(y) <= 0.4,
        "pillar": abs(x) <= 0.4,
        "cross": (abs(y) <= 0.3) | (abs(x) <= 0.3),
        "disc": y**2 + x**2 <= 1,
        "frame": np.maximum(abs(y), abs(x)) >= 0.6,
    }
    found: NDArray[np.bool_] = inside & parts[name]
    return found
