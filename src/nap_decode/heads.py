"""A model's output layer, and how it gets to see nothing but what is wanted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nap_decode.errors import NapDecodeError

_CALLING = threading.RLock()


class Output(NamedTuple):
    """What came out of a call of a model at the wanted positions.

    Args:
        rows: ``(N, K, H)`` hidden states or ``(N, K, V)`` logits; not shifted.
        is_hidden: whether it is hidden states, which the output layer is still to be applied to.
    """

    rows: Tensor
    is_hidden: bool


class Head:
    """The output layer of a model, of which calls keep what is wanted: its input, if possible, else its output.

    Hidden states are as good as logits, and far smaller, if the model returns just what a linear output layer makes
    of them; :meth:`learn` finds out.  The layer is then called with nothing, and applied later.  Otherwise it is
    called with the wanted hidden states, if it is known, and failing that, logits are taken from all there are.

    Args:
        layer: None if it is not known, or if hooks on it cannot be trusted.
    """

    def __init__(self, layer: nn.Module | None) -> None:
        self.layer = layer
        self.is_late = False
        """Whether calls give hidden states."""
        self.dtype = torch.get_default_dtype()
        """Precision of the logits, if so."""
        self.memory: Tensor | None = None
        """What :class:`Passing` works in, while nobody does."""

    @property
    def vocab_size(self) -> int:
        """V, ids that are scored."""
        assert isinstance(self.layer, nn.Linear)
        return self.layer.out_features

    def __call__(self, rows: Tensor) -> Tensor:
        """Logits ``(R, V)`` of hidden states ``(R, H)``."""
        assert self.layer is not None
        logits: Tensor = self.layer(rows[None])[0]
        return logits.to(self.dtype)

    def logits(self, output: Output) -> Tensor:
        """``(N, K, V)``."""
        rows, is_hidden = output
        return self(rows.flatten(0, 1)).view(*rows.shape[:2], -1) if is_hidden else rows

    def run(self, call: Callable[[], Any], shape: torch.Size, wanted: Tensor) -> Output:
        """Call the model.

        Args:
            call: calls it.
            shape: ``(N, W)`` of the ids it is called with.
            wanted: ``(N, K)`` int64, positions of which the output is wanted.
        """
        # The hooks are on the model, which other threads may call.
        with _CALLING, self._watched(shape, _nothing if self.is_late else partial(take, wanted=wanted)) as (inputs, _):
            logits = _logits(call())
        if inputs:
            return Output(take(inputs[0], wanted), True) if self.is_late else Output(logits, False)
        return Output(take(logits, wanted), False)

    def learn(self, call: Callable[[], Any], shape: torch.Size, wanted: Tensor) -> Tensor:
        """Call the model, and find out whether the output layer can be applied later.

        Args:
            call: calls it.
            shape: ``(N, W)`` of the ids it is called with.
            wanted: ``(N, K)`` int64, positions to look at.

        Returns:
            ``(N, K, V)``: the logits.
        """
        with self._watched(shape, partial(take, wanted=wanted)) as (inputs, outputs):
            logits = _logits(call())
        if not inputs:
            return take(logits, wanted)
        if type(self.layer) is nn.Linear:  # a quantised one may not take what is empty
            self.dtype = logits.dtype
            again = self.logits(Output(take(inputs[0], wanted), True)).to(logits.device)
            # To the bit; and untouched but for a cast or a move, because a bias that is added behind the layer may
            # be 0 now, and trained tomorrow.
            made = outputs[-1]
            is_untouched = made is logits or made.dtype != logits.dtype or made.device != logits.device
            self.is_late = is_untouched and torch.equal(again, logits)
        return logits

    @contextmanager
    def _watched(
        self, shape: torch.Size, keep: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """While open, the layer sees only what ``keep`` leaves; yields what it was to see, and what it made."""
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def before(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            hidden = arguments[0] if arguments else None
            # A tied output layer may be the input embedding itself, which is called with ids.
            if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[:2] != shape:
                return None
            inputs.append(hidden)
            return (keep(hidden), *arguments[1:])

        def after(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            outputs.append(output)

        handles = []
        if self.layer is not None:
            # Before hooks that there are already: they see what passes the layer later.
            handles.append(self.layer.register_forward_pre_hook(before, prepend=True))
            handles.append(self.layer.register_forward_hook(after))
        try:
            yield inputs, outputs
        finally:
            for handle in handles:
                handle.remove()


class Passing:
    """Applies an output layer to one chunk after the other; what it returns is good until the next call.

    On a CPU all chunks, of all predictions, are in the same memory: fresh memory comes from the system page by page,
    which takes a good part of the time of the product itself.

    Args:
        head: the output layer.
    """

    def __init__(self, head: Head) -> None:
        self.head = head
        self._memory: Tensor | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        """Logits ``(R, V)`` of hidden states ``(R, H)``."""
        layer = self.head.layer
        if rows.device.type != "cpu" or torch.is_grad_enabled() or type(layer) is not nn.Linear or not _is_plain(layer):
            return self.head(rows)
        size = len(rows) * layer.out_features
        if self._memory is None:  # taken, so that nobody else works in it
            self._memory, self.head.memory = self.head.memory, None
        memory = self._memory
        if (
            memory is None
            or memory.numel() < size
            or memory.dtype != rows.dtype
            or memory.is_inference() != torch.is_inference_mode_enabled()
        ):
            memory = self._memory = torch.empty(size, dtype=rows.dtype, device=rows.device)
        logits = memory[:size].view(len(rows), layer.out_features)
        if layer.bias is None:
            torch.mm(rows, layer.weight.T, out=logits)
        else:
            torch.addmm(layer.bias, rows, layer.weight.T, out=logits)
        return logits.to(self.head.dtype)

    def release(self) -> None:
        """Give the memory back."""
        if self._memory is not None:
            self.head.memory, self._memory = self._memory, None


def _is_plain(layer: nn.Linear) -> bool:
    """Whether calling it is nothing but its product: no hooks, no parameters of another kind."""
    parameters = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    hooked = layer._forward_pre_hooks or layer._forward_hooks or "forward" in vars(layer)
    return not hooked and all(type(p) is nn.Parameter and p.device.type == "cpu" for p in parameters)


def take(rows: Tensor, wanted: Tensor) -> Tensor:
    """``(N, W, H), (N, K) -> (N, K, H)``."""
    # Whole rows at a time: gathering them would look at an index for each of the H numbers.
    first = torch.arange(0, rows.shape[0] * rows.shape[1], rows.shape[1], device=rows.device)[:, None]
    flat = rows.flatten(0, 1).index_select(0, (wanted.to(rows.device) + first).flatten())
    return flat.view(*wanted.shape, rows.shape[2])


def _nothing(rows: Tensor) -> Tensor:
    """``(N, W, H) -> (N, 0, H)``."""
    return rows[:, :0]


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple):
        logits = output[0]
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
        raise NapDecodeError(f"the model must return logits (B, L, V) or an object with such .logits, not {got}")
    return logits
