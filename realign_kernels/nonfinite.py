"""NonFiniteError and its checks: one number is read, and more only where it is not finite."""

import math

from torch import Tensor

from realign_kernels.lm_head import Head


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
    """The first of them, and the number of the others."""
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return f"{values[:limit]}{more}"


def sentinel(*values: Tensor | None) -> Tensor:
    """A scalar on the device that is not finite if a value is not.

    isfinite() is four launches on CUDA, a sum is one. A sum in a wider dtype would copy the values.
    Finite values may overflow in the sum; the detailed checks then find no fault.
    """
    total, *more = [v.sum() for v in values if v is not None]
    for value in more:
        total = total + value
    return total


def is_finite(scalar: Tensor) -> bool:
    """Reads a `sentinel`, for which the host waits."""
    return math.isfinite(scalar.item())


def finite_rows(
    logps: Tensor,  # (n,)
    dlogp_dh: Tensor | None,  # (n, H)
) -> Tensor:  # (n,) bool
    """Which log-probs are finite, and d logp / d hidden with them."""
    finite = logps.isfinite()
    if dlogp_dh is not None:
        # A weight of -inf may leave the log-prob finite, but not its derivative.
        finite &= dlogp_dh.sum(1, dtype=logps.dtype).isfinite()
    return finite


def check_rows(
    finite: Tensor,  # (n,) bool
    index: Tensor | None,  # (n,) int64, flat positions of the n rows; None: their own
    hidden: Tensor,  # (n, H)
    head: Head,
) -> None:
    """Check that log-probs are finite.

    Raises:
        NonFiniteError: one is not; the message has the likely cause.
    """
    if finite.all():
        return
    causes = []
    if not hidden[~finite].isfinite().all():
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
    rows = _places(index, ~finite)
    raise NonFiniteError(f"log-probs are not finite in rows {first_few(rows)}: {reason}", rows)


def check_tables(
    used: Tensor,  # (n,) log-probs times token weights
    index: Tensor | None,  # (n,) int64
    sums: Tensor,  # (L, B) of used
    reference_logps: Tensor,  # (L, B)
) -> None:
    """Check that references and weighted log-probs are finite; `check_rows` comes first.

    Raises:
        NonFiniteError: one is NaN or infinite.
    """
    check_sequences("reference_logps", reference_logps)
    if not sums.isfinite().all():
        rows = _places(index, ~used.isfinite())
        raise NonFiniteError(
            f"token_weights make the log-probs of rows {first_few(rows)} NaN or infinite: look "
            "at their values there",
            rows,
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


def _places(index: Tensor | None, bad: Tensor) -> list[int]:
    rows = bad.nonzero().squeeze(1)
    return (rows if index is None else index[rows]).tolist()
