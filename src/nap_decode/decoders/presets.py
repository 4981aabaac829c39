"""The field's decoders, each as a composition of the package's parts.

``presets.<name>(model, tokenizer, ...)`` is a :class:`~nap_decode.run.sampler.Sampler` like any other.  Swap a part to
get what nobody has published: ``presets.klass(model, tokenizer).replace(scheduler=MacroParallelScheduler())``.
``sampler.describe()`` prints what a preset is made of.

Those with ``steps`` and ``tokens_per_step`` keep either exactly (one token per step if neither is given).  The
others commit what the model is sure of, and at least ``tokens_per_step`` tokens.  ``template`` says what follows
a prompt, for calls without ``max_new_tokens``.  Options that belong to the model (guidance, end ids, logits
processors) are the :class:`~nap_decode.model.denoiser.Denoiser`'s, which may be given as the model.

Example:
    >>> from nap_decode import demo
    >>> from nap_decode.decoders import presets
    >>> sampler = presets.fast_dllm_threshold(*demo.load(), threshold=0.9, block_length=8)
    >>> out = sampler("1 2 3 4 5 6 7 0 1 2 3 4 = <think 1>", max_new_tokens=16)
    >>> out.forward_passes < 16
    True
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from nap_decode.base.errors import NapDecodeError, check_between, check_integer, check_name, check_number
from nap_decode.canvas import CanvasTemplate
from nap_decode.decoders.dinfer_credit import Credit
from nap_decode.decoders.lookahead import LookaheadCommitter
from nap_decode.model.denoiser import Denoiser, Model
from nap_decode.parts.committer import Committer, MicroConfidenceCommitter
from nap_decode.parts.confidence import CalibratedConfidence, Confidence
from nap_decode.parts.reviser import EditReviser, RemaskReviser, Reviser
from nap_decode.parts.schedule import AncestralSchedule, CosineSchedule, DreamSchedule, EvenSchedule, Schedule
from nap_decode.parts.scheduler import AnyOrderScheduler, BlockScheduler, SemiAutoregressiveScheduler
from nap_decode.parts.selection import (
    CappedSelection,
    EntropyBoundSelection,
    FactorSelection,
    HierarchySelection,
    LeapSelection,
    QuotaSelection,
    Selection,
    StableSelection,
    ThresholdSelection,
)
from nap_decode.run.sampler import ParallelForcedSampler, Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AnyModel: TypeAlias = "Denoiser | Model"
Tokenizer: TypeAlias = "PreTrainedTokenizerBase | None"


def parallel_forced(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    steps: int | None = None,
    tokens_per_step: int | None = None,
    hold_until: float = 1.0,
    temperature: float = 0.0,
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """NAP's parallel-forced decoding (arXiv 2602.23225); see :class:`ParallelForcedSampler`."""
    return ParallelForcedSampler(
        model,
        tokenizer,
        steps=steps,
        tokens_per_step=tokens_per_step,
        hold_until=hold_until,
        temperature=temperature,
        template=template,
        mask_token_id=mask_token_id,
    )


def llada_low_confidence(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    steps: int | None = None,
    tokens_per_step: int | None = None,
    block_length: int | None = None,
    temperature: float = 0.0,
    confidence: str | Confidence = "probability",
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """LLaDA's low-confidence remasking (arXiv 2502.09992, algorithm 5; ML-GSAI/LLaDA, ``generate.py`` at b7e6c35).

    Args:
        model: a model, or a :class:`Denoiser` of one.
        tokenizer: see :class:`Denoiser`.
        steps: in all; LLaDA's, too, are divided between the blocks.
        tokens_per_step: instead of ``steps``.
        block_length: semi-autoregressive blocks; None decodes anywhere.
        temperature: of the proposals; confidences are those at temperature 1.
        confidence: by which positions are chosen.
        template: see this module.
        mask_token_id: see :class:`Denoiser`.
    """
    committer = MicroConfidenceCommitter(temperature=temperature, confidence=confidence)
    scheduler = _fixed(steps, tokens_per_step, block_length)
    return _sampler(model, tokenizer, scheduler, committer, template, mask_token_id)


def llada_random(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    steps: int | None = None,
    tokens_per_step: int | None = None,
    block_length: int | None = None,
    temperature: float = 0.0,
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """LLaDA's random remasking (arXiv 2502.09992, algorithm 4); options as :func:`llada_low_confidence`."""
    return llada_low_confidence(
        model,
        tokenizer,
        steps=steps,
        tokens_per_step=tokens_per_step,
        block_length=block_length,
        temperature=temperature,
        confidence="random",
        template=template,
        mask_token_id=mask_token_id,
    )


def left_to_right(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    steps: int | None = None,
    tokens_per_step: int | None = None,
    temperature: float = 0.0,
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """The order of an autoregressive model, whatever the model says; options as :func:`llada_low_confidence`."""
    return llada_low_confidence(
        model,
        tokenizer,
        steps=steps,
        tokens_per_step=tokens_per_step,
        temperature=temperature,
        confidence="leftmost",
        template=template,
        mask_token_id=mask_token_id,
    )


def maskgit_cosine(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    steps: int | None = None,
    tokens_per_step: int | None = None,
    temperature: float = 0.0,
    position_temperature: float = 0.0,
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """MaskGIT's cosine schedule: few tokens first, many last (arXiv 2202.04200).

    MaskGIT lets the temperature of the positions fall to 0 over the steps; here it is the same at all.
    """
    check_between("position_temperature", position_temperature, 0.0, math.inf)
    committer = MicroConfidenceCommitter(temperature=temperature, selection=QuotaSelection(position_temperature))
    scheduler = _fixed(steps, tokens_per_step, None, CosineSchedule())
    return _sampler(model, tokenizer, scheduler, committer, template, mask_token_id)


def dream_origin(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    steps: int | None = None,
    tokens_per_step: int | None = None,
    eps: float = 1e-3,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """Dream's ``alg="origin"``: each mask is revealed with probability 1 - s/t (arXiv 2508.15487).

    Steps that reveal nothing cost no forward pass, so there may be fewer of these than steps.

    Args:
        model: a model, or a :class:`Denoiser` of one.
        tokenizer: see :class:`Denoiser`.
        steps: Dream's; may be more than there are tokens.
        tokens_per_step: instead of ``steps``, on average.
        eps: the time at the last step.
        temperature: of the proposals.
        top_p: see :class:`MicroConfidenceCommitter`.
        top_k: see :class:`MicroConfidenceCommitter`.
        template: see this module.
        mask_token_id: see :class:`Denoiser`.
    """
    committer = _dream_committer("random", temperature, top_p, top_k, 0.0)
    scheduler = _fixed(steps, tokens_per_step, None, AncestralSchedule(eps))
    return _sampler(model, tokenizer, scheduler, committer, template, mask_token_id)


def dream_maskgit_plus(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    steps: int | None = None,
    tokens_per_step: int | None = None,
    eps: float = 1e-3,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    alg_temp: float | None = None,
    confidence: str = "probability",
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """Dream's ``alg="maskgit_plus"``: highest probability first (``generation_utils.py``, ``_sample``).

    Args:
        model: a model, or a :class:`Denoiser` of one.
        tokenizer: see :class:`Denoiser`.
        steps: Dream's; may be more than there are tokens.
        tokens_per_step: instead of ``steps``, on average.
        eps: the time at the last step.
        temperature: of the proposals; as in Dream, confidences are those of the tempered and cut
            distribution.
        top_p: cuts the distribution.
        top_k: cuts the distribution.
        alg_temp: draws positions from softmax(confidence / alg_temp) instead of taking the best.
        confidence: by which positions are chosen.
        template: see this module.
        mask_token_id: see :class:`Denoiser`.
    """
    committer = _dream_committer(confidence, temperature, top_p, top_k, alg_temp or 0.0)
    scheduler = _fixed(steps, tokens_per_step, None, DreamSchedule(eps))
    return _sampler(model, tokenizer, scheduler, committer, template, mask_token_id)


def dream_topk_margin(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    steps: int | None = None,
    tokens_per_step: int | None = None,
    eps: float = 1e-3,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    alg_temp: float | None = None,
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """Dream's ``alg="topk_margin"``: largest p1 - p2 first; options as :func:`dream_maskgit_plus`."""
    return dream_maskgit_plus(
        model,
        tokenizer,
        steps=steps,
        tokens_per_step=tokens_per_step,
        eps=eps,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        alg_temp=alg_temp,
        confidence="margin",
        template=template,
        mask_token_id=mask_token_id,
    )


def dream_entropy(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    steps: int | None = None,
    tokens_per_step: int | None = None,
    eps: float = 1e-3,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    alg_temp: float | None = None,
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """Dream's ``alg="entropy"``: lowest entropy first; options as :func:`dream_maskgit_plus`."""
    return dream_maskgit_plus(
        model,
        tokenizer,
        steps=steps,
        tokens_per_step=tokens_per_step,
        eps=eps,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        alg_temp=alg_temp,
        confidence="negative_entropy",
        template=template,
        mask_token_id=mask_token_id,
    )


def mdlm_ancestral(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    steps: int | None = None,
    tokens_per_step: int | None = None,
    eps: float = 1e-5,
    temperature: float = 1.0,
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """MDLM's ancestral sampling with caching (arXiv 2406.07524; kuleshov-group/mdlm, ``ddpm_cache``).

    Each mask is revealed with probability 1 - s/t, and nothing is computed while the canvas stays as it is.
    What is left at the end is drawn like the rest; MDLM takes the most likely tokens there.
    """
    return dream_origin(
        model,
        tokenizer,
        steps=steps,
        tokens_per_step=tokens_per_step,
        eps=eps,
        temperature=temperature,
        template=template,
        mask_token_id=mask_token_id,
    )


def mdlm_first_hitting(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    temperature: float = 1.0,
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """The first-hitting sampler: one token per step, in random order (arXiv 2409.02908, algorithm 1).

    It is ancestral sampling in the limit of many steps, at the cost of one forward pass per token, for models
    that are not told the time.
    """
    return llada_random(
        model, tokenizer, tokens_per_step=1, temperature=temperature, template=template, mask_token_id=mask_token_id
    )


def fast_dllm_threshold(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    threshold: float = 0.9,
    tokens_per_step: int = 1,
    block_length: int | None = 32,
    temperature: float = 0.0,
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """Fast-dLLM's threshold: whatever is sure enough, and the best (arXiv 2505.22618; NVlabs/Fast-dLLM)."""
    committer = MicroConfidenceCommitter(temperature=temperature, selection=ThresholdSelection(threshold))
    scheduler = _adaptive(tokens_per_step, block_length)
    return _sampler(model, tokenizer, scheduler, committer, template, mask_token_id)


def fast_dllm_factor(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    factor: float = 1.0,
    tokens_per_step: int = 1,
    block_length: int | None = 32,
    temperature: float = 0.0,
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """Fast-dLLM's factor: the more tokens, the surer each must be (arXiv 2505.22618, section 3.3)."""
    committer = MicroConfidenceCommitter(temperature=temperature, selection=FactorSelection(factor))
    scheduler = _adaptive(tokens_per_step, block_length)
    return _sampler(model, tokenizer, scheduler, committer, template, mask_token_id)


def entropy_bounded(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    gamma: float = 0.1,
    confidence: str | Confidence = "negative_entropy",
    tokens_per_step: int = 1,
    block_length: int | None = None,
    temperature: float = 0.0,
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """The EB-Sampler: as many tokens as a bound on their dependence allows (arXiv 2505.24857).

    Args:
        model: a model, or a :class:`Denoiser` of one.
        tokenizer: see :class:`Denoiser`.
        gamma: see :class:`EntropyBoundSelection`.
        confidence: the order in which tokens are considered (the paper's error proxy).
        tokens_per_step: at least.
        block_length: semi-autoregressive blocks; None decodes anywhere, as in the paper.
        temperature: of the proposals.
        template: see this module.
        mask_token_id: see :class:`Denoiser`.
    """
    committer = MicroConfidenceCommitter(
        temperature=temperature, confidence=confidence, selection=EntropyBoundSelection(gamma)
    )
    scheduler = _adaptive(tokens_per_step, block_length)
    return _sampler(model, tokenizer, scheduler, committer, template, mask_token_id)


def klass(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    threshold: float = 0.9,
    max_divergence: float = 0.01,
    history: int = 2,
    tokens_per_step: int = 1,
    block_length: int | None = 64,
    temperature: float = 0.0,
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """KLASS: what is sure and did not change for some steps (arXiv 2511.05664; shkim0116/KLASS)."""
    selection = StableSelection(threshold, max_divergence, history)
    committer = MicroConfidenceCommitter(temperature=temperature, selection=selection)
    scheduler = _adaptive(tokens_per_step, block_length)
    return _sampler(model, tokenizer, scheduler, committer, template, mask_token_id)


def hierarchical(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    threshold: float = 0.9,
    low_threshold: float = 0.4,
    tokens_per_step: int = 1,
    block_length: int | None = 32,
    temperature: float = 0.0,
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """DInfer's hierarchical decoding: the best of every run of masks (arXiv 2510.08666; inclusionAI/dInfer)."""
    selection = HierarchySelection(threshold, low_threshold)
    committer = MicroConfidenceCommitter(temperature=temperature, selection=selection)
    scheduler = _adaptive(tokens_per_step, block_length)
    return _sampler(model, tokenizer, scheduler, committer, template, mask_token_id)


def credit(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    threshold: float = 0.9,
    strength: float = 0.7,
    decay: float = 0.8,
    boost: float = 0.2,
    tokens_per_step: int = 1,
    block_length: int | None = 32,
    temperature: float = 0.0,
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """DInfer's credit decoding: a threshold that tokens reach sooner if they lead for long (arXiv 2510.06133)."""
    committer = MicroConfidenceCommitter(
        temperature=temperature,
        selection=ThresholdSelection(threshold),
        credit=Credit(strength=strength, decay=decay, boost=boost),
    )
    scheduler = _adaptive(tokens_per_step, block_length)
    return _sampler(model, tokenizer, scheduler, committer, template, mask_token_id)


def local_leap(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    threshold: float = 0.9,
    low_threshold: float = 0.75,
    radius: int = 4,
    tokens_per_step: int = 1,
    block_length: int | None = 32,
    temperature: float = 0.0,
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """LocalLeap: less confidence is asked of slots near a sure one (arXiv 2510.07081)."""
    selection = LeapSelection(threshold, low_threshold, radius)
    committer = MicroConfidenceCommitter(temperature=temperature, selection=selection)
    scheduler = _adaptive(tokens_per_step, block_length)
    return _sampler(model, tokenizer, scheduler, committer, template, mask_token_id)


def wino(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    threshold: float = 0.6,
    back_threshold: float = 0.9,
    tokens_per_step: int = 1,
    block_length: int | None = 128,
    temperature: float = 0.0,
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """WINO: commit boldly, and mask again what the rest does not support (arXiv 2507.18578; Feng-Hong/WINO-DLLM).

    The model must take position ids and 4-D attention masks, and must not be shifted.

    Args:
        model: a model, or a :class:`Denoiser` of one.
        tokenizer: see :class:`Denoiser`.
        threshold: tokens surer than this are committed: 5 to 20 of a block at once, and no more than 70 %.
        back_threshold: see :class:`RemaskReviser`.
        tokens_per_step: at least.
        block_length: semi-autoregressive blocks; None decodes anywhere.
        temperature: of the proposals.
        template: see this module.
        mask_token_id: see :class:`Denoiser`.
    """
    check_number("back_threshold", back_threshold)
    committer = MicroConfidenceCommitter(
        temperature=temperature,
        selection=CappedSelection(ThresholdSelection(threshold), share=0.7, least=5, most=20),
        reviser=RemaskReviser(back_threshold),
    )
    scheduler = _adaptive(tokens_per_step, block_length)
    return _sampler(model, tokenizer, scheduler, committer, template, mask_token_id)


def lopa(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    threshold: float = 0.9,
    branches: int = 2,
    weight: float = 0.5,
    weakest: float = 0.5,
    tokens_per_step: int = 1,
    block_length: int | None = 32,
    temperature: float = 0.0,
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """LoPA: looks ahead over orders of filling (arXiv 2512.16229); see :class:`LookaheadCommitter`."""
    committer = LookaheadCommitter(
        committer=MicroConfidenceCommitter(temperature=temperature, selection=ThresholdSelection(threshold)),
        branches=branches,
        weight=weight,
        weakest=weakest,
    )
    scheduler = _adaptive(tokens_per_step, block_length)
    return _sampler(model, tokenizer, scheduler, committer, template, mask_token_id)


def llada2(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    threshold: float = 0.95,
    tokens_per_step: int = 1,
    block_length: int = 32,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """LLaDA2.0's decoder: a threshold, in blocks on the grid of its attention (arXiv 2512.15745).

    Confidences are those of the tempered and cut distribution, as there.
    """
    return _llada2(
        model,
        tokenizer,
        threshold,
        None,
        tokens_per_step,
        block_length,
        (temperature, top_p, top_k),
        template,
        mask_token_id,
    )


def llada21_editing(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    threshold: float = 0.95,
    edit_threshold: float = 0.9,
    max_passes: int = 16,
    tokens_per_step: int = 1,
    block_length: int = 32,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """LLaDA2.1's decoder: as LLaDA2.0's, and committed tokens are replaced by surer ones (arXiv 2602.08676).

    Args:
        model: a model, or a :class:`Denoiser` of one.
        tokenizer: see :class:`Denoiser`.
        threshold: see :class:`ThresholdSelection`.
        edit_threshold: see :class:`EditReviser`.
        max_passes: see :class:`EditReviser`.
        tokens_per_step: at least.
        block_length: distance of the lines of the grid.
        temperature: of the proposals; confidences are those of the tempered and cut distribution.
        top_p: cuts the distribution.
        top_k: cuts the distribution.
        template: see this module.
        mask_token_id: see :class:`Denoiser`.
    """
    check_number("edit_threshold", edit_threshold)
    return _llada2(
        model,
        tokenizer,
        threshold,
        EditReviser(edit_threshold, max_passes),
        tokens_per_step,
        block_length,
        (temperature, top_p, top_k),
        template,
        mask_token_id,
    )


def pc_sampler(
    model: AnyModel,
    tokenizer: Tokenizer = None,
    *,
    frequencies: Sequence[float],
    decay: float = 0.25,
    cap: float = 10.0,
    steps: int | None = None,
    tokens_per_step: int | None = None,
    block_length: int | None = None,
    temperature: float = 0.0,
    template: CanvasTemplate | None = None,
    mask_token_id: int | None = None,
) -> Sampler:
    """PC-Sampler: early positions and rare tokens first (arXiv 2508.13021; NEUIR/PC-Sampler).

    Args:
        model: a model, or a :class:`Denoiser` of one.
        tokenizer: see :class:`Denoiser`.
        frequencies: background frequencies by token id; see ``background_frequencies``.
        decay: lambda; see :class:`CalibratedConfidence`.
        cap: alpha; see :class:`CalibratedConfidence`.
        steps: in all.
        tokens_per_step: instead of ``steps``.
        block_length: semi-autoregressive blocks; None decodes anywhere.
        temperature: of the proposals.
        template: see this module.
        mask_token_id: see :class:`Denoiser`.
    """
    return llada_low_confidence(
        model,
        tokenizer,
        steps=steps,
        tokens_per_step=tokens_per_step,
        block_length=block_length,
        temperature=temperature,
        confidence=CalibratedConfidence(frequencies, decay, cap),
        template=template,
        mask_token_id=mask_token_id,
    )


PRESETS: dict[str, Callable[..., Sampler]] = {
    f.__name__: f
    for f in (
        parallel_forced,
        llada_low_confidence,
        llada_random,
        left_to_right,
        maskgit_cosine,
        dream_origin,
        dream_maskgit_plus,
        dream_topk_margin,
        dream_entropy,
        mdlm_ancestral,
        mdlm_first_hitting,
        fast_dllm_threshold,
        fast_dllm_factor,
        entropy_bounded,
        klass,
        hierarchical,
        credit,
        local_leap,
        wino,
        lopa,
        llada2,
        llada21_editing,
        pc_sampler,
    )
}
"""All presets by name."""


def find_preset(name: str) -> Callable[..., Sampler]:
    """A preset from its name.

    Raises:
        NapDecodeError: an unknown name.

    Example:
        >>> find_preset("fast_dllm")
        Traceback (most recent call last):
        ...
        nap_decode.base.errors.NapDecodeError: there is no preset 'fast_dllm'. Did you mean 'fast_dllm_factor'? ...
    """
    check_name("preset", name, PRESETS)
    return PRESETS[name]


def parse_value(text: str) -> Any:
    """The value of an option as command lines write it: JSON, how Python writes it, or a name.

    Example:
        >>> [parse_value(text) for text in ("4", "[11, 12]", "null", "False", "margin")]
        [4, [11, 12], None, False, 'margin']
    """
    text = text.strip()
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def make_preset(
    name: str, model: AnyModel, options: Mapping[str, Any], *, template: CanvasTemplate | None = None
) -> Sampler:
    """A preset's sampler, from names and values as command lines and configurations have them.

    Args:
        name: of the preset.
        model: see :class:`Sampler`.
        options: the preset's own.
        template: see :class:`Sampler`.

    Raises:
        NapDecodeError: an unknown preset or option, one that is missing, or values out of range.

    Example:
        >>> from nap_decode import Denoiser, demo
        >>> make_preset("klass", Denoiser(*demo.load()), {"treshold": 0.9})
        Traceback (most recent call last):
        ...
        nap_decode.base.errors.NapDecodeError: there is no option of klass 'treshold'. Did you mean 'threshold'? ...
    """
    preset = find_preset(name)
    known = preset_options(name)
    for option in options:
        check_name(f"option of {name}", option, known)
    canvas = {} if template is None else {"template": template}
    try:
        return preset(model, **options, **canvas)
    except TypeError as error:
        raise NapDecodeError(f"{name}: {error}; give it among its options") from error


def preset_options(name: str) -> set[str]:
    """Names of the options that a preset has of its own.

    Example:
        >>> sorted(preset_options("left_to_right"))
        ['steps', 'temperature', 'tokens_per_step']
    """
    return set(inspect.signature(find_preset(name)).parameters) - {"model", "tokenizer", "template", "mask_token_id"}


def _sampler(
    model: AnyModel,
    tokenizer: Tokenizer,
    scheduler: BlockScheduler,
    committer: Committer,
    template: CanvasTemplate | None,
    mask_token_id: int | None,
) -> Sampler:
    return Sampler(
        model, tokenizer, scheduler=scheduler, committer=committer, template=template, mask_token_id=mask_token_id
    )


def _fixed(
    steps: int | None, tokens_per_step: int | None, block_length: int | None, schedule: Schedule = EvenSchedule()
) -> BlockScheduler:
    if steps is None and tokens_per_step is None:
        tokens_per_step = 1
    if block_length is None:
        return AnyOrderScheduler(steps=steps, tokens_per_step=tokens_per_step, schedule=schedule)
    return SemiAutoregressiveScheduler(
        steps=steps, tokens_per_step=tokens_per_step, schedule=schedule, block_length=block_length
    )


def _adaptive(tokens_per_step: int, block_length: int | None) -> BlockScheduler:
    check_integer("tokens_per_step", tokens_per_step, 1)
    return _fixed(None, tokens_per_step, block_length)


def _dream_committer(
    confidence: str, temperature: float, top_p: float | None, top_k: int | None, alg_temp: float
) -> MicroConfidenceCommitter:
    check_between("alg_temp", alg_temp, 0.0, math.inf)
    return MicroConfidenceCommitter(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        confidence=confidence,
        selection=QuotaSelection(alg_temp),
        scores_proposal=True,
    )


def _llada2(
    model: AnyModel,
    tokenizer: Tokenizer,
    threshold: float,
    reviser: Reviser | None,
    tokens_per_step: int,
    block_length: int,
    proposal: tuple[float, float | None, int | None],
    template: CanvasTemplate | None,
    mask_token_id: int | None,
) -> Sampler:
    check_integer("tokens_per_step", tokens_per_step, 1)
    check_integer("block_length", block_length, 1)
    temperature, top_p, top_k = proposal
    selection: Selection = ThresholdSelection(threshold)
    committer = MicroConfidenceCommitter(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        selection=selection,
        reviser=reviser,
        scores_proposal=True,
    )
    scheduler = SemiAutoregressiveScheduler(tokens_per_step=tokens_per_step, block_length=block_length, on_grid=True)
    return _sampler(model, tokenizer, scheduler, committer, template, mask_token_id)
