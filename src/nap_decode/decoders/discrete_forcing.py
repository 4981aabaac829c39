"""D2F: discrete diffusion forcing (arXiv 2508.09192; zhijie-group/Discrete-Diffusion-Forcing)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from nap_decode.base.errors import check_between
from nap_decode.parts import Decoder, MicroConfidenceCommitter, SemiAutoregressiveScheduler, ThresholdSelection
from nap_decode.parts.scheduler import Plan


@dataclass(frozen=True, kw_only=True)
class PipelineScheduler(SemiAutoregressiveScheduler):
    """Blocks in a pipeline: one opens as soon as the one before is partly done, held back by the template or not.

    Args:
        done_before_next: share of a block, 0 to 1, that is committed before the next one opens; 1 decodes one block
            after the other (``block_add_threshold`` in D2F's code).
        done_before_owed: share of a block that is committed before an adaptive decoder owes the next one a token at
            every step, if it is open; until then it gets what the selection is sure of, which may be nothing
            (``decoded_token_threshold``).  With ``tokens_per_step`` the row is owed that many, wherever it is open.
    """

    done_before_next: float = 0.5
    done_before_owed: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between("done_before_next", self.done_before_next, 0.0, 1.0)
        check_between("done_before_owed", self.done_before_owed, 0.0, 1.0)

    @override
    def open(self, left: Tensor, lengths: Tensor, held: Tensor) -> Tensor:
        return left * _follows(left, lengths, self.done_before_next).cumprod(1)

    @override
    def least(self, plan: Plan, left: Tensor) -> Tensor:
        if self.tokens_per_step is not None:
            return super().least(plan, left)
        owed = self._opened(left, plan.lengths, plan.held) * _follows(left, plan.lengths, self.done_before_owed)
        return owed.clamp(max=1)


def _follows(left: Tensor, lengths: Tensor, share: float) -> Tensor:
    """``(B, M)`` int64: 1 for the first block, and for those behind a block of which the share is committed."""
    # In float64, and not of a product that is whole up to rounding: 0.6 * 25 = 15.000000596 in float32
    is_done = (lengths - left) >= lengths.double() * share - 1e-9
    return pad(is_done.long()[:, :-1], (1, 0), value=1)


def d2f(
    *,
    threshold: float = 0.9,
    block_length: int | None = 32,
    done_before_next: float = 0.5,
    done_before_owed: float = 0.95,
) -> Decoder:
    """D2F's pipeline: a threshold, in several blocks at once; options see :class:`PipelineScheduler`."""
    scheduler = PipelineScheduler(
        block_length=block_length, done_before_next=done_before_next, done_before_owed=done_before_owed
    )
    return Decoder(scheduler, MicroConfidenceCommitter(selection=ThresholdSelection(threshold)))
