"""Decoding for masked-diffusion language models.

One loop (:class:`Sampler`) and small parts that plug into it; every one can be replaced by your own.
"""

from nap_decode.arness import ARness, ARnessMeter
from nap_decode.canvas import Block, Canvas, CanvasTemplate
from nap_decode.committers import Committer, MicroConfidenceCommitter
from nap_decode.confidence import CalibratedConfidence
from nap_decode.credit import Credit
from nap_decode.denoiser import Denoiser
from nap_decode.errors import NapDecodeError
from nap_decode.families import ModelFamily, register_family
from nap_decode.likelihood import LogLikelihood, chain_log_likelihood, log_likelihood_bound
from nap_decode.lookahead import LookaheadCommitter
from nap_decode.output import SamplerOutput
from nap_decode.reuse import BlockReuse, CommittedReuse, DriftReuse, PromptReuse, Reuse
from nap_decode.revisers import EditReviser, RemaskReviser, Reviser, Revision
from nap_decode.sampler import ParallelForcedSampler, Sampler
from nap_decode.schedulers import (
    AnyOrderScheduler,
    BlockScheduler,
    MacroParallelScheduler,
    SemiAutoregressiveScheduler,
)
from nap_decode.schedules import AncestralSchedule, CosineSchedule, DreamSchedule, EvenSchedule, Schedule
from nap_decode.selections import (
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
from nap_decode.slots import Commit, Slots
from nap_decode.state import DecodeState
from nap_decode.trace import DecodeTrace

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
