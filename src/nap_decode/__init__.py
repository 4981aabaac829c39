"""Decoding for masked-diffusion language models.

A :class:`Decoder` says how to decode, and :mod:`nap_decode.decoders` has the field's; a :class:`Sampler` carries it out
with a model, in one loop.  Everything else is in folders by its job: ``parts``, ``model``, ``speed``, ``measure``.
"""

from nap_decode import decoders
from nap_decode.base.errors import NapDecodeError
from nap_decode.base.version import __version__ as __version__
from nap_decode.canvas import Block, Canvas, CanvasTemplate
from nap_decode.measure.arness import ARness, ARnessMeter
from nap_decode.measure.likelihood import LogLikelihood, chain_log_likelihood, log_likelihood_bound
from nap_decode.model.denoiser import Denoiser
from nap_decode.model.families import ModelFamily, register_family
from nap_decode.nap import ParallelForcedSampler
from nap_decode.parts.committer import Committer, MicroConfidenceCommitter
from nap_decode.parts.decoder import Decoder
from nap_decode.parts.needs import Needs
from nap_decode.parts.schedule import Schedule
from nap_decode.parts.scheduler import (
    AnyOrderScheduler,
    MacroParallelScheduler,
    Scheduler,
    SemiAutoregressiveScheduler,
)
from nap_decode.parts.selection import QuotaSelection, Reviser, Selection, ThresholdSelection
from nap_decode.results.output import SamplerOutput
from nap_decode.results.trace import DecodeTrace
from nap_decode.run.sampler import Sampler
from nap_decode.run.state import DecodeState
from nap_decode.speed.reuse import BlockReuse, CommittedReuse, DriftReuse, PromptReuse

__all__ = [
    "ARness",
    "ARnessMeter",
    "AnyOrderScheduler",
    "Block",
    "BlockReuse",
    "Canvas",
    "CanvasTemplate",
    "CommittedReuse",
    "Committer",
    "DecodeState",
    "DecodeTrace",
    "Decoder",
    "Denoiser",
    "DriftReuse",
    "LogLikelihood",
    "MacroParallelScheduler",
    "MicroConfidenceCommitter",
    "ModelFamily",
    "NapDecodeError",
    "Needs",
    "ParallelForcedSampler",
    "PromptReuse",
    "QuotaSelection",
    "Reviser",
    "Sampler",
    "SamplerOutput",
    "Schedule",
    "Scheduler",
    "Selection",
    "SemiAutoregressiveScheduler",
    "ThresholdSelection",
    "chain_log_likelihood",
    "decoders",
    "log_likelihood_bound",
    "register_family",
]
