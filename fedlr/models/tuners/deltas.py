"""What a system adds to the weights of a layer, W_eff - W, as low-rank factors: one formula a system, in float64.

Each is the layer of PEFT 0.21.2, against which `tests/tuners/test_layer_means.py` holds it. The values are the trained
tensors by block; W is read only where the system turns it.
Legend: W the weights (D, K); D out_features, K in_features, R rank, n blocks of b x b, N factors of a butterfly.
"""

import torch
from torch import Tensor
from torch.func import functional_call
from transformers.activations import ACT2FN

from fedlr.adapters.state import LoraFactors
from fedlr.models.peft_state import ADAPTER_NAME
from fedlr.models.tuners.layer_means import Layer, Values

SMALLEST = 1e-30  # norm of a vector that stands for no direction


def hra(layer: Layer, values: Values) -> LoraFactors:
    """W (H - I) of rank R, H = (I - 2 u_1 u_1^T) ... (I - 2 u_R u_R^T) (Yuan et al. 2024, arXiv:2405.17484).

    H = I - U T U^T with T^-1 = I / 2 + the part of U^T U above its diagonal (the compact WY form, Schreiber and Van
    Loan 1989).
    """
    U_KR = values["u"] / values["u"].norm(dim=0).clamp(min=SMALLEST)
    half_RR = torch.eye(U_KR.shape[1], dtype=U_KR.dtype) / 2
    T_RR = torch.linalg.inv(half_RR + torch.triu(U_KR.T @ U_KR, diagonal=1))
    return LoraFactors(lora_A=U_KR.T, lora_B=-(layer.weight_DK @ U_KR) @ T_RR)


def oft(layer: Layer, values: Values) -> LoraFactors:
    """W (Q^T - I), Q block-diagonal, rotations by Cayley's formula (Qiu et al. 2023, arXiv:2306.07280), so of rank up
    to min(D, K). lora_B is W itself, the same for all clients.
    """
    turn, module = layer.module.oft_R[ADAPTER_NAME], layer.module
    skew = turn._project_batch(values["R"], eps=turn.eps) if turn.coft else values["R"]
    blocks_nbb = turn._cayley_batch(skew, turn.block_size, turn.use_cayley_neumann, turn.num_cayley_neumann_terms)
    Q_KK = torch.block_diag(*blocks_nbb.expand(module.in_features // turn.block_size, -1, -1))
    return LoraFactors(lora_A=Q_KK.T - torch.eye(len(Q_KK), dtype=Q_KK.dtype), lora_B=layer.weight_DK)


def boft(layer: Layer, values: Values) -> LoraFactors:
    """diag(s) W Q^T - W, Q a product of N permuted block-diagonal rotations (Liu et al. 2023, arXiv:2311.06243), so of
    rank up to min(D, K); as 2 K columns here.
    """
    R_Nnbb, W_DK = values["R"], layer.weight_DK
    identity_KK = torch.eye(W_DK.shape[1], dtype=W_DK.dtype)
    Q_KK = identity_KK
    for P_KK, blocks_nbb in zip(layer.module.boft_P.double(), R_Nnbb, strict=True):
        turn_KK = torch.block_diag(*layer.module.cayley_batch(blocks_nbb))
        Q_KK = P_KK @ turn_KK @ P_KK.T @ Q_KK
    return LoraFactors(torch.cat([Q_KK.T, -identity_KK]), torch.cat([values["s"] * W_DK, W_DK], dim=1))


def psoft(layer: Layer, values: Values) -> LoraFactors:
    """scaling B (diag(b) Q diag(a) - I) A over the bases A (R, K) and B (D, R) that were shipped, Q a rotation (R, R).

    Source: PSOFT, openreview FSHrinMArK. The mean over clients stays in these bases.
    """
    module, core = layer.module, layer.module.psoft_R[ADAPTER_NAME]
    named = {{"rotation": "weight"}.get(block, block): value for block, value in values.items()}
    identity_RR = torch.eye(core.size, dtype=torch.float64)
    core_RR = functional_call(core, named, (identity_RR,)).T - identity_RR  # its forward is x -> x (b Q a)^T
    lora_A, B_DR = module._psoft_A_cache[ADAPTER_NAME].double(), module._psoft_B_cache[ADAPTER_NAME].double()
    return LoraFactors(lora_A, module.scaling[ADAPTER_NAME] * B_DR @ core_RR)


def unilora(layer: Layer, values: Values) -> LoraFactors:
    """B A whose entries are picked from one vector of all layers, and scaled (Li et al. 2025, arXiv:2506.00799)."""
    module, theta = layer.module, values["theta"]

    def picked(letter: str) -> Tensor:
        indices, scales = (getattr(module, f"unilora_{part}_{letter}")[ADAPTER_NAME] for part in ("indices", "scales"))
        entries: Tensor = theta[indices] * scales
        return entries

    return LoraFactors(lora_A=picked("A"), lora_B=picked("B"))


def vblora(layer: Layer, values: Values) -> LoraFactors:
    """B A made of parts that are mixtures of the top-k vectors of one bank (Li et al. 2024, arXiv:2405.15179)."""
    module, bank = layer.module, values["bank"]

    def mixed(logits: Tensor) -> Tensor:
        mixture: Tensor = module._get_low_rank_matrix(logits, bank, module.topk[ADAPTER_NAME])
        return mixture

    lora_A, lora_B = mixed(values["logits_A"]), mixed(values["logits_B"])  # (R, K / b, b) and (D / b, R, b)
    return LoraFactors(lora_A.flatten(1), lora_B.transpose(1, 2).flatten(0, 1))


def peanut(layer: Layer, values: Values) -> LoraFactors:
    """scaling B f(A W), A (R, D) and B (D, R), f an activation (arXiv:2410.01870), without layers in between."""
    module = layer.module
    activation = ACT2FN[module.act_fn[ADAPTER_NAME]]
    return LoraFactors(activation(values["A"] @ layer.weight_DK), module.scaling[ADAPTER_NAME] * values["B"])
