"""NonFiniteError and its checks.

A call reads one number from the device. Detailed checks run only if it is not finite.
"""

import math

from torch import Tensor

from realign_kernels.lm_head import Head


class NonFiniteError(ValueError):
    """A log-prob is NaN or infinite.

    Trainers map the rows to examples, name these, and stop before the optimizer step.

    Attributes:
        rows: flat indices of the affected rows of hidden, or of the (L, B) table in the message.
    """

    def __init__(self, message: str, rows: list[int]) -> None:
        super().__init__(message)
        self.rows = rows

    def __reduce__(self):
        return NonFiniteError, (str(self), self.rows)


def first_few(values: list[int], limit: int = 8) -> str:
    """The first `limit` values as text, with the number of the others."""
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return f"{values[:limit]}{more}"


def sentinel(*values: Tensor | None) -> Tensor:
    """A scalar on the device that is not finite if any value is not.

    It is a sum, which is one launch on CUDA. isfinite() is four, and a sum in a wider dtype would
    copy the values. If finite values overflow in the sum, the detailed checks find no error.
    """
    total, *more = [v.sum() for v in values if v is not None]
    for value in more:
        total = total + value
    return total


def is_finite(scalar: Tensor) -> bool:
    """Whether a `sentinel` is finite. The host waits for the device."""
    return math.isfinite(scalar.item())


def finite_rows(
    logps: Tensor,  # (n,)
    dlogp_dh: Tensor | None,  # (n, H)
) -> Tensor:  # (n,) bool
    """Mask of rows whose log-prob and d logp / d hidden are finite."""
    finite = logps.isfinite()
    if dlogp_dh is not None:
        # With a weight of -inf the log-prob may be finite while its derivative is not.
        finite &= dlogp_dh.sum(1, dtype=logps.dtype).isfinite()
    return finite


def check_rows(
    finite: Tensor,  # (n,) bool
    index: Tensor | None,  # (n,) int64, flat positions of the n rows; None: their own
    hidden: Tensor,  # (n, H)
    head: Head,
) -> None:
    """Check that the rows are finite.

    Raises:
        NonFiniteError: a row is not. The message names the likely cause.
    """
    if finite.all():
        return
    causes = []
    if not hidden[~finite].isfinite().all():
        causes.append("hidden holds NaN or inf in these rows")
    if not head.weight.isfinite().all():
        causes.append("weight holds NaN or inf")
    if head.bias is not None and not head.bias.isfinite().all():
        causes.append("bias holds NaN or inf")
    if causes:
        reason = f"{'. '.join(causes)}. Check the inputs and the weights of the model."
    else:
        where = "" if head.shard is None else " on this rank (other shards may hold NaN or inf)"
        reason = (
            f"hidden, weight and bias are finite{where}, so the logits overflow {hidden.dtype}. "
            "Look for exploding activations, or use bfloat16."
        )
    rows = _places(index, ~finite)
    raise NonFiniteError(f"log-probs are not finite in rows {first_few(rows)}. {reason}", rows)


def check_tables(
    used: Tensor,  # (n,) log-probs times token weights
    index: Tensor | None,  # (n,) int64
    sums: Tensor,  # (L, B) of used
    reference_logps: Tensor,  # (L, B)
) -> None:
    """Check that references and weighted log-probs are finite. Call `check_rows` first.

    Raises:
        NonFiniteError: a value is NaN or infinite.
    """
    check_sequences("reference_logps", reference_logps)
    if not sums.isfinite().all():
        rows = _places(index, ~used.isfinite())
        raise NonFiniteError(
            f"token_weights make the log-probs of rows {first_few(rows)} NaN or infinite. Check "
            "the weights of these rows.",
            rows,
        )


def check_sequences(name: str, values: Tensor) -> None:
    """Check that an (L, B) tensor is finite.

    Raises:
        NonFiniteError: a value is not. The message names the tensor and the first sequence.
    """
    rows = (~values.isfinite()).flatten().nonzero().squeeze(1).tolist()
    if not rows:
        return
    leaf, example = divmod(rows[0], values.shape[1])
    raise NonFiniteError(
        f"{name} holds NaN or inf for {len(rows)} sequences, first (leaf {leaf}, example "
        f"{example}). Compute these values again.",
        rows,
    )


def _places(index: Tensor | None, bad: Tensor) -> list[int]:
    rows = bad.nonzero().squeeze(1)
    return (rows if index is None else index[rows]).tolist()
