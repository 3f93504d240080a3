"""Importance of weights from LoRA gradients alone: against autograd with the dense gradient, and its smoothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from shared.modeling.importance import Scorer, regular, sensitivities, sensitivity, triplets

SCALING = 2.0
Case = tuple[nn.Parameter, nn.Parameter, torch.Tensor]


def case(out: int = 7, inp: int = 5, rank: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Case:
    """(b, a, dense gradient G) of a matrix inside a loss that is no quadratic; gradients are filled in."""
    torch.manual_seed(seed)
    frozen, x = torch.randn(out, inp, dtype=dtype), torch.randn(inp, 11, dtype=dtype)
    b, a = nn.Parameter(torch.randn(out, rank, dtype=dtype)), nn.Parameter(torch.randn(rank, inp, dtype=dtype))
    whole = frozen + SCALING * b @ a
    whole.retain_grad()
    torch.tanh(whole @ x).square().sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    assert whole.grad is not None
    return b, a, whole.grad


def dense_score(b: torch.Tensor, a: torch.Tensor, gradient: torch.Tensor) -> float:
    """The same by the book: full SVD of the dense product, full gradients, a loop over the triplets."""
    u, sigma, v = torch.linalg.svd((SCALING * b @ a).detach().double(), full_matrices=False)
    total = 0.0
    for k in range(b.shape[1]):
        p, q, size = u[:, k], v[k], sigma[k]
        total += abs(float(size * (p @ gradient.double() @ q)))
        total += float((p * size * (gradient.double() @ q)).abs().mean())
        total += float((q * size * (gradient.double().T @ p)).abs().mean())
    return total


@pytest.mark.parametrize(("out", "inp", "rank"), [(7, 5, 3), (5, 7, 5), (4, 4, 1), (20, 30, 8)])
def test_gradients_are_those_of_autograd_on_the_decomposition(out: int, inp: int, rank: int) -> None:
    b, a, gradient = case(out, inp, rank)
    assert b.grad is not None and a.grad is not None
    found = triplets(b, a, b.grad, a.grad, SCALING)
    product = found.p @ torch.diag(found.sizes) @ found.q
    assert torch.allclose(product, SCALING * b @ a, atol=1e-10)
    eye = torch.eye(rank, dtype=torch.float64)
    assert torch.allclose(found.p.T @ found.p, eye, atol=1e-10)
    assert torch.allclose(found.q @ found.q.T, eye, atol=1e-10)
    p, sizes, q = (part.clone().requires_grad_() for part in (found.p, found.sizes, found.q))
    # A loss whose gradient in the matrix is G: autograd does the rest.
    ((p @ torch.diag(sizes) @ q) * gradient).sum().backward()  # type: ignore[no-untyped-call]  # as above
    for ours, theirs in ((found.grad_p, p), (found.grad_sizes, sizes), (found.grad_q, q)):
        assert theirs.grad is not None
        assert torch.allclose(ours, theirs.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_the_score_is_that_of_the_dense_decomposition(seed: int) -> None:
    b, a, gradient = case(20, 30, 4, seed)
    assert b.grad is not None and a.grad is not None
    ours = float(sensitivity(triplets(b, a, b.grad, a.grad, SCALING)))
    assert ours == pytest.approx(dense_score(b, a, gradient), rel=1e-6)


def test_signs_order_and_basis_of_the_factors_do_not_matter() -> None:
    """B R and R^-1 A are the same adapter: permuted, flipped or mixed, the gradients following."""
    b, a, gradient = case(12, 9, 3)
    wanted = sensitivities({"m": (b, a)}, SCALING)["m"]
    flips, order = torch.diag(torch.tensor([1.0, -1.0, -1.0]).double()), torch.eye(3).double()[[2, 0, 1]]
    for change in (flips, order, torch.randn(3, 3).double() + 3 * torch.eye(3)):
        other_b, other_a = nn.Parameter((b @ change).detach()), nn.Parameter((torch.linalg.inv(change) @ a).detach())
        other_b.grad = SCALING * gradient @ other_a.detach().T
        other_a.grad = SCALING * other_b.detach().T @ gradient
        assert sensitivities({"m": (other_b, other_a)}, SCALING)["m"] == pytest.approx(wanted, rel=1e-6)


def test_single_precision_is_enough() -> None:
    b, a, gradient = case(64, 48, 8, dtype=torch.float32)
    assert sensitivities({"m": (b, a)}, SCALING)["m"] == pytest.approx(dense_score(b, a, gradient), rel=1e-4)


def test_a_factor_without_full_rank_is_not_observed() -> None:
    good = case()
    zero, twice, wide = case(seed=1), case(seed=2), case(5, 5, 5, seed=3)
    with torch.no_grad():
        zero[0].zero_()  # the first step of a fresh LoRA
        twice[0][:, 1] = twice[0][:, 0]
        wide[1][4] = wide[1][0]
    still = nn.Parameter(torch.randn(7, 3)), nn.Parameter(torch.randn(3, 5))
    odd = case(seed=4)
    assert odd[0].grad is not None
    odd[0].grad[0, 0] = math.nan
    factors = {"good": good[:2], "zero": zero[:2], "twice": twice[:2], "wide": wide[:2], "still": still, "odd": odd[:2]}
    assert set(sensitivities(factors, SCALING)) == {"good"}
    assert not regular(torch.randn(2, 4), torch.randn(4, 9)), "more columns than rows"


def test_a_module_that_matters_more_scores_more() -> None:
    """Two matrices of one loss, one of them scaled down a hundred times on its way to it."""
    torch.manual_seed(0)
    x = torch.randn(6, 40)
    factors = {name: (nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))) for name in ("much", "little")}
    scorer = Scorer()
    for _ in range(10):
        for pair in factors.values():
            for tensor in pair:
                tensor.grad = None
        noise = 0.1 * torch.randn(6, 40)
        (much_b, much_a), (little_b, little_a) = factors["much"], factors["little"]
        (much_b @ much_a @ x + 0.01 * little_b @ little_a @ x + noise).square().mean().backward()
        scorer.learn(sensitivities(factors, 1.0))
    shares = scorer.shares()
    assert shares["much"] > 0.95
    assert sum(shares.values()) == pytest.approx(1.0)


def test_smoothing_by_hand() -> None:
    scorer = Scorer()
    assert scorer.shares() == {}
    scorer.learn({"x": 1.0, "y": 2.0})
    # One step shows no spread: the squares of the sensitivities.
    assert scorer.shares() == pytest.approx({"x": 0.2, "y": 0.8})
    scorer.learn({"x": 3.0, "y": 3.0})
    scores = {}
    for name, first in (("x", 1.0), ("y", 2.0)):
        mean = (0.85 * 0.15 * first + 0.15 * 3.0) / (1 - 0.85**2)
        spread = 0.15 * (3.0 - mean) / (1 - 0.85**2)
        scores[name] = mean * spread
    assert scorer.shares()["x"] == pytest.approx(scores["x"] / (scores["x"] + scores["y"]))
    before = scorer.shares()
    scorer.learn({"x": math.nan})
    assert scorer.shares() == before


@pytest.mark.parametrize(("steps", "near"), [(4, 0.15), (10, 0.06), (40, 0.01)])
def test_a_late_start_is_neither_punished_nor_rewarded(steps: int, near: float) -> None:
    scorer = Scorer()
    for step in range(100):
        scorer.learn({"early": 1.0 + 2.0 * (step % 2)})
    for step in range(steps):
        scorer.learn({"early": 1.0 + 2.0 * (step % 2), "late": 1.0 + 2.0 * (step % 2)})
    assert scorer.shares()["late"] == pytest.approx(0.5, abs=near)


def test_the_state_goes_through_a_checkpoint() -> None:
    scorer, back = Scorer(), Scorer()
    for step in range(5):
        scorer.learn({"x": 1.0 + step, "y": 2.0 - 0.1 * step})
    back.restore(scorer.save())
    for one in (scorer, back):
        one.learn({"x": 0.3, "z": 4.0})
    assert back.shares() == scorer.shares()


def test_all_zero_gives_no_shares() -> None:
    scorer = Scorer()
    scorer.learn({"x": 0.0, "y": 0.0})
    assert scorer.shares() == {}
