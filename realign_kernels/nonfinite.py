"""NonFiniteError and its checks: one number is read, and more only where it is not finite."""

import math

from torch import Tensor

from realign_kernels.backends.base import Head


class NonFiniteError(ValueError):
    """A log-prob is NaN or infinite. `rows` are the flat indices of the rows, as they were given
    (of the (L, B) table that the message names, where it is not hidden).

    A trainer maps the rows to examples, names them, and stops before the optimizer step.
    """

    def __init__(self, message: str, rows: list[int]) -> None:
        super().__init__(message)
        self.rows = rows

    def __reduce__(self):
        return NonFiniteError, (str(self), self.rows)


def first_few(values: list[int], limit: int = 8) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return f"{values[:limit]}{more}"


def sentinel(*values: Tensor | None) -> Tensor:
    """A scalar on the device that is not finite if a value is not.

    isfinite() is four launches on CUDA, a sum is one. A sum in a wider dtype would copy the values.
    Finite values may overflow in the sum; the detailed checks then find no fault.
    """
    first, *others = [v.sum() for v in values if v is not None]
    for other in others:
        first = first + other
    return first


def is_finite(scalar: Tensor) -> bool:
    """Reads a `sentinel`, for which the host waits."""
    return math.isfinite(scalar.item())


def finite_rows(
    logps: Tensor,  # (n,)
    direction: Tensor | None,  # (n, H)
) -> Tensor:  # (n,) bool
    """Which log-probs are finite, and d logp / d hidden with them."""
    finite = logps.isfinite()
    if direction is not None:
        # A weight of -inf may leave the log-prob finite, but not what it is a function of.
        finite &= direction.sum(1, dtype=logps.dtype).isfinite()
    return finite


def check_rows(
    finite: Tensor,  # (n,) bool
    rows: Tensor | None,  # (n,) int64, flat positions of the n rows; None: their own
    hidden: Tensor,  # (N, H)
    head: Head,
) -> None:
    """Check that log-probs are finite.

    Raises:
        NonFiniteError: one is not; the message has the likely cause.
    """
    places = _places(rows, ~finite)
    if not len(places):
        return
    causes = []
    if not hidden[places].isfinite().all():
        causes.append("hidden holds NaN or inf in them")
    if not head.weight.isfinite().all():
        causes.append("weight holds NaN or inf")
    if head.bias is not None and not head.bias.isfinite().all():
        causes.append("bias holds NaN or inf")
    where = "" if head.shard is None else " on this rank (another's shard may hold NaN or inf)"
    reason = ", ".join(causes) or (
        f"hidden, weight and bias are finite{where}, so the logits overflow {hidden.dtype}: "
        "look for exploding activations, or use bfloat16"
    )
    found = places.tolist()
    raise NonFiniteError(f"log-probs are not finite in rows {first_few(found)}: {reason}", found)


def check_tables(
    used: Tensor,  # (n,) log-probs times token weights
    rows: Tensor | None,  # (n,) int64
    sums: Tensor,  # (L, B) of used
    reference_logps: Tensor,  # (L, B)
) -> None:
    """Check that references and weighted log-probs are finite; `check_rows` comes first.

    Raises:
        NonFiniteError: one is NaN or infinite.
    """
    check_sequences("reference_logps", reference_logps)
    if not sums.isfinite().all():
        places = _places(rows, ~used.isfinite()).tolist()
        raise NonFiniteError(
            f"token_weights make the log-probs of rows {first_few(places)} NaN or infinite: look "
            "at their values there",
            places,
        )


def check_sequences(name: str, values: Tensor) -> None:
    """Check that an (L, B) tensor is finite.

    Raises:
        NonFiniteError: names the tensor and the first sequence.
    """
    rows = (~values.isfinite()).flatten().nonzero().squeeze(1).tolist()
    if not rows:
        return
    leaf, example = divmod(rows[0], values.shape[1])
    raise NonFiniteError(
        f"{name} holds NaN or inf for {len(rows)} sequences, first (leaf {leaf}, example "
        f"{example}): compute it again for these",
        rows,
    )


def _places(rows: Tensor | None, bad: Tensor) -> Tensor:
    found = bad.nonzero().squeeze(1)
    return found if rows is None else rows[found]
