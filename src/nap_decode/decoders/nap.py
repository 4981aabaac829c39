"""NAP: several reasoning paths side by side (arXiv 2602.23225)."""

from __future__ import annotations

from nap_decode.parts import Decoder, MacroParallelScheduler


def parallel_forced(
    *, tokens_per_step: int | None = None, steps: int | None = None, hold_until: float = 1.0
) -> Decoder:
    """NAP's parallel-forced decoding (section 4.2): every step's budget is spread over all paths.

    Args:
        tokens_per_step: of the whole canvas; 4 by default.
        steps: instead of ``tokens_per_step``.
        hold_until: see :class:`MacroParallelScheduler`.
    """
    per_step = 4 if tokens_per_step is None and steps is None else tokens_per_step
    return Decoder(MacroParallelScheduler(tokens_per_step=per_step, steps=steps, hold_until=hold_until))
