"""D2F: discrete diffusion forcing (arXiv 2508.09192; zhijie-group/Discrete-Diffusion-Forcing)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from nap_decode.base.errors import check_between
from nap_decode.parts import Decoder, MicroConfidenceCommitter, SemiAutoregressiveScheduler, ThresholdSelection


@dataclass(frozen=True, kw_only=True)
class PipelineScheduler(SemiAutoregressiveScheduler):
    """Blocks in a pipeline: one opens as soon as the one before is partly done, held back by the template or not.

    Args:
        done_before_next: share of a block, 0 to 1, that is committed before the next one opens; 1 decodes one block
            after the other.
    """

    done_before_next: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between("done_before_next", self.done_before_next, 0.0, 1.0)

    @override
    def open(self, left: Tensor, lengths: Tensor, held: Tensor) -> Tensor:
        # In float64, and not of a product that is whole up to rounding: 0.6 * 25 = 15.000000596 in float32
        is_done = (lengths - left) >= lengths.double() * self.done_before_next - 1e-9
        return left * pad(is_done.long().cumprod(1)[:, :-1], (1, 0), value=1)


def d2f(*, threshold: float = 0.9, block_length: int | None = 32, done_before_next: float = 0.5) -> Decoder:
    """D2F's pipeline: a threshold, in several blocks at once."""
    scheduler = PipelineScheduler(block_length=block_length, done_before_next=done_before_next)
    return Decoder(scheduler, MicroConfidenceCommitter(selection=ThresholdSelection(threshold)))
