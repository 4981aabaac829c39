"""MDLM (arXiv 2406.07524; kuleshov-group/mdlm) and the first-hitting sampler (arXiv 2409.02908, algorithm 1)."""

from __future__ import annotations

from nap_decode.decoders.dream import dream_origin
from nap_decode.parts import AnyOrderScheduler, Decoder, MicroConfidenceCommitter


def mdlm_ancestral(*, eps: float = 1e-5) -> Decoder:
    """MDLM's ancestral sampling with caching (``ddpm_cache``), at temperature 1.

    Each mask is revealed with probability 1 - s/t, and nothing is computed while the canvas stays as it is.  What is
    left at the end is drawn like the rest; MDLM takes the most likely tokens there.

    Args:
        eps: the time at the last step.
    """
    return dream_origin(eps=eps).set(temperature=1.0)


def mdlm_first_hitting() -> Decoder:
    """The first-hitting sampler: one token per step, in random order, at temperature 1.

    It is ancestral sampling in the limit of many steps, at the cost of one forward pass per token, for models that are
    not told the time.
    """
    return Decoder(AnyOrderScheduler(), MicroConfidenceCommitter(temperature=1.0, confidence="random"))
