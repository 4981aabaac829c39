"""What a model does, found out by calling it with a few short rows instead of trusting its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
        guesses = logits[3:].index_fill(2, torch.tensor([mask_token_id], device=logits.device), -torch.inf).argmax(2)
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
