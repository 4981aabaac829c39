"""What a model does, found out by calling it with a few short rows instead of trusting its name.

What was found out about a module is remembered as long as it lives, so that nobody asks twice: neither a second
Denoiser, nor a drop-in that makes one at every call.  A module that has changed is asked again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nap_decode.model import foreign
from nap_decode.model.call import ModelCall
from nap_decode.model.passes import ForwardPass, ReusingPass
from nap_decode.model.rows import Rows
from nap_decode.speed.reuse import CommittedReuse, Kept, PromptReuse


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What two small forward passes tell of a model; None is "cannot tell".

    Args:
        sees_future: whether tokens to the right of a position change what is predicted there.
        hides_padding: whether a row's predictions are the same with padding behind it.
        shift: whether position p is predicted at p - 1 (true) or in place (false).  Only a trained model
            shows it, by repeating what it was shown three times.

    Example:
        >>> from nap_decode import Denoiser, demo
        >>> Denoiser(*demo.load()).probe().sees_future
        True
    """

    sees_future: bool | None
    hides_padding: bool | None
    shift: bool | None


@dataclass(frozen=True, eq=False)
class ProbeRows:
    """The rows to call a model with, and what to make of its answers.

    Args:
        tokens: ``(N, n)`` int64: a row (twice), the same row with another future, and riddles.
        wanted: ``(N, 2)`` int64, the positions to look at.
        answers: ``(N - 3,)`` int64, the tokens behind the masks of the riddles.
        padded: ``(2, W)`` int64, the first row with padding behind it, and a long row.
        present: ``(2, W)`` bool, false for that padding.
    """

    tokens: Tensor
    wanted: Tensor
    answers: Tensor
    padded: Tensor
    present: Tensor

    @classmethod
    def make(
        cls,
        *,
        mask_token_id: int,
        pad_token_id: int,
        avoid: Sequence[int],
        num_ids: int,
        max_positions: int | None,
        device: torch.device,
    ) -> ProbeRows | None:
        """None if there are too few ids, or positions, to ask anything.

        Args:
            mask_token_id: stands where something is asked.
            pad_token_id: fills up behind a row.
            avoid: special ids besides these, which mean something to a model.
            num_ids: ids that the model has.
            max_positions: positions that it has, if that is known.
            device: where it takes its input.
        """
        special = {mask_token_id, pad_token_id, *avoid}
        ids = [i for i in range(num_ids) if i not in special]
        width = min(28, max_positions or 28)
        if len(ids) < 2 or width < 4:
            return None
        length = width // 2
        same, other = ids[0], ids[1]
        rows = [[mask_token_id] + [token] * (length - 1) for token in (same, same, other)]
        wanted = [[0, 0]] * 3
        answers = []
        if len(ids) >= 12 and length >= 12:
            #  a b c a b c a b c a _ c a b   what stands in the gap, and does the model say so there or one before?
            stride = len(ids) // 12
            some = ids[stride // 2 :: stride][:12]
            gap = length - 2 - length % 3  # where a b stands; something follows it
            for a, b, c in zip(some[:4], some[4:8], some[8:], strict=True):
                row = [(a, b, c)[i % 3] for i in range(length)]
                row[gap] = mask_token_id
                rows.append(row)
                wanted.append([gap - 1, gap])
                answers.append(b)
        first, long = rows[0] + [pad_token_id] * (width - length), [mask_token_id] + [same] * (width - 1)
        return cls(
            tokens=torch.tensor(rows, device=device),
            wanted=torch.tensor(wanted, device=device),
            answers=torch.tensor(answers, dtype=torch.int64, device=device),
            padded=torch.tensor([first, long], device=device),
            present=torch.arange(width, device=device) < torch.tensor([[length], [width]], device=device),
        )

    def sees_future(self, logits: Tensor) -> bool:
        """Whether the prediction at the first position notices another future; ``(N, 2, V)`` raw logits."""
        noise, effect = self._effects(logits)
        return bool(effect > 2 * noise)

    def shift(self, logits: Tensor, mask_token_id: int) -> bool | None:
        """Where the riddles are answered, if all of them are, and none in the other place."""
        logits = logits[3:].clone()
        logits[:, :, mask_token_id : mask_token_id + 1] = -torch.inf  # which need not be scored
        guesses = logits.argmax(2)
        before, in_place = (guesses == self.answers[:, None].to(guesses.device)).unbind(1)
        if len(self.answers) == 0 or bool(before.any()) == bool(in_place.any()):
            return None
        if not bool((before | in_place).all()):
            return None
        return bool(before.any())

    def hides_padding(self, logits: Tensor, padded: Tensor) -> bool:
        """Whether padding changes the first row less than another future does; ``(2, 1, V)`` padded."""
        alone = logits[0, 0]
        _, effect = self._effects(logits)  # of other tokens; that of so many pads would be like it
        rounding = 16 * torch.finfo(alone.dtype).eps * alone.abs().max()  # another batch shape rounds otherwise
        return bool((padded[0, 0] - alone).abs().max() <= 1e-3 * effect + rounding)

    @staticmethod
    def _effects(logits: Tensor) -> tuple[Tensor, Tensor]:
        """How much a prediction differs between two equal rows, and between two with different futures."""
        row, again, other = logits[:3, 0]
        return (row - again).abs().max(), (row - other).abs().max()


@dataclass
class Answers:
    """What was found out about a model; holds nothing of the model itself.

    Args:
        alone: ``(N, 2, V)``, what the model says to rows without padding.
        is_late: whether its output layer can be applied later.
        keeps_layer: whether there is an output layer that is called once, so that calls may keep what is wanted of it.
        must_be_told: whether it looks ahead only if a mask says so, see :class:`ModelCall`.
        hides_padding: see :class:`Probe`; None if that was not asked yet.
        leaves_one_out: whether it was seen to predict with slots left out.
        reuses: whether it was seen to compute some positions only.
        calm: modules that were in training mode when it was seen to draw nothing.
    """

    alone: Tensor
    is_late: bool
    keeps_layer: bool
    must_be_told: bool = False
    hides_padding: bool | None = None
    leaves_one_out: bool = False
    reuses: bool = False
    calm: tuple[bool, ...] = ()


_REMEMBERED: WeakKeyDictionary[nn.Module, dict[object, tuple[object, Answers]]] = WeakKeyDictionary()
_MOST = 16
"""Ways of asking one module that are remembered."""


class Probing:
    """Asks a model what it does, once.

    Args:
        call: calls the model.
        mask_token_id: see :class:`~nap_decode.Denoiser`.
        pad_token_id: see there.
        avoid: ids that end a text.
        device: where the model takes its input.
    """

    def __init__(
        self, call: ModelCall, *, mask_token_id: int, pad_token_id: int, avoid: Sequence[int], device: torch.device
    ) -> None:
        self.call, self.mask_token_id, self.device = call, mask_token_id, device
        self.fingerprint = call.fingerprint()
        self.rows: ProbeRows | None = None
        """What the model is asked; None for functions, modules without a config, and models of few ids."""
        self.answers: Answers | None = None
        self.error: Exception | None = None
        """What the model said to a mask by which it was told to attend both ways."""
        self._calm: tuple[bool, ...] = ()  # see Answers
        if call.config is None:
            return
        self.rows = ProbeRows.make(
            mask_token_id=mask_token_id,
            pad_token_id=pad_token_id,
            avoid=avoid,
            num_ids=call.num_embeddings or 0,
            max_positions=call.position_limit[0],
            device=device,
        )
        self._key = call.wrappers, call.family, mask_token_id, pad_token_id, tuple(avoid), device

    def recall(self) -> None:
        """Remember what was found out about the model as it is now, if anything."""
        if self.rows is None:
            return
        fingerprint, answers = _REMEMBERED.get(self.call.module, {}).get(self._key, (None, None))
        if fingerprint == self.fingerprint:
            self.answers = answers

    def ask(self) -> None:
        """Find out what rows without padding tell, unless that is remembered."""
        if self.rows is None:
            return
        answers = self.answers or self._ask(self.rows)
        answers.calm = self._calm or answers.calm
        self.answers = answers
        self._tell(answers)
        # What speaks against a model is asked again: its weights may be loaded, or trained, by then.
        if self.sees_future and not bool(answers.alone.isnan().any()):
            known = _REMEMBERED.setdefault(self.call.module, {})
            if len(known) >= _MOST:
                known.clear()
            known[self._key] = self.fingerprint, answers

    def _ask(self, rows: ProbeRows) -> Answers:
        """What rows without padding tell."""
        answers = Answers(*self._learn(rows))
        if not rows.sees_future(answers.alone) and foreign.claims_both_ways(self.call.config):
            # Releases that do not read this of a config still do what a mask says for every query.
            self.call.must_be_told = True
            try:
                told = Answers(*self._learn(rows), must_be_told=True)
            except Exception as error:  # whatever foreign code says to a mask that it does not take
                self.call.must_be_told = False
                self.error = error
                return answers
            return told if rows.sees_future(told.alone) else answers
        return answers

    def _learn(self, rows: ProbeRows) -> tuple[Tensor, bool, bool]:
        with torch.no_grad():
            alone, is_late = self.call.learn(rows.tokens, rows.wanted)
        return alone, is_late, self.call.head.layer is not None

    def _tell(self, answers: Answers) -> None:
        """Let calls be made as was found out."""
        head = self.call.head
        self.call.must_be_told, head.is_late, head.dtype = answers.must_be_told, answers.is_late, answers.alone.dtype
        if not answers.keeps_layer:
            head.layer = None

    @property
    def sees_future(self) -> bool | None:
        """See :class:`Probe`."""
        return None if self.rows is None or self.answers is None else self.rows.sees_future(self.answers.alone)

    @property
    def shift(self) -> bool | None:
        """See :class:`Probe`."""
        if self.rows is None or self.answers is None:
            return None
        return self.rows.shift(self.answers.alone, self.mask_token_id)

    @property
    def hides_padding(self) -> bool:
        """Whether what the attention mask hides behind a row leaves the row's predictions alone."""
        call, rows, answers = self.call, self.rows, self.answers
        if not call.takes_mask or rows is None or answers is None:
            return call.takes_mask
        if answers.hides_padding is None:
            with torch.no_grad():
                frame = call.frame(rows.padded.shape, rows.present, self.device)
                padded = call(rows.padded, frame, rows.wanted[:2, :1])
                answers.hides_padding = rows.hides_padding(answers.alone, call.head.logits(padded))
        return answers.hides_padding

    def is_random(self, tokens: Tensor | None) -> bool:
        """Whether a model in training mode draws, or says different things to equal rows: dropout, of whatever kind.

        That is asked once for what is in training mode, with one small forward pass; of a model that is not probed
        otherwise, with one of the rows ``(B, W)`` that it is to be called with.
        """
        mode = tuple(part.training for part in self.call.parts)
        if not any(mode) or mode in (self._calm, self.answers and self.answers.calm):
            return False
        if self.rows is None and tokens is None:
            return False
        if self.rows is not None:
            tokens = torch.full((32, 3), int(self.rows.tokens[0, 1]), device=self.device)
            tokens[:, 1] = self.mask_token_id
        assert tokens is not None
        before = self._random_state()
        with torch.no_grad():
            logits = self.call.learn(tokens, torch.ones_like(tokens[:, :1]))[0]
        if not torch.equal(before, self._random_state()):
            return True
        if self.rows is not None:
            rounding = 64 * torch.finfo(logits.dtype).eps * logits.abs().max()
            if bool((logits - logits[:1]).abs().max() > rounding):
                return True
        self._calm = mode
        if self.answers is not None:
            self.answers.calm = mode
        return False

    def _random_state(self) -> Tensor:
        """Of torch's global generators, that of the model's device among them."""
        state = torch.random.get_rng_state()
        return torch.cat([state, torch.cuda.get_rng_state(self.device)]) if self.device.type == "cuda" else state

    # ---------------------------------------------------------------------------------------- leaving one out

    def why_not_leave_one_out(self) -> str | None:
        """What is wrong with leave-one-out predictions, if anything; two small forward passes, made once."""
        call, answers = self.call, self.answers
        if answers is not None and answers.leaves_one_out:
            return None
        name = call.name
        if call.family.shift:
            return f"{name} ({call.family.name}) predicts position p at p - 1, where no slot can be left out alone"
        if call.config is None or "position_ids" not in call.arguments or not call.takes_mask:
            return (
                f"leave-one-out predictions need a model that takes position_ids and a 4-D attention_mask; {name} does "
                "not"
            )
        if call.attention_window is not None:
            return f"some layers of {name} attend to a window only, which a 4-D attention mask would override"
        with torch.no_grad():
            reason = self._try_shadows()
        if reason is None and answers is not None:
            answers.leaves_one_out = True
        return reason

    def _try_shadows(self) -> str | None:
        """The shadow of a masked slot says what the slot itself says, and the canvas what it says without shadows."""
        call, mask = self.call, self.mask_token_id
        same, other = (0, mask) if self.rows is None else self.rows.tokens[1:3, 1].tolist()
        rows = torch.tensor([[same, mask, other, same], [other, mask, same, other]] * 2, device=self.device)
        wanted = torch.ones(4, 1, dtype=torch.int64, device=self.device)
        frame = call.frame(rows.shape, None, self.device)
        shadows = torch.arange(4, device=self.device)[:, None] >= 2, wanted >= 0
        plain = call.head.logits(call(rows, frame, wanted))
        try:
            shadow = call.head.logits(call(rows, frame, wanted, shadows, mask_token_id=mask))
        except Exception as error:
            return f"leave-one-out predictions need a 4-D attention mask, which {call.name} does not take: {error}"
        if _differ(shadow, plain, effect=(plain[0] - plain[1]).abs().max()):
            return (
                f"{call.name} does not do what a 4-D attention mask and position_ids say, which leave-one-out "
                "predictions need; attn_implementation='sdpa' may"
            )
        return None

    # ---------------------------------------------------------------------------------------- reuse

    def why_not_reuse(self) -> str | None:
        """What is wrong with calls for some positions, if anything; a few small forward passes, made once."""
        call, answers = self.call, self.answers
        if self.rows is None or answers is None or "position_ids" not in call.arguments:
            return "it takes no position_ids"
        if answers.reuses:
            return None
        if call.attention_window is not None:
            return "some of its layers attend to a window only"
        if call.is_split:
            return "it is split over devices"
        if not self.hides_padding:
            return "it does not hide padding"
        with torch.no_grad():
            reason = self._try_reuse(self.rows)
        answers.reuses = reason is None
        return reason

    def _try_reuse(self, probed: ProbeRows) -> str | None:
        """They must agree with calls for all positions."""
        call, wanted = self.call, probed.wanted[:2, :1]
        rows = Rows(tuple(probed.present.sum(1).tolist()), torch.zeros_like(probed.present), probed.present)
        exact = ForwardPass(call, rows, False, self.mask_token_id)
        before = probed.padded.clone()
        before[:, 1] = probed.tokens[2, 1]
        expected = [call.head.logits(exact(tokens, wanted, None)) for tokens in (before, probed.padded)]
        kept, found = Kept.nothing(len(before), rows.width, before.device), []
        # The whole of other rows; then all positions of these, called for as some; then one, though nothing is new.
        steps = ((PromptReuse(refresh_every=1), before), (CommittedReuse(delay=9), probed.padded))
        try:
            for policy, tokens in (*steps, (CommittedReuse(), probed.padded)):
                output, kept = ReusingPass(call, rows, policy)(tokens, wanted, wanted >= 0, kept)
                found.append(call.head.logits(output))
                if not kept.states:
                    return (
                        "it takes no cache, and its attention is not torch's scaled_dot_product_attention; "
                        "attn_implementation='sdpa' may"
                    )
        except Exception as error:
            return f"asked for some positions, it fails ({type(error).__name__}: {error})"
        effect = (expected[0] - expected[1]).abs().max()
        if any(_differ(a, b, effect) for a, b in zip(found, [*expected, expected[1]], strict=True)):
            return "asked for some positions, it does not say what it says when it is asked for all"
        return None


def _differ(found: Tensor, expected: Tensor, effect: Tensor) -> bool:
    """Whether logits differ by more than rounding and a thousandth of what other tokens would have changed."""
    rounding = 16 * torch.finfo(expected.dtype).eps * expected.abs().max()
    return bool((found - expected).abs().max() > 1e-3 * effect + rounding)
