"""Decoding for masked-diffusion language models.

One loop (:class:`Sampler`) and small parts that plug into it; every one can be replaced by your own.
"""

from nap_decode.base.errors import NapDecodeError
from nap_decode.canvas import Block, Canvas, CanvasTemplate
from nap_decode.decoders.dinfer_credit import Credit
from nap_decode.decoders.lookahead import LookaheadCommitter
from nap_decode.measure.arness import ARness, ARnessMeter
from nap_decode.measure.likelihood import LogLikelihood, chain_log_likelihood, log_likelihood_bound
from nap_decode.model.denoiser import Denoiser
from nap_decode.model.families import ModelFamily, register_family
from nap_decode.parts.committer import Committer, MicroConfidenceCommitter
from nap_decode.parts.confidence import CalibratedConfidence
from nap_decode.parts.reviser import EditReviser, RemaskReviser, Reviser, Revision
from nap_decode.parts.schedule import AncestralSchedule, CosineSchedule, DreamSchedule, EvenSchedule, Schedule
from nap_decode.parts.scheduler import (
    AnyOrderScheduler,
    BlockScheduler,
    MacroParallelScheduler,
    SemiAutoregressiveScheduler,
)
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
from nap_decode.parts.slots import Commit, Slots
from nap_decode.results.output import SamplerOutput
from nap_decode.results.trace import DecodeTrace
from nap_decode.run.sampler import ParallelForcedSampler, Sampler
from nap_decode.run.state import DecodeState
from nap_decode.speed.reuse import BlockReuse, CommittedReuse, DriftReuse, PromptReuse, Reuse

__version__ = "0.6.0"

__all__ = [
    "ARness",
    "ARnessMeter",
    "AncestralSchedule",
    "AnyOrderScheduler",
    "Block",
    "BlockReuse",
    "BlockScheduler",
    "CalibratedConfidence",
    "Canvas",
    "CanvasTemplate",
    "CappedSelection",
    "Commit",
    "CommittedReuse",
    "Committer",
    "CosineSchedule",
    "Credit",
    "DecodeState",
    "DecodeTrace",
    "Denoiser",
    "DreamSchedule",
    "DriftReuse",
    "EditReviser",
    "EntropyBoundSelection",
    "EvenSchedule",
    "FactorSelection",
    "HierarchySelection",
    "LeapSelection",
    "LogLikelihood",
    "LookaheadCommitter",
    "MacroParallelScheduler",
    "MicroConfidenceCommitter",
    "ModelFamily",
    "NapDecodeError",
    "ParallelForcedSampler",
    "PromptReuse",
    "QuotaSelection",
    "RemaskReviser",
    "Reuse",
    "Reviser",
    "Revision",
    "Sampler",
    "SamplerOutput",
    "Schedule",
    "Selection",
    "SemiAutoregressiveScheduler",
    "Slots",
    "StableSelection",
    "ThresholdSelection",
    "chain_log_likelihood",
    "log_likelihood_bound",
    "register_family",
]
