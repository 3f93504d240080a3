"""The exact sum of many low-rank products, in bounded memory, and its singular value decomposition.

Factors are kept as they are (float32), stacked side by side, while the stack is at most min(out, in) columns wide:
then thin QR of both stacks and the SVD of the small core equal the SVD of the sum. A wider stack costs more than the
dense (out x in) sum, into which it is then multiplied block by block in float64; from there on memory is constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coordinator.core.aggregation.base import Wide
from shared.tensors import Array

NOISE = float(np.finfo(np.float32).eps)
"""Singular values below this share of the largest are rounding of the float32 factors."""
_BLOCK = 256
"""Columns multiplied at once: wide enough for BLAS to be as fast as it gets (62 of 62 GFLOP/s at 384 x 384)."""
_BLOCK_MIN = 16


@dataclass
class _Block:
    left: Array
    right: Array
    weights: Wide
    used: int = 0

    @property
    def full(self) -> bool:
        return self.used == len(self.weights)

    def take(self, b: Array, a: Array, weights: Wide) -> int:
        """Copy as many columns as fit; their number."""
        count = min(len(self.weights) - self.used, len(weights))
        end = self.used + count
        self.left[:, self.used : end] = b[:, :count]
        self.right[self.used : end] = a[:count]
        self.weights[self.used : end] = weights[:count]
        self.used = end
        return count

    def wide(self) -> tuple[Wide, Wide]:
        """Its columns in float64, the weights multiplied into the left ones."""
        left: Wide = np.multiply(self.left[:, : self.used], self.weights[: self.used], dtype=np.float64)
        return left, self.right[: self.used].astype(np.float64)


class ProductSum:
    """sum of `b @ diag(weights) @ a` over all that was added; result bytes depend on the order of adding alone."""

    def __init__(self, out: int, inp: int) -> None:
        self._shape = (out, inp)
        self._blocks: list[_Block] = []
        self._dense: Wide | None = None
        self._columns = 0

    def add(self, b: Array, a: Array, weights: Wide) -> None:
        """Add b (out x r) @ diag(weights) @ a (r x in); columns of weight 0 are left out."""
        nonzero = np.flatnonzero(weights)
        if len(nonzero) < len(weights):
            b, a, weights = b[:, nonzero], a[nonzero], weights[nonzero]
        done = 0
        while done < len(weights):
            done += self._open_block().take(b[:, done:], a[done:], weights[done:])
        self._columns += done

    def svd(self) -> tuple[Wide, Wide, Wide]:
        """u, sigma (descending), vt of the sum; uses the sum up. The largest entry of each column of u is positive."""
        if self._dense is None and self._columns > min(self._shape):
            self._condense()
        u, sigma, vt = self._stack_svd() if self._dense is None else self._dense_svd()
        largest = np.abs(u).argmax(axis=0)
        signs = np.where(u[largest, np.arange(len(sigma))] < 0, -1.0, 1.0)
        return u * signs, sigma, vt * signs[:, None]

    def _open_block(self) -> _Block:
        if self._blocks and not self._blocks[-1].full:
            return self._blocks[-1]
        if self._dense is None and self._columns > min(self._shape):
            self._condense()
        if self._dense is not None and self._blocks:
            self._flush(self._blocks[-1])
            return self._blocks[-1]
        out, inp = self._shape
        width = max(_BLOCK_MIN, min(_BLOCK, out, inp))
        left, right = np.empty((out, width), np.float32), np.empty((width, inp), np.float32)
        self._blocks.append(_Block(left, right, np.empty(width)))
        return self._blocks[-1]

    def _condense(self) -> None:
        """From the stack to the dense sum; one empty block remains for what comes."""
        self._dense = np.zeros(self._shape)
        while self._blocks:
            block = self._blocks.pop()
            self._flush(block)
        self._blocks.append(block)

    def _flush(self, block: _Block) -> None:
        assert self._dense is not None
        left, right = block.wide()
        self._dense += left @ right
        block.used = 0

    def _dense_svd(self) -> tuple[Wide, Wide, Wide]:
        for block in self._blocks:
            self._flush(block)
        self._blocks.clear()
        assert self._dense is not None
        u, sigma, vt = np.linalg.svd(self._dense, full_matrices=False)
        self._dense = None
        return u, sigma, vt

    def _stack_svd(self) -> tuple[Wide, Wide, Wide]:
        out, inp = self._shape
        left, right = np.empty((out, self._columns)), np.empty((inp, self._columns))
        start = 0
        for block in self._blocks:
            wide_left, wide_right = block.wide()
            end = start + block.used
            left[:, start:end], right[:, start:end] = wide_left, wide_right.T
            start = end
        self._blocks.clear()
        q_left, r_left = np.linalg.qr(left)
        q_right, r_right = np.linalg.qr(right)
        u, sigma, vt = np.linalg.svd(r_left @ r_right.T)
        return q_left @ u, sigma, vt @ q_right.T


def workspace_bytes(out: int, inp: int) -> int:
    """Upper bound of what a `ProductSum` holds between two calls of `add`."""
    smaller = min(out, inp)
    block = 4 * max(_BLOCK_MIN, min(_BLOCK, smaller)) * (out + inp)
    return max(4 * smaller * (out + inp), 8 * out * inp) + 2 * block
