"""Noised gradients of the two factors, brought to one scale: LoRA+ and the Riemannian preconditioner (ScaledGD).

Legend: C clients, D out_features, K in_features, R rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlr.adapters.state import LORA_A, LORA_B, Slot
from fedlr.methods.client_rules.rule import ClientRule, LocalPoint, factor
from fedlr.methods.client_rules.scaffold import check_positive, check_sgd


@dataclass(frozen=True)
class LoraPlus(ClientRule):
    """Multiply lora_B's gradient by a constant: its learning rate is `ratio` times that of lora_A and the head.

    Source: Hayou et al. 2024, LoRA+, https://arxiv.org/abs/2402.12354. Their ratio of about 16 is for Adam. A factor of
    the gradient is one of the learning rate under SGD, with momentum or without, and nowhere else: Adam divides it
    out, weight decay would not be multiplied. Both are refused; a learning rate for each factor under Adam would need
    an optimizer that knows the factors, which one for a whole cohort does not.

    Args:
        ratio: of the learning rates, lora_B's to the others'.
        optimizer, weight_decay: `_target_` and option of the local optimizer, ${trainer.optimizer._target_} in YAML.

    Privacy: the noise of lora_B is multiplied as its signal is; epsilon is that of SGD. Where lora_B alone trains the
    rule would be another learning rate under the paper's name: a configuration that asks for it is refused.

    Guarantees: ratio = 1 leaves the gradient as it is.

    Raises: InputError for a ratio that is not positive, another optimizer than SGD, or weight decay.
    """

    ratio: float
    optimizer: str
    weight_decay: float = 0.0

    needs_both_factors = True

    def __post_init__(self) -> None:
        check_positive(ratio=self.ratio)
        check_sgd("LoRA+", self.optimizer, weight_decay=self.weight_decay)

    def __call__(self, gradient: Mapping[Slot, Tensor], point: LocalPoint) -> Mapping[Slot, Tensor]:
        """Return the gradient, that of lora_B times the ratio."""
        return {slot: self.ratio * value if slot.role == LORA_B else value for slot, value in gradient.items()}


@dataclass(frozen=True)
class ScaledGradient(ClientRule):
    """Precondition each factor's gradient by the other: g_B (A A^T + reg I)^-1 and (B^T B + reg I)^-1 g_A.

    Source: Zhang and Pilanci 2024, https://arxiv.org/abs/2402.02347; ScaledGD, Tong et al. 2021. Each client has a
    preconditioner of its own where the other factor trains, all have the same where it is frozen.

    Privacy: the factors are noised or were broadcast, so this is post-processing. It also multiplies noise: along a
    direction in which the other factor has singular value t, by 1 / (t^2 + reg). While lora_B is zero lora_A's gradient
    is noise alone, and grows by 1 / reg: for training both factors under DP take reg of the order of the squared
    singular values to come (0.1 to 1), not the 1e-6 of the literature, or train lora_B only.

    Guarantees: for reg -> 0 and SGD a step moves B A, to first order in lr, by the same amount whatever factors of the
    product it starts from (A -> M A, B -> B M^-1). With orthonormal rows of A, as in FedSVD, g_B is divided by 1 + reg:
    another learning rate, nothing else. A client whose numbers are not finite gets NaN, the others what they would.

    Raises: InputError for a reg that is not positive (rows beyond a client's rank are zero, and have no inverse).
    """

    reg: float

    def __post_init__(self) -> None:
        check_positive(reg=self.reg)

    def __call__(self, gradient: Mapping[Slot, Tensor], point: LocalPoint) -> Mapping[Slot, Tensor]:
        """Return the preconditioned gradient, (C, ...) a slot; that of a head as it is."""
        return {slot: self._scaled(slot, value, point) for slot, value in gradient.items()}

    def _scaled(self, slot: Slot, value: Tensor, point: LocalPoint) -> Tensor:
        if slot.role == LORA_B:
            lora_A = factor(point, Slot(slot.path, LORA_A))
            return value @ self._inverse(lora_A @ lora_A.mT).to(value)
        if slot.role == LORA_A:
            lora_B = factor(point, Slot(slot.path, LORA_B))
            return self._inverse(lora_B.mT @ lora_B).to(value) @ value
        return value

    def _inverse(self, gram_RR: Tensor) -> Tensor:
        identity_RR = torch.eye(gram_RR.shape[-1], dtype=torch.float64, device=gram_RR.device)
        inverse_RR: Tensor = torch.linalg.inv_ex(gram_RR.double() + self.reg * identity_RR).inverse
        return inverse_RR
