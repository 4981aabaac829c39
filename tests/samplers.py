"""Every decoder on the tiny model, with options that make its rules matter there."""

from __future__ import annotations

from models import MASK, VOCABULARY

from nap_decode import CanvasTemplate, MacroParallelScheduler, Sampler, decoders

TEMPLATE = CanvasTemplate.nap(
    2, path_length=(5, 4), summary_length=3, path_header=[(10,), (11, 12)], summary_header=(14,)
)
PROMPTS = [[5, 6, 7, 8, 9], [7], [5, 6, 7]]
HOLES = [[5, MASK, MASK, 7, MASK, 8, MASK, MASK], [MASK, 9, MASK], [5, 6, MASK, MASK, MASK, 7]]
FREQUENCIES = tuple((1 + i % 5) / 100 for i in range(VOCABULARY))
# Probabilities on the tiny model are around a half.
OPTIONS = {
    "fast_dllm_threshold": {"threshold": 0.4},
    "fast_dllm_factor": {"factor": 1.8},
    "entropy_bounded": {"gamma": 1.5},
    "klass": {"threshold": 0.3, "max_divergence": 0.2, "history": 1},
    "hierarchical": {"threshold": 0.5, "low_threshold": 0.3},
    "credit": {"threshold": 0.5},
    "local_leap": {"threshold": 0.5, "low_threshold": 0.3, "radius": 2},
    "wino": {"threshold": 0.2, "back_threshold": 0.3},
    "lopa": {"threshold": 0.5, "branches": 2},
    "llada2": {"threshold": 0.4, "block_length": 4},
    "llada21_editing": {"threshold": 0.3, "edit_threshold": 0.4, "block_length": 4},
    "pc_sampler": {"frequencies": FREQUENCIES, "tokens_per_step": 2},
    "maskgit_cosine": {"tokens_per_step": 2, "position_temperature": 0.3},
    "dream_origin": {"steps": 4},
    "dream_maskgit_plus": {"steps": 4, "alg_temp": 0.4},
    "dream_topk_margin": {"steps": 4},
    "dream_entropy": {"steps": 4, "temperature": 0.7, "top_p": 0.9},
    "mdlm_ancestral": {"steps": 4},
    "llada_low_confidence": {"tokens_per_step": 2, "block_length": 5, "temperature": 0.5},
    "llada_random": {"tokens_per_step": 2},
    "left_to_right": {"tokens_per_step": 2},
    "parallel_forced": {"tokens_per_step": 3},
    "mdlm_first_hitting": {},
    "d2f": {"threshold": 0.4, "block_length": 3},
}
NAMES = list(decoders.DECODERS)


def decoder(name, **options):
    """A decoder with the options above."""
    return decoders.make(name, **(OPTIONS[name] | options))


def make(denoiser, name, **options):
    """A sampler of a decoder with the options above, over the template above."""
    return Sampler(denoiser, decoder=decoder(name, **options), template=TEMPLATE)


def macro_parallel(sampler):
    """The same under NAP's scheduler."""
    own = sampler.decoder.scheduler
    scheduler = MacroParallelScheduler(
        tokens_per_step=own.tokens_per_step, steps=own.steps, schedule=own.schedule, hold_until=0.6
    )
    return sampler.set(scheduler=scheduler)
