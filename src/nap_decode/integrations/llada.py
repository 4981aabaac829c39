"""LLaDA's ``generate`` (ML-GSAI/LLaDA, ``generate.py`` at b7e6c35), for any of our samplers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from nap_decode.base.errors import refuse
from nap_decode.integrations._shared import AnySampler, find, llada_decoder, make
from nap_decode.parts.scheduler import SemiAutoregressiveScheduler
from nap_decode.run.generate import check_same_model
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
    """LLaDA's ``generate``, argument for argument: at temperature 0 it makes LLaDA's tokens.

    ``docs/integrations.md`` lists what differs.  The model is whatever a :class:`Denoiser` can be made of, the prompt
    ``(B, P)`` int64, with an attention mask ``(B, P)`` that is 0 for padding.  Two arguments are ours:

    * ``sampler`` decodes instead: a :class:`Decoder`, the name of one, or a file written by ``Sampler.save``, with a
      Denoiser that has ``mask_id``, ``cfg_scale`` and ``logits_eos_inf``; or a sampler of this model, which has its
      own.  It decodes its template, or ``gen_length`` slots if it has none.
    * ``model_precision`` computes and compares confidences in the precision of the model's logits, as LLaDA does,
      instead of float32, to reproduce published scores.

    Returns:
        ``(B, P + gen_length)`` int64 on the model's device: the prompt as it was given, and what was decoded.

    Raises:
        NapDecodeError: arguments that would have no effect; see also :meth:`Sampler.generate`.
    """
    given = dict(locals())
    defaults = {name: argument.default for name, argument in inspect.signature(generate).parameters.items()}

    def check(why: str, *names: str) -> None:
        refuse({name: given[name] for name in names}, defaults, why)

    options: dict[str, Any] = {"mask_token_id": mask_id, "cfg_scale": cfg_scale}
    options["never"] = [EOS_TOKEN_ID] if logits_eos_inf else []
    if sampler is None:
        last = (EOS_TOKEN_ID, EOT_TOKEN_ID) if confidence_eos_eot_inf else ()
        decoder = llada_decoder(remasking, last, confidence_eos_eot_inf=True)
        scheduler = SemiAutoregressiveScheduler(steps=min(steps, gen_length), block_length=block_length)
        decoder = decoder.set(scheduler=scheduler, temperature=temperature)
        bound = make({"decoder": decoder}, model, model_precision=model_precision, **options)
    else:
        own = ("steps", "block_length", "temperature", "remasking", "confidence_eos_eot_inf", "model_precision")
        check("the sampler decides that", *own)
        if isinstance(sampler, Sampler):
            check_same_model(sampler, model)
            own_mask = ("mask_id",) if mask_id != sampler.denoiser.mask_token_id else ()
            check("the sampler has a Denoiser of its own, with its options", *own_mask, "cfg_scale", "logits_eos_inf")
            bound = sampler
        else:
            bound = make(find(sampler), model, **options)
        if bound.template is not None:
            check("the sampler has a template", "gen_length")
    output = bound.generate(prompt, attention_mask, max_new_tokens=None if bound.template is not None else gen_length)
    assert isinstance(output, Tensor)
    return torch.cat([prompt, output[:, prompt.shape[1] :]], dim=1).to(bound.denoiser.device)
