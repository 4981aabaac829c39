"""What a decoder is made of; each kind of part is one class with one method to write.

=========== ======================================================================================================
Scheduler   which blocks are decoded now: ``open(left, lengths, held)``
confidence  how sure the model is of each proposal: a function of :class:`Candidates`
Selection   which of the scored slots are committed: ``__call__(proposal)``
Reviser     what becomes of committed ones: ``__call__(proposal, decision)``
=========== ======================================================================================================
"""

from nap_decode.parts.committer import Adjustment, Committer, MicroConfidenceCommitter, Predict
from nap_decode.parts.confidence import Candidates, Confidence, leftmost, margin, negative_entropy, probability, random
from nap_decode.parts.decoder import Decoder
from nap_decode.parts.needs import Needs
from nap_decode.parts.schedule import EvenSchedule, Schedule
from nap_decode.parts.scheduler import (
    AnyOrderScheduler,
    MacroParallelScheduler,
    Scheduler,
    SemiAutoregressiveScheduler,
    divide_steps,
    fair_share,
    in_blocks,
)
from nap_decode.parts.selection import QuotaSelection, Reviser, Selection, ThresholdSelection
from nap_decode.parts.slots import Decision, Proposal, Slots, rank_in_block

__all__ = [
    "Adjustment",
    "AnyOrderScheduler",
    "Candidates",
    "Committer",
    "Confidence",
    "Decision",
    "Decoder",
    "EvenSchedule",
    "MacroParallelScheduler",
    "MicroConfidenceCommitter",
    "Needs",
    "Predict",
    "Proposal",
    "QuotaSelection",
    "Reviser",
    "Schedule",
    "Scheduler",
    "Selection",
    "SemiAutoregressiveScheduler",
    "Slots",
    "ThresholdSelection",
    "divide_steps",
    "fair_share",
    "in_blocks",
    "leftmost",
    "margin",
    "negative_entropy",
    "probability",
    "random",
    "rank_in_block",
]
