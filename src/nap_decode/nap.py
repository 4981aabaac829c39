"""NAP's sampler, the front door."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nap_decode.base.errors import NapDecodeError
from nap_decode.canvas import CanvasTemplate
from nap_decode.model.denoiser import Denoiser, Model
from nap_decode.parts.decoder import Decoder
from nap_decode.parts.scheduler import MacroParallelScheduler
from nap_decode.run.sampler import Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ParallelForcedSampler(Sampler):
    """NAP's parallel-forced decoding (arXiv 2602.23225, section 4.2).

    A canvas of m paths and a summary; every step's budget is spread over all paths (macro-parallel), and inside each
    path the most confident positions are committed (micro-confidence).  The authors published no decoder; what the
    paper leaves open is decided in :class:`MacroParallelScheduler`.

    Its options are those of :class:`Sampler`, of :meth:`CanvasTemplate.nap` (``num_paths`` and lengths), of
    :class:`MacroParallelScheduler` (``tokens_per_step``, ``steps``, ``hold_until``) and of
    :class:`MicroConfidenceCommitter` (``temperature``).

    Args:
        template: a canvas of your own instead of ``num_paths`` and lengths.
        tokens_per_step: 4 by default, 1 with an adaptive ``decoder``.
        decoder: anything else, such as ``decoders.parallel_forced().set(confidence="margin")``.

    Example:
        >>> from nap_decode import demo
        >>> model, tokenizer = demo.load()
        >>> sampler = ParallelForcedSampler(model, tokenizer, path_length=11, summary_length=2, tokens_per_step=6)
        >>> out = sampler("6 0 6 4 6 2 1 2 4 7 0 6 =")
        >>> print(out.text)
        <think 1> 6 0 4 2 0 1 3 7 0 0 6
        <think 2> 4 5 7 3 4 4 2 4 4 2 6
        <think 3> 3 3 5 3 3 5 1 7 5 4 6
        <summary> 6
    """

    def __init__(
        self,
        model: Denoiser | Model,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        num_paths: int | None = None,
        path_length: int | Sequence[int] | None = None,
        summary_length: int | None = None,
        total_length: int | None = None,
        template: CanvasTemplate | None = None,
        tokens_per_step: int | None = None,
        steps: int | None = None,
        hold_until: float | None = None,
        temperature: float | None = None,
        decoder: Decoder | None = None,
        mask_token_id: int | None = None,
        compile: bool | str = False,
    ) -> None:
        if decoder is None:
            decoder = Decoder(MacroParallelScheduler(tokens_per_step=4))
        own = {"tokens_per_step": tokens_per_step, "steps": steps, "hold_until": hold_until, "temperature": temperature}
        if isinstance(decoder, Decoder):  # anything else is refused by Sampler
            decoder = decoder.set(**_given(own))
        sizes = {"num_paths": num_paths, "path_length": path_length}
        lengths = _given(sizes | {"summary_length": summary_length, "total_length": total_length})
        if template is not None and lengths:
            raise NapDecodeError("a template has its own blocks; leave out num_paths and the lengths, or the template")
        template = CanvasTemplate.nap(**lengths) if template is None else template
        super().__init__(model, tokenizer, decoder, template=template, mask_token_id=mask_token_id, compile=compile)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
