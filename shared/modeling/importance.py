"""How much the weights matter, from the gradients of their LoRA factors alone (FedPipe's first stage).

The adapter of a matrix is decomposed, s B A = P diag(lambda) Q, and a matrix counts by the sensitivity of the loss to
lambda, P and Q: |w * dL/dw|, of lambda in full, of a column of P or a row of Q in its mean.

    B = Qb Rb, A^T = Qa Ra (thin QR), Rb Ra^T = U diag(sigma) V^T, P = Qb U, Q = V^T Qa^T, lambda = s sigma
    G q_k = (gB / s) y_k with y_k = Ra^-1 v_k;  G^T p_k = (gA / s)^T x_k with x_k = Rb^-1 u_k
    dL/dlambda_k = p_k^T G q_k;  dL/dp_k = lambda_k G q_k;  dL/dq_k = lambda_k G^T p_k

so the gradient G of the whole matrix (out x in) is never formed. Decomposition and sensitivity of the adapter are the
paper's (by digests of it); the form of the score and its smoothing are AdaLoRA's; their use on an adapter decomposed
afterwards is our reading. So is what is smoothed: signs and order of the singular vectors flip from step to step, so
only the sum over a matrix, which does not depend on them, is smoothed, and not each triplet.

The identities need B of full column rank and A of full row rank. At the first step of a fresh LoRA B = 0, and nothing
is observed: a matrix is scored by the steps in which both factors were regular (`WORST_CONDITION`), and not at all if
there were none. Every mean is corrected for its own number of steps, so that a late start is no disadvantage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

SMOOTHING = 0.85
"""beta1 = beta2: what a step leaves of the means so far."""
WORST_CONDITION = 1e5
"""Largest ratio of a factor's singular values; above, single precision leaves no digit of the smallest directions."""

Pair = tuple[torch.Tensor, torch.Tensor]


class Triplets(NamedTuple):
    """s B A = p diag(sizes) q and the gradients of the three: p (.. x out x r), sizes (.. x r), q (.. x r x in)."""

    p: torch.Tensor
    sizes: torch.Tensor
    q: torch.Tensor
    grad_p: torch.Tensor
    grad_sizes: torch.Tensor
    grad_q: torch.Tensor


def triplets(b: torch.Tensor, a: torch.Tensor, grad_b: torch.Tensor, grad_a: torch.Tensor, scaling: float) -> Triplets:
    """The decomposition of `scaling` * b a and its gradients, in float64; leading dimensions are a batch.

    b (.. x out x r) and a (.. x r x in) must have rank r: see `regular`.
    """
    b, a, grad_b, grad_a = (tensor.detach().double() for tensor in (b, a, grad_b, grad_a))
    (basis_b, root_b), (basis_a, root_a) = torch.linalg.qr(b), torch.linalg.qr(a.mT)
    u, sigma, v = torch.linalg.svd(root_b @ root_a.mT)
    p, q = basis_b @ u, v @ basis_a.mT
    # The columns of g_q are G q_k, those of g_p are G^T p_k.
    g_q = grad_b @ torch.linalg.solve_triangular(root_a, v.mT, upper=True) / scaling
    g_p = grad_a.mT @ torch.linalg.solve_triangular(root_b, u, upper=True) / scaling
    sizes = scaling * sigma
    return Triplets(
        p, sizes, q, grad_p=sizes.unsqueeze(-2) * g_q, grad_sizes=(p * g_q).sum(-2),
        grad_q=(sizes.unsqueeze(-2) * g_p).mT,
    )  # fmt: skip


def regular(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Whether b has full column rank and a full row rank, by their singular values: one bool for each of the batch."""
    found = []
    for factor in (b.detach().double(), a.detach().double().mT):
        if factor.shape[-1] > factor.shape[-2]:
            return torch.zeros(factor.shape[:-2], dtype=torch.bool)
        values = torch.linalg.svdvals(torch.linalg.qr(factor, mode="r").R)
        found.append(values[..., -1] * WORST_CONDITION > values[..., 0])
    return torch.logical_and(*found)


def sensitivity(parts: Triplets) -> torch.Tensor:
    """What the loss would change without the matrix' adapter, summed over its triplets: one number for each matrix."""
    of_sizes = (parts.sizes * parts.grad_sizes).abs()
    of_p = (parts.p * parts.grad_p).abs().mean(-2)
    of_q = (parts.q * parts.grad_q).abs().mean(-1)
    return (of_sizes + of_p + of_q).sum(-1)


def sensitivities(factors: Mapping[str, Pair], scaling: float) -> dict[str, float]:
    """The sensitivity of each module of `factors` (b, a, with gradients of the whole step in `.grad`).

    Modules that can't be observed now are left out: a factor of lower rank, no gradient, numbers that are not finite.
    Modules of equal shape are decomposed together.
    """
    shapes: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for name, (b, a) in sorted(factors.items()):
        if b.grad is not None and a.grad is not None and b.shape[1]:
            shapes.setdefault((b.shape, a.shape), []).append(name)
    found: dict[str, float] = {}
    for names in shapes.values():
        # Decompositions of thin matrices take longer on a GPU than the way to the CPU.
        b, a = (torch.stack([factors[name][side].detach() for name in names]).cpu() for side in (0, 1))
        grad_b, grad_a = (torch.stack([_grad(factors[name][side]) for name in names]).cpu() for side in (0, 1))
        sound = torch.isfinite(b).all((1, 2)) & torch.isfinite(a).all((1, 2))
        sound &= torch.isfinite(grad_b).all((1, 2)) & torch.isfinite(grad_a).all((1, 2))
        # Numbers that are not finite would stop the decomposition of all.
        sound &= regular(torch.where(sound[:, None, None], b, 0.0), torch.where(sound[:, None, None], a, 0.0))
        kept = [name for name, good in zip(names, sound.tolist(), strict=True) if good]
        if kept:
            values = sensitivity(triplets(b[sound], a[sound], grad_b[sound], grad_a[sound], scaling)).tolist()
            found.update(zip(kept, values, strict=True))
    return found


def _grad(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad.detach()


class Scorer:
    """Smooths what single steps showed; `save` and `restore` go through a checkpoint without loss.

    mean <- 0.85 mean + 0.15 s, spread <- 0.85 spread + 0.15 |s - mean|, score = mean * spread; both start at 0 and are
    divided by 1 - 0.85^steps before use, the mean inside the spread, too: a module seen for a few steps only would
    otherwise show a large spread.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, float, float]] = {}

    def learn(self, seen: Mapping[str, float]) -> None:
        """Take one step's `sensitivities`."""
        for name, now in seen.items():
            if not math.isfinite(now):
                continue
            steps, mean, spread = self._seen.get(name, (0, 0.0, 0.0))
            mean = SMOOTHING * mean + (1 - SMOOTHING) * now
            level = mean / (1 - SMOOTHING ** (steps + 1))
            spread = SMOOTHING * spread + (1 - SMOOTHING) * abs(now - level)
            self._seen[name] = (steps + 1, mean, spread)

    def shares(self) -> dict[str, float]:
        """Module -> its share of all scores, with sum 1; empty where nothing was observed."""
        scores: dict[str, float] = {}
        once = max((steps for steps, _, _ in self._seen.values()), default=0) == 1
        for name, (steps, mean, spread) in sorted(self._seen.items()):
            # One step shows no spread: its square stands for it where there is nothing better.
            scores[name] = mean * (mean if once else spread) / (1 - SMOOTHING**steps) ** 2
        total = math.fsum(scores.values())
        if not 0.0 < total < math.inf:
            return {}
        return {name: score / total for name, score in scores.items()}

    def save(self) -> dict[str, torch.Tensor]:
        """Module -> its state, for a checkpoint."""
        return {name: torch.tensor(state, dtype=torch.float64) for name, state in self._seen.items()}

    def restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `save` gave."""
        self._seen = {}
        for name, state in saved.items():
            steps, mean, spread = state.tolist()
            self._seen[name] = (int(steps), mean, spread)
