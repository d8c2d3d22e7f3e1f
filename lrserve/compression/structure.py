"""What the factors of a rank are stored as: the same map, in other coordinates (docs/methods.md, "Structures").

Notation
    A (r, n), B (m, r)   any two factors of the map B A
    J, Jc                r pivot inputs, and the n - r others
    T (r, n - r)         A_J^-1 A_Jc, the interpolation matrix: B A = (B A_J) [I T] on inputs in the order (J, Jc)

An identity block stores B A_J and T: r (m + n - r) values, the degrees of freedom of an (m, n) matrix of rank r, where two factors
store r (m + n). The factors' coordinates are arbitrary, so both structures first get rid of the ones they came in: that bounds what
rounding the factors to bfloat16 can do. With u = 2^-8 and G the factor that multiplies x (A, or [I T] for an identity block)
    |B' G' - B G|_F <= (2 u + u^2) |B|_F |G|_F,   |G|_F = sqrt(r) for two factors,  <= sqrt(r + 4 r (n - r)) for an identity block.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from lrserve.compression.factorize import Factors
from lrserve.compression.groups import Stored

MAX_INTERPOLATION = 2.0
"""Largest |T_ij| of an identity block. Gu and Eisenstat (SIAM J. Sci. Comput. 17(4), 1996) show that any bound of 1 or more can be
kept; exchanges to get there become many below 2."""


def structured(factors: Factors, stored: Stored) -> Factors:
    """Return two factors A (r, n), B (m, r) as they are to be stored, in float64.

    `low_rank`: A with orthonormal rows. `identity_block`: `order` (n,) int32 and T in the place of A. `narrow_in`: as they are, for
    only `Neurons.cut` makes such factors.

    Raises:
        ValueError: two factors for `narrow_in`, or factors that are no two factors any more for the others.
    """
    A, B = factors.A.double(), factors.B.double()
    if (factors.order is not None) != (stored == "narrow_in"):
        found = "factors that read all inputs" if factors.order is None else "factors that are stored by the order of their inputs"
        raise ValueError(f"{found} cannot become {stored}")
    if stored == "narrow_in":
        return replace(factors, A=A, B=B, b=factors.b.double())
    Q, R = torch.linalg.qr(A.T)
    orthonormal = Factors(A=Q.T.contiguous(), B=B @ R.T, b=factors.b.double())
    return orthonormal if stored == "low_rank" else _identity_block(orthonormal)


def _identity_block(factors: Factors) -> Factors:
    import scipy.linalg

    A = factors.A.numpy()
    r = len(A)
    order = scipy.linalg.qr(A, mode="r", pivoting=True)[1]
    T = np.linalg.solve(A[:, order[:r]], A[:, order[r:]])
    exchanged = False
    # Exchange a pivot for a better input until the bound holds: |det A_J| grows by more than the bound each time, so it ends.
    while T.size:
        i, j = np.unravel_index(np.abs(T).argmax(), T.shape)
        pivot = T[i, j]
        if abs(pivot) <= MAX_INTERPOLATION:
            break
        order[i], order[r + j] = order[r + j], order[i]
        column, row = T[:, j].copy(), T[i] / pivot
        column[i] = 0.0
        T -= np.outer(column, row)
        T[i] = row
        T[:, j] = -column / pivot
        T[i, j] = 1.0 / pivot
        exchanged = True
    if exchanged:  # afresh: exchanges accumulate rounding
        T = np.linalg.solve(A[:, order[:r]], A[:, order[r:]])
    return Factors(
        A=torch.from_numpy(T),
        B=factors.B @ torch.from_numpy(A[:, order[:r]]),
        b=factors.b,
        order=torch.from_numpy(order.astype(np.int32)),
    )
