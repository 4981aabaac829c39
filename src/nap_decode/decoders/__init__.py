"""The field's decoders: ``decoders.<name>(options of its paper)`` makes a :class:`~nap_decode.Decoder`.

Anything else is set by name on the part that has it, and any part can be exchanged, to get what nobody has published::

    decoders.klass(threshold=0.8).set(temperature=0.7, scheduler=MacroParallelScheduler())

Each file holds one paper's decoders, and the parts that only these need.  Those with a fixed schedule take one token
per step unless ``steps`` or ``tokens_per_step`` is set; the others commit what the model is sure of, and at least
``tokens_per_step`` tokens.  ``block_length`` makes semi-autoregressive blocks; None decodes anywhere.

Example:
    >>> from nap_decode import Sampler, decoders, demo
    >>> sampler = Sampler(*demo.load(), decoders.fast_dllm_threshold(threshold=0.9, block_length=8))
    >>> out = sampler("1 2 3 4 5 6 7 0 1 2 3 4 = <think 1>", max_new_tokens=16)
    >>> out.forward_passes < 16
    True
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

from nap_decode.base.errors import NapDecodeError, check_name
from nap_decode.decoders.calibration import pc_sampler
from nap_decode.decoders.credit_decoding import credit
from nap_decode.decoders.dinfer import hierarchical
from nap_decode.decoders.discrete_forcing import d2f
from nap_decode.decoders.dream import dream_entropy, dream_maskgit_plus, dream_origin, dream_topk_margin
from nap_decode.decoders.eb_sampler import entropy_bounded
from nap_decode.decoders.fast_dllm import fast_dllm_factor, fast_dllm_threshold
from nap_decode.decoders.leap import local_leap
from nap_decode.decoders.llada import left_to_right, llada_low_confidence, llada_random
from nap_decode.decoders.llada_2 import llada2, llada21_editing
from nap_decode.decoders.lookahead import lopa
from nap_decode.decoders.maskgit import maskgit_cosine
from nap_decode.decoders.mdlm import mdlm_ancestral, mdlm_first_hitting
from nap_decode.decoders.nap import parallel_forced
from nap_decode.decoders.stability import klass
from nap_decode.decoders.wide_in_narrow_out import wino
from nap_decode.parts import Decoder

__all__ = [
    "parallel_forced",
    "llada_low_confidence",
    "llada_random",
    "left_to_right",
    "maskgit_cosine",
    "dream_origin",
    "dream_maskgit_plus",
    "dream_topk_margin",
    "dream_entropy",
    "mdlm_ancestral",
    "mdlm_first_hitting",
    "fast_dllm_threshold",
    "fast_dllm_factor",
    "entropy_bounded",
    "klass",
    "hierarchical",
    "credit",
    "local_leap",
    "wino",
    "lopa",
    "llada2",
    "llada21_editing",
    "pc_sampler",
    "d2f",
    "DECODERS",
    "make",
    "parse_value",
]

DECODERS: dict[str, Callable[..., Decoder]] = {name: globals()[name] for name in __all__[: __all__.index("DECODERS")]}
"""All of them by name."""


def make(name: str, **options: Any) -> Decoder:
    """A decoder from its name and any options, as command lines and configurations have them.

    Args:
        name: one of :data:`DECODERS`.
        options: those of the decoder itself, and of its parts (:meth:`Decoder.set`).

    Raises:
        NapDecodeError: an unknown name or option, one that is missing, or a value out of range.

    Example:
        >>> make("klass", threshold=0.8, temperature=0.7) == klass(threshold=0.8).set(temperature=0.7)
        True
        >>> make("klass", treshold=0.9)
        Traceback (most recent call last):
        ...
        nap_decode.base.errors.NapDecodeError: there is no option of klass 'treshold'. Did you mean 'threshold'? ...
    """
    check_name("decoder", name, DECODERS)
    function = DECODERS[name]
    parameters = inspect.signature(function).parameters
    own = {option: value for option, value in options.items() if option in parameters}
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in own]
    if missing:
        raise NapDecodeError(f"{name} needs {', '.join(missing)}; give it among its options")
    decoder = function(**own)
    known = decoder.options()
    for option in options:
        check_name(f"option of {name}", option, {*parameters, *known, *decoder.options(**options)})
    # Set once more if a part is exchanged, to which they may belong.
    again = {option: value for option, value in options.items() if option not in own or option in known}
    whole = decoder.set(**again)
    for option in own.keys() - known.keys():  # which has another name in its part, and may be gone with it
        if parameters[option].default is not inspect.Parameter.empty:
            other = function(**{key: value for key, value in own.items() if key != option})
            if other != decoder and whole == other.set(**again):
                raise NapDecodeError(f"{option}={own[option]!r} has no effect, as its part is exchanged; leave it out")
    return whole


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
