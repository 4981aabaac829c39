from __future__ import annotations

from dataclasses import replace

from models import MASK, TableModel

from nap_decode import (
    AnyOrderScheduler,
    Decoder,
    MicroConfidenceCommitter,
    Needs,
    Reviser,
    Sampler,
)


def sampler_of(model, committer, scheduler=None, **options):
    decoder = Decoder(AnyOrderScheduler() if scheduler is None else scheduler, committer)
    return Sampler(model, decoder=decoder, mask_token_id=MASK, **options)


def test_a_reviser_of_ones_own():
    class Once(Reviser):
        """Masks the first slot again, once."""

        def __call__(self, proposal, decision):
            slots = proposal.slots
            first = slots.committed & (slots.offsets == 0)
            fresh = "done" not in slots.memory
            if bool(first.any()):
                slots.memory["done"] = first.any(1)
            return replace(decision, remasked=first & fresh)

    committer = MicroConfidenceCommitter(confidence="leftmost", reviser=Once())
    sampler = sampler_of(TableModel(3, 4), committer)
    seen = []

    def look(state):
        seen.append((state.masked[0].tolist(), state.commit_step[0].tolist(), state.tokens[0].tolist()))

    out = sampler([[]], max_new_tokens=4, callback=look)
    assert out.forward_passes == 5
    assert [step for _, step, _ in seen[:3]] == [[0, -1, -1, -1], [-1, 1, -1, -1], [2, 1, -1, -1]]
    for masked, step, tokens in seen:
        assert masked == [s < 0 for s in step] == [t == MASK for t in tokens]
    assert out.trace.step.tolist() == [[2, 1, 3, 4]]


def test_a_reviser_that_draws_has_the_seeds_of_the_rows():
    class Chance(Reviser):
        needs = Needs(adaptive=True, memory=True, committed=True, random=True)

        def __call__(self, proposal, decision):
            seen.append(proposal.slots.seeds.tolist())
            return decision

    seen = []
    committer = MicroConfidenceCommitter(reviser=Chance())
    sampler_of(TableModel(3, 2), committer)([[], []], max_new_tokens=2, row_seeds=[4, 9])
    assert seen == [[4, 9], [4, 9]]
