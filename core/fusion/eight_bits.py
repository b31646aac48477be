"""Maps that multiply in 8-bit floats, as the claims of feed-forward and projections meet them."""

from collections.abc import Iterable

from ablab.core.fusion.rewrite import StepsAside
from ablab.core.language.declare import Linear
from ablab.core.language.offers import EightBits, offer_of_product

MULTIPLE = 16  # of the sides that matrix units for 8-bit floats take


def bits_of(linear: Linear) -> EightBits | None:
    """How a map multiplies; None where it does so otherwise."""
    offer = offer_of_product(linear.product)
    return offer if isinstance(offer, EightBits) else None


def need_sides(sides: Iterable[int], whose: str) -> None:
    """Raises StepsAside where the matrix units do not take one of them."""
    odd = [side for side in sides if side % MULTIPLE]
    if odd:
        raise StepsAside(
            f"8-bit products take sides in multiples of {MULTIPLE}, and {whose} has {min(odd)}"
        )
