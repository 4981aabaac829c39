"""Decoding for masked-diffusion language models.

One loop (:class:`Sampler`) and small parts that plug into it; every one can be replaced by your own.
"""

from nap_decode.arness import ARness, ARnessMeter
from nap_decode.canvas import Block, Canvas, CanvasTemplate
from nap_decode.committers import Committer, MicroConfidenceCommitter, QuotaSelection, ThresholdSelection
from nap_decode.denoiser import Denoiser
from nap_decode.errors import NapDecodeError
from nap_decode.families import ModelFamily, register_family
from nap_decode.output import SamplerOutput
from nap_decode.sampler import ParallelForcedSampler, Sampler
from nap_decode.schedulers import (
    AnyOrderScheduler,
    BlockScheduler,
    MacroParallelScheduler,
    SemiAutoregressiveScheduler,
)
from nap_decode.state import DecodeState
from nap_decode.trace import DecodeTrace

__version__ = "0.1.0"

__all__ = [
    "ARness",
    "ARnessMeter",
    "AnyOrderScheduler",
    "Block",
    "BlockScheduler",
    "Canvas",
    "Committer",
    "CanvasTemplate",
    "DecodeState",
    "DecodeTrace",
    "Denoiser",
    "MacroParallelScheduler",
    "MicroConfidenceCommitter",
    "ModelFamily",
    "NapDecodeError",
    "ParallelForcedSampler",
    "QuotaSelection",
    "Sampler",
    "SamplerOutput",
    "SemiAutoregressiveScheduler",
    "ThresholdSelection",
    "register_family",
]
