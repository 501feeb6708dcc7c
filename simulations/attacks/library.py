"""The attacks by name, as `fedlr bench robust` plays them."""

from dataclasses import dataclass

from fedlr.simulations.attacks.crafted import (
    GaussianNoise,
    InnerProduct,
    LittleIsEnough,
    ModelReplacement,
    OtherGauge,
    SignFlip,
)
from fedlr.simulations.attacks.pool import Craft


@dataclass(frozen=True)
class Attack:
    """What hostile clients do: to the labels of their rows, and to what they send."""

    text: str
    craft: Craft | None = None
    flips_labels: bool = False


ATTACKS = {
    "label_flip": Attack("labels flipped, training honest", flips_labels=True),
    "sign_flip": Attack("the update turned round", SignFlip()),
    "sign_flip_10": Attack("turned round, ten times as long", SignFlip(10.0)),
    "scale_1000": Attack("turned round, a thousand times as long", SignFlip(1000.0)),
    "noise": Attack("noise, ten times as long", GaussianNoise()),
    "little": Attack("A Little Is Enough, z = 1.5", LittleIsEnough()),
    "inner_product": Attack("-0.5 times the honest mean", InnerProduct()),
    "replacement": Attack("model replacement, labels flipped", ModelReplacement(), flips_labels=True),
    "gauge": Attack("(-B, -A)", OtherGauge()),
}
