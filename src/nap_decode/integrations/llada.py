"""LLaDA's ``generate`` (ML-GSAI/LLaDA, ``generate.py`` at b7e6c35), for any of our samplers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from nap_decode.base.errors import check_name, refuse
from nap_decode.decoders.llada import ProbabilityWithout, llada_low_confidence, llada_random
from nap_decode.integrations._shared import PUBLISHED_PRECISION, AnySampler, bind, make_denoiser
from nap_decode.model.denoiser import Denoiser
from nap_decode.parts.decoder import Decoder
from nap_decode.run.sampler import Sampler

EOS_TOKEN_ID, EOT_TOKEN_ID = 126081, 126348
"""LLaDA's ``<|endoftext|>`` and ``<|eot_id|>``, which its flags are about."""


def generate(
    model: Any,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    sampler: AnySampler | None = None,
    model_precision: bool = False,
) -> Tensor:
    """LLaDA's ``generate``, argument for argument; ``sampler`` and ``model_precision`` are ours.

    At temperature 0 it makes LLaDA's tokens.  What differs is listed in ``docs/integrations.md``.

    Args:
        model: what a :class:`Denoiser` can be made of.
        prompt: ``(B, P)`` int64.
        attention_mask: ``(B, P)``, 0 for padding; without it nothing is padding.
        steps: in all, divided between the blocks; more steps than tokens are as many as there are tokens.
        gen_length: slots to decode.
        block_length: of the blocks, which are decoded one after the other; the last may be shorter.
        temperature: of the proposals.
        cfg_scale: see :class:`Denoiser`.
        remasking: ``"low_confidence"`` or ``"random"``.
        mask_id: the mask id.
        logits_eos_inf: never emit the id 126081.
        confidence_eos_eot_inf: commit the ids 126081 and 126348 last.
        sampler: decode with this instead: a :class:`Decoder`, the name of one, or a file written by ``Sampler.save``,
            with a Denoiser that has ``mask_id``, ``cfg_scale`` and ``logits_eos_inf``; or a sampler of this model,
            which has its own.  It decodes its template, or ``gen_length`` slots if it has none.
        model_precision: compute and compare confidences in the precision of the model's logits, as LLaDA does, instead
            of float32, to reproduce published scores.

    Returns:
        ``(B, P + gen_length)`` int64 on the model's device: the prompt as it was given, and what was decoded.

    Raises:
        NapDecodeError: arguments that would have no effect; see also :meth:`Sampler.generate`.
    """
    given = dict(locals())
    defaults = {name: argument.default for name, argument in inspect.signature(generate).parameters.items()}

    def check(names: tuple[str, ...], why: str) -> None:
        refuse({name: given[name] for name in names}, defaults, why)

    def denoiser() -> Denoiser:
        never = [EOS_TOKEN_ID] if logits_eos_inf else []
        return make_denoiser(model, never=never, mask_token_id=mask_id, cfg_scale=cfg_scale)

    if sampler is None:
        decoder = _published(block_length, remasking, confidence_eos_eot_inf)
        decoder = decoder.set(steps=min(steps, gen_length), temperature=temperature)
        bound = Sampler(denoiser(), decoder=decoder.set(**PUBLISHED_PRECISION) if model_precision else decoder)
    else:
        own = ("steps", "block_length", "temperature", "remasking", "confidence_eos_eot_inf", "model_precision")
        check(own, "the sampler decides that")
        bound = bind(sampler, denoiser, model)
        if isinstance(sampler, Sampler):
            own_mask = ("mask_id",) if mask_id != bound.denoiser.mask_token_id else ()
            check((*own_mask, "cfg_scale", "logits_eos_inf"), "the sampler has a Denoiser of its own, with its options")
        if bound.template is not None:
            check(("gen_length",), "the sampler has a template")
    output = bound.generate(prompt, attention_mask, max_new_tokens=None if bound.template is not None else gen_length)
    assert isinstance(output, Tensor)
    return torch.cat([prompt, output[:, prompt.shape[1] :]], dim=1).to(bound.denoiser.device)


def _published(block_length: int, remasking: str, ends_last: bool) -> Decoder:
    check_name("remasking", remasking, ("low_confidence", "random"))
    if remasking == "random":
        refuse({"confidence_eos_eot_inf": ends_last}, {"confidence_eos_eot_inf": False}, "remasking is random")
        return llada_random(block_length=block_length)
    confidence = ProbabilityWithout((EOS_TOKEN_ID, EOT_TOKEN_ID)) if ends_last else "probability"
    return llada_low_confidence(block_length=block_length, confidence=confidence)
