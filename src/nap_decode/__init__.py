"""Decoding for masked-diffusion language models: parallel-forced, and every other way.

The parts are described in the README; each can be replaced by your own.
"""

from nap_decode.arness import ARness, ARnessMeter
from nap_decode.canvas import Block, Canvas, CanvasTemplate
from nap_decode.committers import MicroConfidenceCommitter, QuotaSelection, ThresholdSelection
from nap_decode.denoiser import Denoiser
from nap_decode.errors import NapDecodeError
from nap_decode.families import ModelFamily, register_family
from nap_decode.output import SamplerOutput
from nap_decode.sampler import DecodeState, ParallelForcedSampler, Sampler
from nap_decode.schedulers import (
    AnyOrderScheduler,
    BlockScheduler,
    MacroParallelScheduler,
    SemiAutoregressiveScheduler,
)
from nap_decode.trace import DecodeTrace

__version__ = "0.1.0"
