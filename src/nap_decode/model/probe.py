"""What a model does, found out by calling it with a few short rows instead of trusting its name.

What was found out about a module is remembered as long as it lives, so that nobody asks twice: neither a second
Denoiser, nor a drop-in that makes one at every call.  A module that has changed is asked again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nap_decode.base.rows import Rows
from nap_decode.model import foreign
from nap_decode.model.call import ModelCall


@dataclass
class Probe:
    """What a few small forward passes tell of a model; None is "cannot tell".  It holds nothing of the model itself.

    Args:
        sees_future: whether tokens to the right of a position change what is predicted there.
        hides_padding: whether a row's predictions are the same with padding behind it.
        shift: whether position p is predicted at p - 1 (true) or in place (false).  Only a trained model
            shows it, by repeating what it was shown three times.

    Example:
        >>> from nap_decode import Denoiser, demo
        >>> Denoiser(*demo.load()).probe()
        Probe(sees_future=True, hides_padding=True, shift=None)
    """

    sees_future: bool | None = None
    hides_padding: bool | None = None
    shift: bool | None = None
    # What calls are made by, and checks remember.
    alone: Tensor | None = field(default=None, repr=False, compare=False)  # (N, 2, V), said to rows without padding
    is_late: bool = field(default=False, repr=False, compare=False)  # whether its output layer can be applied later
    has_layer: bool = field(default=False, repr=False, compare=False)  # whether there is one, which is called once
    must_be_told: bool = field(default=False, repr=False, compare=False)  # see ModelCall
    works: set[str] = field(default_factory=set, repr=False, compare=False)  # what else it was seen to do
    calm: tuple[bool, ...] = field(default=(), repr=False, compare=False)  # modules in training mode when none drew


_REMEMBERED: weakref.WeakKeyDictionary[nn.Module, dict[object, tuple[object, Probe]]] = weakref.WeakKeyDictionary()
_MOST = 16  # ways of asking one module that are remembered


class Probing:
    """Asks a model what it does, once; ``avoid`` are ids that end a text."""

    def __init__(
        self, call: ModelCall, mask_token_id: int, pad_token_id: int, avoid: Sequence[int], device: torch.device
    ) -> None:
        self.call, self.mask_token_id, self.device = call, mask_token_id, device
        self.fingerprint = call.fingerprint()
        self.found = Probe()
        self.error: Exception | None = None  # when the model was told by a mask to attend both ways
        # (N, n) int64: a row (twice), the same row with another future, and riddles.  None for functions and modules
        # without a config, and if there are too few ids, or positions, to ask anything.
        self.tokens: Tensor | None = None
        ids = [i for i in range(call.num_embeddings or 0) if i not in {mask_token_id, pad_token_id, *avoid}]
        self._width = min(28, (call.position_limit[0] if call.config is not None else None) or 28)
        if call.config is None or len(ids) < 2 or self._width < 4:
            return
        length = self._width // 2
        rows = [[mask_token_id] + [token] * (length - 1) for token in (ids[0], ids[0], ids[1])]
        self._answers: list[int] = []  # what stands behind the masks of the riddles
        gap = 0
        if len(ids) >= 12 and length >= 12:
            #  a b c a b c a b c a _ c a b   what stands in the gap, and does the model say so there or one before?
            gap = length - 2 - length % 3  # where a b stands; something follows it
            stride = len(ids) // 12
            some = ids[stride // 2 :: stride][:12]
            for a, b, c in zip(some[:4], some[4:8], some[8:], strict=True):
                rows.append([mask_token_id if i == gap else (a, b, c)[i % 3] for i in range(length)])
                self._answers.append(b)
        self.tokens = torch.tensor(rows, device=device)
        asked = [[0, 0]] * 3 + [[gap - 1, gap]] * len(self._answers)
        self._wanted = torch.tensor(asked, device=device)  # (N, 2)
        self._pad = pad_token_id
        wrappers = tuple(map(weakref.ref, call.chain[:-1]))
        self._key = wrappers, call.family, mask_token_id, pad_token_id, tuple(avoid), device
        fingerprint, found = _REMEMBERED.get(call.module, {}).get(self._key, (None, None))
        if found is not None and fingerprint == self.fingerprint:
            self.found = found

    def ask(self) -> None:
        """Find out what rows without padding tell, unless that is remembered; let calls be made accordingly."""
        if self.tokens is None:
            return
        call, head = self.call, self.call.head
        if self.found.alone is None:
            found = self._learn(self.tokens)
            if not found.sees_future and getattr(call.config, "is_causal", None) is False:
                # Releases that do not read this of a config still do what a mask says for every query.
                call.must_be_told = True
                try:
                    told = self._learn(self.tokens)
                    found = told if told.sees_future else found
                except Exception as error:  # whatever foreign code says to a mask that it does not take
                    self.error = error
            self.found = found
        found = self.found
        assert found.alone is not None
        call.must_be_told, head.is_late, head.dtype = found.must_be_told, found.is_late, found.alone.dtype
        if not found.has_layer:
            head.layer = None
        # What speaks against a model is asked again: its weights may be loaded, or trained, by then.
        if found.sees_future and not bool(found.alone.isnan().any()):
            known = _REMEMBERED.setdefault(call.module, {})
            if len(known) >= _MOST:
                known.clear()
            known[self._key] = self.fingerprint, found

    @torch.no_grad()
    def _learn(self, tokens: Tensor) -> Probe:
        alone, is_late = self.call.learn(tokens, self._wanted)
        row, again, other = alone[:3, 0]
        return Probe(
            sees_future=bool((row - other).abs().max() > 2 * (row - again).abs().max()),
            shift=self._solved(alone[3:].clone()),
            alone=alone,
            is_late=is_late,
            has_layer=self.call.head.layer is not None,
            must_be_told=self.call.must_be_told,
            calm=self.found.calm,
        )

    def _solved(self, logits: Tensor) -> bool | None:
        """Where the riddles are answered, if all of them are, and none in the other place."""
        logits[:, :, self.mask_token_id : self.mask_token_id + 1] = -torch.inf  # which need not be scored
        answers = torch.tensor(self._answers, device=logits.device)[:, None]
        before, in_place = (logits.argmax(2) == answers).unbind(1)
        if not bool((before ^ in_place).all()) or bool(before.any()) == bool(in_place.any()):
            return None
        return bool(before.any())

    def padded(self) -> tuple[Rows, Tensor, Tensor]:
        """The first row with padding behind it, and a long row ``(2, W)``; and positions ``(2, 1)`` to look at."""
        assert self.tokens is not None
        length, same = self.tokens.shape[1], int(self.tokens[0, 1])
        tokens = torch.full((2, self._width), same, device=self.device)
        tokens[:, 0], tokens[0, length:] = self.mask_token_id, self._pad
        rows = Rows((length, self._width), torch.zeros_like(tokens, dtype=torch.bool))
        return rows, tokens, self._wanted[:2, :1]

    @property
    def hides_padding(self) -> bool:
        """Whether what the attention mask hides behind a row leaves the row's predictions alone."""
        call, found = self.call, self.found
        if found.alone is None:
            return call.takes_mask
        if found.hides_padding is None and call.takes_mask:
            with torch.no_grad():
                output = call.head.logits(call.with_rows(*self.padded()))
            # Padding must change less than another future does: that of so many pads would be like it.
            effect = (found.alone[0, 0] - found.alone[2, 0]).abs().max()
            found.hides_padding = not differ(output[0, 0], found.alone[0, 0], effect)
        return bool(found.hides_padding)

    @torch.no_grad()
    def is_random(self, tokens: Tensor | None) -> bool:
        """Whether a model in training mode draws, or says different things to equal rows: dropout, of whatever kind.

        That takes one small forward pass; of a model that is not probed, one of the rows that it is to decode.
        """
        mode = tuple(part.training for part in self.call.parts)
        if not any(mode) or mode == self.found.calm:
            return False
        if self.tokens is not None:
            tokens = torch.full((32, 3), int(self.tokens[0, 1]), device=self.device)
            tokens[:, 1] = self.mask_token_id
        if tokens is None:
            return False
        before = self._random_state()
        logits = self.call.learn(tokens, torch.ones_like(tokens[:, :1]))[0]
        if not torch.equal(before, self._random_state()):
            return True
        rounding = 64 * torch.finfo(logits.dtype).eps * logits.abs().max()
        if self.tokens is not None and bool((logits - logits[:1]).abs().max() > rounding):
            return True
        self.found.calm = mode
        return False

    def _random_state(self) -> Tensor:
        """Of torch's global generators, that of the model's device among them."""
        state = torch.random.get_rng_state()
        return torch.cat([state, torch.cuda.get_rng_state(self.device)]) if self.device.type == "cuda" else state

    # ---------------------------------------------------------------------------------------- what else it does

    def why_not(self, what: str, reason: Callable[[], str | None]) -> str | None:
        """What is wrong with some kind of call, if anything; found out once."""
        if what in self.found.works:
            return None
        with torch.no_grad():
            found = reason()
        if found is None:
            self.found.works.add(what)
        return found

    def why_not_leave_one_out(self) -> str | None:
        """What is wrong with leave-one-out predictions, if anything; two small forward passes."""
        call, mask, needs = self.call, self.mask_token_id, "leave-one-out predictions need a"
        if call.family.shift:
            return f"{call.name} ({call.family.name}) predicts position p at p - 1, where no slot can be left out alone"
        if call.config is None or "position_ids" not in call.arguments or not call.takes_mask:
            return f"{needs} model that takes position_ids and a 4-D attention_mask; {call.name} does not"
        if foreign.attention_window(call.config) is not None:
            return f"some layers of {call.name} attend to a window only, which a 4-D attention mask would override"
        # The shadow of a masked slot says what the slot itself says, and the canvas what it says without shadows.
        same, other = (0, mask) if self.tokens is None else self.tokens[1:3, 1].tolist()
        tokens = torch.tensor([[same, mask, other, same], [other, mask, same, other]] * 2, device=self.device)
        rows = Rows((4,) * 4, torch.zeros_like(tokens, dtype=torch.bool))
        wanted = torch.ones_like(tokens[:, :1])
        hidden, is_seen = torch.arange(4, device=self.device)[:, None] >= 2, wanted > 0
        plain = call.head.logits(call.with_rows(rows, tokens, wanted))
        try:
            output = call.with_shadows(rows, tokens, wanted, hidden, is_seen, mask_token_id=mask)
            shadow = call.head.logits(output)
        except Exception as error:
            return f"{needs} 4-D attention mask, which {call.name} does not take: {error}"
        if differ(shadow, plain, effect=(plain[0] - plain[1]).abs().max()):
            return (
                f"{call.name} does not do what a 4-D attention mask and position_ids say, which leave-one-out "
                "predictions need; attn_implementation='sdpa' may"
            )
        return None


def differ(found: Tensor, expected: Tensor, effect: Tensor) -> bool:
    """Whether logits differ by more than rounding and a thousandth of what other tokens would have changed."""
    rounding = 16 * torch.finfo(expected.dtype).eps * expected.abs().max()  # another batch shape rounds otherwise
    return not bool((found - expected).abs().max() <= 1e-3 * effect + rounding)  # as nan does
