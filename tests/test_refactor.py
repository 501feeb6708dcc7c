"""Properties (1)-(10) of the re-factorisation, and what orthonormal rows change for DP-SGD: (12), (13), (23).

Products, projectors and singular values are compared: single vectors are free where singular values meet.
"""

import pytest
import torch
from torch import Tensor

from fedlr.adapters.factors import orthonormal_rows, product_norm, product_singular_values, svd_refactor
from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, LoraFactors, Slot
from fedlr.errors import InputError
from fedlr.methods.method import OrthonormalRows, SvdRefactor

REFACTORS = [svd_refactor, orthonormal_rows]


def random_factors(out=12, into=20, rank=4, *, dtype=torch.float64, seed=0) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    lora_A = torch.randn(rank, into, generator=generator, dtype=torch.float64) / into**0.5
    lora_B = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    return LoraFactors(lora_A.to(dtype), lora_B.to(dtype))


def product(factors: LoraFactors) -> Tensor:
    return factors.lora_B.double() @ factors.lora_A.double()


def projector(lora_A: Tensor) -> Tensor:
    lora_A = lora_A.double()
    return lora_A.T @ torch.linalg.solve(lora_A @ lora_A.T, lora_A)


def gram_error(lora_A: Tensor) -> float:
    lora_A = lora_A.double()
    return float((lora_A @ lora_A.T - torch.eye(len(lora_A), dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("refactor", REFACTORS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_refactor_keeps_the_product_and_the_dtype(refactor, dtype, tolerance):  # (1)
    old = random_factors(dtype=dtype)
    new = refactor(old)
    assert torch.dist(product(new), product(old)) <= tolerance * product(old).norm()
    assert (new.lora_A.dtype, new.lora_B.dtype) == (dtype, dtype)
    assert (new.lora_A.shape, new.lora_B.shape) == (old.lora_A.shape, old.lora_B.shape)


@pytest.mark.parametrize("refactor", REFACTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refactored_rows_are_orthonormal(refactor, dtype):  # (2)
    assert gram_error(random_factors(dtype=dtype).lora_A) > 0.01
    assert gram_error(refactor(random_factors(dtype=dtype)).lora_A) <= 1e-5


def test_refactored_columns_of_B_are_orthogonal_with_falling_norms():  # (3)
    old = random_factors()
    new = svd_refactor(old)
    gram = new.lora_B.T @ new.lora_B
    norms = new.lora_B.norm(dim=0)
    assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-12)
    assert (norms.diff() <= 0).all()
    assert torch.allclose(norms, torch.linalg.svdvals(product(old))[:4])


@pytest.mark.parametrize("refactor", REFACTORS)
def test_refactor_keeps_the_row_space_of_A(refactor):  # (4)
    old = random_factors()
    assert torch.dist(projector(refactor(old).lora_A), projector(old.lora_A)) < 1e-12


def test_refactor_is_idempotent():  # (5): with the sign rule not only up to signs
    once = svd_refactor(random_factors())
    twice = svd_refactor(once)
    assert torch.allclose(twice.lora_A, once.lora_A, atol=1e-12)
    assert torch.allclose(twice.lora_B, once.lora_B, atol=1e-12)


def test_refactor_equals_the_full_svd_of_the_product():  # (6)
    old = random_factors()
    new = svd_refactor(old)
    U, S, Vh = torch.linalg.svd(product(old), full_matrices=False)
    assert torch.dist(product(new), (U[:, :4] * S[:4]) @ Vh[:4]) < 1e-12
    assert torch.dist(projector(new.lora_A), Vh[:4].T @ Vh[:4]) < 1e-12


def test_refactor_does_not_depend_on_how_the_product_was_factored():  # (7)
    old = random_factors()
    mixing = random_factors(out=4, seed=3).lora_B
    other = LoraFactors(torch.linalg.solve(mixing, old.lora_A), old.lora_B @ mixing)
    new, same = svd_refactor(old), svd_refactor(other)
    assert torch.allclose(same.lora_A, new.lora_A, atol=1e-10)
    assert torch.allclose(same.lora_B, new.lora_B, atol=1e-10)
    largest = new.lora_A.gather(1, new.lora_A.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("zero", [LORA_A, LORA_B])
def test_refactor_returns_a_zero_product_untouched(zero):  # (8): B = 0 in round 0
    old = random_factors(dtype=torch.float32)
    tensors = {LORA_A: old.lora_A, LORA_B: old.lora_B}
    old = LoraFactors(**(tensors | {zero: torch.zeros_like(tensors[zero])}))
    new = svd_refactor(old)
    assert new.lora_A is old.lora_A and new.lora_B is old.lora_B


@pytest.mark.parametrize("refactor", REFACTORS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", ["lora_A", "lora_B"])
def test_refactor_refuses_numbers_that_are_not_finite(refactor, bad, role):  # (8)
    old = random_factors()
    getattr(old, role)[0, 0] = bad
    with pytest.raises(ValueError, match=f"Expected finite numbers in {role}"):
        refactor(old)


@pytest.mark.parametrize("refactor", REFACTORS)
def test_refactor_handles_fewer_outputs_than_ranks(refactor):  # (8): D < R
    old = random_factors(out=2, rank=4)
    new = refactor(old)
    assert torch.dist(product(new), product(old)) < 1e-12
    assert gram_error(new.lora_A) < 1e-12
    assert torch.dist(projector(new.lora_A), projector(old.lora_A)) < 1e-12
    assert new.lora_B.shape == (2, 4)


def test_refactor_keeps_the_row_space_when_B_is_rank_deficient():  # (8): a full SVD of the product does not
    old = random_factors(rank=4)
    old.lora_B[:, 2:] = old.lora_B[:, :2]
    new = svd_refactor(old)
    assert torch.dist(product(new), product(old)) < 1e-12
    assert torch.dist(projector(new.lora_A), projector(old.lora_A)) < 1e-12
    Vh = torch.linalg.svd(product(old), full_matrices=False).Vh[:4]
    assert torch.dist(projector(Vh), projector(old.lora_A)) > 0.1


@pytest.mark.parametrize("refactor", REFACTORS)
def test_refactor_refuses_more_ranks_than_inputs(refactor):  # (8): such rows cannot be orthonormal
    with pytest.raises(InputError, match="at most the layer's 3 in_features, got rank 4"):
        refactor(random_factors(into=3, rank=4))


@pytest.mark.parametrize("finalise", [SvdRefactor(), OrthonormalRows()])
def test_refactor_keeps_the_loss_and_the_scale(finalise):  # (9), (10)
    layer = random_factors(dtype=torch.float32)
    slots = {Slot("layer", LORA_A): layer.lora_A, Slot("layer", LORA_B): layer.lora_B}
    old = AdapterState(slots, scale=0.25)
    new = finalise(old)
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(64, 20, generator=generator), torch.randint(12, (64,), generator=generator)
    base = torch.randn(12, 20, generator=generator)

    def loss(adapter: AdapterState) -> Tensor:
        factors = adapter.factors()["layer"]
        logits = x @ base.T + adapter.scale * (x @ factors.lora_A.T) @ factors.lora_B.T
        return torch.nn.functional.cross_entropy(logits, labels)

    assert new.scale == old.scale
    assert abs(loss(new) - loss(old)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_orthonormal_rows_are_left_alone_bit_for_bit(dtype):
    """FFA-LoRA's clients are told lora_A once: every later round must leave its bits as they are."""
    once = orthonormal_rows(random_factors(dtype=dtype))
    trained = LoraFactors(once.lora_A, once.lora_B + 1)
    again = orthonormal_rows(trained)
    assert again.lora_A is trained.lora_A and again.lora_B is trained.lora_B


def test_orthonormal_rows_of_an_untrained_adapter_keep_B_at_zero():
    old = random_factors()
    new = orthonormal_rows(LoraFactors(old.lora_A, torch.zeros_like(old.lora_B)))
    assert gram_error(new.lora_A) < 1e-12 and not new.lora_B.any()


@pytest.mark.parametrize("shape", [(12, 20, 4), (2, 20, 4), (12, 3, 4)])
def test_product_singular_values_and_norm_equal_those_of_the_dense_product(shape):
    factors = random_factors(*shape)
    values, dense = product_singular_values(factors), torch.linalg.svdvals(product(factors))
    count = min(4, len(dense))
    assert values.shape == (4,)
    assert torch.allclose(values[:count], dense[:count]) and not values[count:].any()
    assert product_norm(factors) == pytest.approx(float(product(factors).norm()))


def test_product_norm_is_accurate_where_terms_cancel():
    old = random_factors()
    new = svd_refactor(old)
    difference = LoraFactors(torch.cat([old.lora_A, new.lora_A]), torch.cat([old.lora_B, -new.lora_B], dim=1))
    assert product_norm(difference) < 1e-13 * product_norm(old)


def test_an_orthonormal_A_never_raises_the_gradient_norm():  # (12): the gradient of lora_B is G A^T
    layer_gradient = random_factors(out=12, into=20, rank=12, seed=5)
    gradient = product(layer_gradient)
    lora_A = orthonormal_rows(random_factors()).lora_A
    assert (gradient @ lora_A.T).norm() <= gradient.norm()
    assert (gradient @ (3 * lora_A).T).norm() > gradient.norm()  # the bound is about the scale of A


def test_a_rotated_A_leaves_every_clip_factor_alone():  # (13)
    lora_A = orthonormal_rows(random_factors()).lora_A
    rotation = torch.linalg.qr(random_factors(out=4, seed=8).lora_B).Q
    gradients = torch.stack([product(random_factors(rank=12, seed=seed)) for seed in range(20)])
    norms = (gradients @ lora_A.T).flatten(1).norm(dim=1)
    rotated = (gradients @ (rotation @ lora_A).T).flatten(1).norm(dim=1)
    assert torch.allclose(rotated, norms, rtol=1e-12)
    assert not torch.allclose((gradients @ (2 * lora_A).T).flatten(1).norm(dim=1), norms, rtol=0.1)


def mean_square(draw, num_draws=4000) -> float:
    """Monte Carlo mean of ||draw()||_F^2; each draw averages hundreds of entries, so 4000 give about 1 %."""
    generator = torch.Generator().manual_seed(0)
    return sum(float(draw(generator).square().sum()) for _ in range(num_draws)) / num_draws


def normal(generator, *shape) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_noise_on_B_through_an_orthonormal_A_has_D_R_sigma_squared():  # (23)
    sigma, (out, rank) = 0.7, (12, 4)
    lora_A = orthonormal_rows(random_factors()).lora_A
    measured = mean_square(lambda generator: sigma * normal(generator, out, rank) @ lora_A)
    assert measured == pytest.approx(out * rank * sigma**2, rel=0.02)
    # Rows of squared norm 1/3, as PEFT draws them, carry a third of it: docs/methods.md, scale confound.
    measured = mean_square(lambda generator: sigma * normal(generator, out, rank) @ lora_A / 3**0.5)
    assert measured == pytest.approx(out * rank * sigma**2 / 3, rel=0.02)


def test_noise_on_both_factors_multiplies_to_D_K_R_sigma_fourth():  # (23): what FedIT and LoRA-FAIR pay
    sigma, (out, into, rank) = 0.7, (12, 20, 4)
    measured = mean_square(lambda generator: sigma**2 * normal(generator, out, rank) @ normal(generator, rank, into))
    assert measured == pytest.approx(out * into * rank * sigma**4, rel=0.03)
