"""Decoders as data, whatever they are made of."""

from __future__ import annotations

import inspect
import itertools
import pickle
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import import_module
from pkgutil import iter_modules

import pytest
from samplers import NAMES, decoder

import nap_decode.decoders
import nap_decode.parts
from nap_decode import (
    AnyOrderScheduler,
    Decoder,
    MacroParallelScheduler,
    MicroConfidenceCommitter,
    NapDecodeError,
    Needs,
    QuotaSelection,
    SemiAutoregressiveScheduler,
    ThresholdSelection,
    decoders,
)
from nap_decode.decoders.calibration import CalibratedConfidence
from nap_decode.decoders.credit_decoding import Credit
from nap_decode.decoders.dream import DreamSchedule
from nap_decode.decoders.eb_sampler import EntropyBoundSelection
from nap_decode.decoders.llada_2 import EditReviser
from nap_decode.decoders.lookahead import LookaheadCommitter
from nap_decode.decoders.maskgit import CosineSchedule
from nap_decode.decoders.wide_in_narrow_out import CappedSelection
from nap_decode.parts.committer import Adjustment, Committer
from nap_decode.parts.confidence import divergence
from nap_decode.parts.schedule import EvenSchedule, Schedule
from nap_decode.parts.scheduler import Scheduler
from nap_decode.parts.selection import Reviser, Selection

KINDS = (Scheduler, Schedule, Committer, Selection, Reviser, Adjustment)


def all_parts():
    """Every class of the package that can stand in a decoder, with its kind."""
    for package in (nap_decode.parts, nap_decode.decoders):
        for module in iter_modules(package.__path__, package.__name__ + "."):
            for part in vars(import_module(module.name)).values():
                is_own = inspect.isclass(part) and part.__module__ == module.name and is_dataclass(part)
                if is_own and not inspect.isabstract(part) and not part.__name__.startswith("_"):
                    kind = next((kind for kind in KINDS if issubclass(part, kind)), None)
                    if kind is not None or hasattr(part, "needs"):  # a confidence, which is any callable
                        yield part, kind or "confidence"


PARTS = [(part, kind) for part, kind in all_parts() if part not in (Decoder, Needs)]


def test_the_parts_are_found():
    names = {part.__name__ for part, _ in PARTS}
    assert {"AnyOrderScheduler", "DreamSchedule", "Credit", "CalibratedConfidence", "EditReviser"} <= names
    assert len(names) > 20


def test_no_two_parts_that_can_stand_together_share_an_option():
    """Two of one kind stand in the same place, but for what holds another of its kind."""
    for (one, kind), (other, kind_of_other) in itertools.combinations(PARTS, 2):
        holds = {kind, kind_of_other} in ({Committer}, {Selection}) and {one, other} & {
            LookaheadCommitter,
            CappedSelection,
        }
        if kind != kind_of_other or holds:
            shared = {f.name for f in fields(one)} & {f.name for f in fields(other)}
            assert not shared, (one, other)
    own = {f.name for f in fields(Decoder)}
    assert not any(own & {f.name for f in fields(part)} for part, _ in PARTS)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_a_decoder_can_be_set_by_its_name(name):
    own = decoder(name)
    for option, paths in own.options().items():
        assert len(paths) == 1
        part = own
        for step in paths[0]:
            part = getattr(part, step)
        assert own.set(**{option: getattr(part, option)}) == own


@pytest.mark.parametrize("name", NAMES)
def test_decoders_are_values(name):
    one, other = decoder(name), decoder(name)
    assert one == other
    assert one is not other
    assert hash(one) == hash(other)
    assert {one: 1}[pickle.loads(pickle.dumps(other))] == 1
    changed = one.set(close_on=[3])
    assert changed != one
    assert one.close_on == ()
    assert len({decoder(name) for name in NAMES}) == len(NAMES)


def test_a_decoder_says_what_its_parts_need():
    assert Decoder() == Decoder(AnyOrderScheduler(), MicroConfidenceCommitter())
    assert Decoder().needs == Needs()
    everything = decoders.dream_origin().needs
    assert everything == decoders.dream_origin().scheduler.needs | decoders.dream_origin().committer.needs
    assert everything.random
    assert not everything.adaptive
    edits = decoders.llada21_editing().needs
    assert (edits.adaptive, edits.committed, edits.memory, edits.random) == (True, True, True, False)
    assert decoders.wino().needs.left_out
    assert decoders.klass().needs.previous
    assert decoders.klass().needs.statistics == ("divergence",)
    assert decoders.lopa().set(selection=EntropyBoundSelection()).needs.statistics == ("negative_entropy",)


class TestSet:
    def test_options_go_to_the_part_that_has_them(self):
        changed = decoders.klass().set(threshold=0.5, temperature=0.7, block_length=8, tokens_per_step=2, top_k=3)
        selection = replace(decoders.klass().committer.selection, threshold=0.5)
        committer = replace(decoders.klass().committer, temperature=0.7, top_k=3, selection=selection)
        assert changed == Decoder(SemiAutoregressiveScheduler(block_length=8, tokens_per_step=2), committer)
        assert decoders.lopa().set(threshold=0.3).committer.inner.selection == ThresholdSelection(0.3)
        assert decoders.wino().set(threshold=0.3).committer.selection.capped == ThresholdSelection(0.3)
        assert decoders.dream_entropy().set(eps=0.1).scheduler.schedule == DreamSchedule(0.1)
        frequencies = (0.25, 0.75)
        confidence = decoders.pc_sampler(frequencies=frequencies).set(cap=3.0).committer.confidence
        assert confidence == CalibratedConfidence(frequencies, cap=3.0)

    def test_nothing_changes_the_original(self):
        original = decoders.klass()
        original.set(threshold=0.1)
        assert original == decoders.klass()
        assert original.set() == original

    def test_steps_and_tokens_per_step_replace_each_other(self):
        by_steps = decoders.llada_random().set(steps=4)
        assert (by_steps.scheduler.steps, by_steps.scheduler.tokens_per_step) == (4, None)
        by_tokens = by_steps.set(tokens_per_step=2)
        assert (by_tokens.scheduler.steps, by_tokens.scheduler.tokens_per_step) == (None, 2)
        assert by_tokens.set(steps=4) == by_steps
        assert by_steps.set(steps=None) == decoders.llada_random()
        with pytest.raises(NapDecodeError, match=r"give steps .4. or tokens_per_step .3., not both"):
            by_tokens.set(steps=4, tokens_per_step=3)

    def test_parts_come_first_and_their_options_then(self):
        changed = decoders.llada_random().set(selection=ThresholdSelection(0.5), threshold=0.7)
        assert changed.committer.selection == ThresholdSelection(0.7)
        changed = decoders.llada_random().set(hold_until=0.5, scheduler=MacroParallelScheduler())
        assert changed.scheduler == MacroParallelScheduler(hold_until=0.5)
        # A part that is exchanged takes its options with it, unless they are given along with the new one.
        slow = decoders.llada_random().set(tokens_per_step=4)
        assert slow.set(scheduler=MacroParallelScheduler()).scheduler == MacroParallelScheduler()
        assert slow.set(scheduler=MacroParallelScheduler(), tokens_per_step=2).scheduler.tokens_per_step == 2
        changed = decoders.entropy_bounded().set(
            reviser=EditReviser(), edit_threshold=0.1, adjustment=Credit(), decay=0.1
        )
        assert changed.committer.reviser == EditReviser(0.1)
        assert changed.committer.adjustment == Credit(decay=0.1)

    def test_options_that_need_each_other_are_set_together(self):
        grid = decoders.llada_random().set(scheduler=SemiAutoregressiveScheduler(), on_grid=True, block_length=4)
        assert grid.scheduler == SemiAutoregressiveScheduler(block_length=4, on_grid=True)
        cut = decoders.llada_random().set(top_p=0.9, temperature=1.0)
        assert (cut.committer.top_p, cut.committer.temperature) == (0.9, 1.0)
        assert decoders.wino().set(least=30, most=40).committer.selection.least == 30

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"treshold": 0.5}, "there is no option of this decoder 'treshold'. Did you mean 'threshold'"),
            ({"hold_until": 0.5}, "there is no option of this decoder 'hold_until'"),
            ({"threshold": "high"}, "threshold must be a number, but is 'high'"),
            ({"steps": 4}, "steps=4 would have no effect: the committer decides how many tokens a step commits"),
            ({"scheduler": ThresholdSelection()}, "scheduler must be a Scheduler, such as AnyOrderScheduler"),
            ({"selection": AnyOrderScheduler()}, "selection must be a Selection, such as QuotaSelection"),
            ({"close_on": "ends"}, "there is no way to close blocks 'ends'. Did you mean 'end'"),
            ({"top_k": 3}, "top_k=3 would have no effect: nothing is drawn"),
        ],
    )
    def test_refusals(self, options, message):
        with pytest.raises(NapDecodeError, match=message):
            decoders.klass().set(**options)

    def test_what_two_parts_have_is_refused(self):
        capped = decoders.wino().set(capped=CappedSelection(ThresholdSelection()))
        with pytest.raises(NapDecodeError, match=r"share is an option of committer.selection.capped and committer"):
            capped.set(share=0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: MicroConfidenceCommitter(confidence=divergence, adjustment=Credit()),
            "divergence compares .* Credit changes",
        ),
        (lambda: Decoder(MicroConfidenceCommitter()), "scheduler must be a Scheduler, such as AnyOrderScheduler"),
        (lambda: Decoder(AnyOrderScheduler), "scheduler must be a Scheduler, such as .* but is <class"),
        (lambda: Decoder(AnyOrderScheduler(), QuotaSelection()), "committer must be a Committer, such as Micro"),
        (lambda: Decoder(AnyOrderScheduler(), close_on=2), "close_on must be a list of token ids, but is 2"),
        (lambda: Decoder(AnyOrderScheduler(), close_on=[2.0]), "a token id of close_on must be a whole number"),
        (lambda: MicroConfidenceCommitter(reviser="edit"), "reviser must be a Reviser, such as EditReviser"),
        (
            lambda: MicroConfidenceCommitter(adjustment=EditReviser()),
            "adjustment must be an Adjustment, such as Credit",
        ),
        (lambda: decoders.credit().set(selection=decoders.klass().committer.selection), "StableSelection compares"),
        (lambda: decoders.klass().set(scheduler=SemiAutoregressiveScheduler(steps=3)), "steps=3 would have no effect"),
        (
            lambda: decoders.klass().set(scheduler=decoders.dream_entropy().scheduler),
            r"DreamSchedule.eps=0.001. would have no effect: the committer decides",
        ),
        (lambda: decoders.llada2().set(schedule=CosineSchedule()), "CosineSchedule.. would have no effect"),
        (
            lambda: decoders.klass().set(scheduler=MacroParallelScheduler(share_last_step=True)),
            "share_last_step=True would have no effect",
        ),
        (lambda: SemiAutoregressiveScheduler(on_grid=True), "on_grid needs block_length"),
    ],
)
def test_parts_that_do_not_fit(make, message):
    with pytest.raises(NapDecodeError, match=message):
        make()


def test_any_list_of_ends_is_a_tuple():
    for ends in ([3, 4], (3, 4), range(3, 5)):
        assert Decoder(AnyOrderScheduler(), close_on=ends).close_on == (3, 4)
    assert Decoder(AnyOrderScheduler(), close_on="end").close_on == "end"


def test_even_is_the_schedule_of_whatever_is_adaptive():
    assert decoders.klass().scheduler.schedule == EvenSchedule()


class Plain(Selection):
    """Without options."""

    def __call__(self, proposal):
        return proposal.slots.open


def test_a_part_and_options_are_set_from_the_outside_inwards():
    base = decoders.parallel_forced()
    hot, sure = MicroConfidenceCommitter(temperature=0.7), ThresholdSelection(0.5)
    for options in ({"committer": hot, "selection": sure}, {"selection": sure, "committer": hot}):
        assert base.set(**options).committer == replace(hot, selection=sure)
    scheduler = base.set(scheduler=AnyOrderScheduler(), schedule=DreamSchedule(), steps=4).scheduler
    assert scheduler == AnyOrderScheduler(steps=4, schedule=DreamSchedule())
    # Nothing between has to be possible.
    assert base.set(steps=4).set(selection=sure, tokens_per_step=2).scheduler.tokens_per_step == 2


@pytest.mark.parametrize("part", [{"selection": Plain()}, {"selection": ThresholdSelection()}])
def test_an_option_of_a_part_that_goes_is_refused(part):
    with pytest.raises(NapDecodeError, match="no option of this decoder 'position_temperature'"):
        decoders.parallel_forced().set(position_temperature=0.5, **part)
    with pytest.raises(NapDecodeError, match="no option of this decoder 'back_threshold'"):
        decoders.wino().set(back_threshold=0.5, reviser=None)


@dataclass(frozen=True)
class Wrapped(Selection):
    """One that has an option of the name that it is set by."""

    selection: Selection

    def __call__(self, proposal):
        return self.selection(proposal)


def test_a_part_may_have_an_option_of_its_own_name():
    wrapped = Wrapped(ThresholdSelection(0.5))
    decoder = decoders.parallel_forced(tokens_per_step=1).set(selection=wrapped, threshold=0.7)
    assert decoder.committer.selection == Wrapped(ThresholdSelection(0.7))
