"""What a plan makes of one unit: how much of it stays, how its weights are rounded, and what is added to make up for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

Precision = Literal["int8", "int4_g32", "int4_g64", "int4_g128", "fp8"]
"""How the weights of a unit are rounded (`SCHEMES`)."""
PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)


@dataclass(frozen=True)
class Scheme:
    """A way of rounding a weight matrix (m, n), of those that compressed-tensors describes and engines have kernels for.

    bits: of one weight.
    group: neighbouring inputs of a row that share one scale; None gives each row one scale.
    rounds_inputs: whether the engine rounds the inputs as well, to as many bits with one scale a token.
    floating: whether weights are rounded to floating point numbers and not to integers.
    """

    bits: int
    group: int | None
    rounds_inputs: bool
    floating: bool = False

    @property
    def largest(self) -> float:
        """Largest magnitude of a rounded weight, in units of its scale."""
        return 448.0 if self.floating else 2.0 ** (self.bits - 1) - 1

    def stored_bytes(self, m: int, n: int) -> int:
        """Count the bytes of a rounded (m, n) weight and its scales, as docs/format.md stores them."""
        scales = 4 * m if self.group is None else 2 * m * (n // self.group)
        return m * n * self.bits // 8 + scales

    def fits(self, n: int) -> bool:
        """Whether a weight with n inputs can be divided into groups."""
        return self.group is None or n % self.group == 0


SCHEMES: Final[Mapping[Precision, Scheme]] = {
    "int8": Scheme(8, None, rounds_inputs=True),
    "int4_g32": Scheme(4, 32, rounds_inputs=False),
    "int4_g64": Scheme(4, 64, rounds_inputs=False),
    "int4_g128": Scheme(4, 128, rounds_inputs=False),
    "fp8": Scheme(8, None, rounds_inputs=True, floating=True),
}


@dataclass(frozen=True)
class Level:
    """What becomes of one unit of a plan.

    rank: of its factors, or the neurons that its MLP, or all experts of its mixture, keep; None leaves it dense.
    weights: what its stored weights are rounded to; None keeps the dtype that is served.
    residual: rank of B A beside the rounded weights.
    experts: how many experts of a mixture stay, with these neurons; None keeps all.
    """

    rank: int | None = None
    weights: Precision | None = None
    residual: int = 0
    experts: int | None = None

    def __str__(self) -> str:
        parts = ["dense" if self.rank is None else f"rank {self.rank}", *([self.weights] if self.weights else [])]
        parts += [f"in {self.experts} experts"] * bool(self.experts)
        return " ".join(parts) + (f" + residual {self.residual}" if self.residual else "")

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, without what has its default."""
        values = {"rank": self.rank, "weights": self.weights, "residual": self.residual, "experts": self.experts}
        return {name: value for name, value in values.items() if value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Level:
        """Read the JSON form.

        Raises:
            ValueError: an unknown entry, or a value that no level can have.
        """
        level = cls(**data) if set(data) <= {"rank", "weights", "residual", "experts"} else None
        if level is None or not all(
            (
                level.rank is None or (type(level.rank) is int and level.rank > 0),
                level.weights in (None, *PRECISIONS),
                type(level.residual) is int and level.residual >= 0,
                level.weights is not None or not level.residual,
                level.experts is None or _divides(level.experts, level.rank),
            )
        ):
            raise ValueError(f"{dict(data)} is not a level")
        return level


def _divides(experts: Any, rank: int | None) -> bool:
    return type(experts) is int and experts > 0 and rank is not None and rank % experts == 0


DENSE: Final = Level()
