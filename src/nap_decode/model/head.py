"""A model's output layer, and how it gets to see nothing but what is wanted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nap_decode.base.errors import NapDecodeError

# Held while hooks are on a model.  They look at the calls of their own thread only; the lock is for their list.
_CALLING = threading.RLock()


class Output(NamedTuple):
    """What came out of a call of a model at the wanted positions."""

    rows: Tensor  # (N, K, H) hidden states or (N, K, V) logits; not shifted
    is_hidden: bool  # whether the output layer is still to be applied

    @staticmethod
    def joined(parts: Sequence[tuple[Tensor, Output]]) -> Output:
        """That of a batch, of its parts and the rows ``(n,)`` that each has."""
        values, index = torch.cat([output.rows for _, output in parts]), torch.cat([rows for rows, _ in parts])
        return Output(torch.empty_like(values).index_copy_(0, index.to(values.device), values), parts[0][1].is_hidden)


class Head:
    """The output layer of a model, of which calls keep what is wanted: its input, if possible, else its output.

    Hidden states are as good as logits, and far smaller, if the model returns just what a linear output layer makes
    of them; :meth:`learn` finds out.  The layer is then called with nothing, and applied later.  Otherwise it is
    called with the wanted hidden states, if it is known, and failing that, logits are taken from all there are.

    Args:
        layer: None if it is not known, or if hooks on it cannot be trusted.
        num_virtual: positions that the model puts in front of every row, whose logits are cut off.
    """

    def __init__(self, layer: nn.Module | None, *, num_virtual: int = 0) -> None:
        self.layer = layer
        self.num_virtual = num_virtual
        self.is_late = False  # whether calls give hidden states
        self.dtype = torch.get_default_dtype()  # precision of the logits, if so
        self._memory: list[Tensor] = []  # what `passing` works in, while nobody does: one tensor, or none

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

    @contextmanager
    def passing(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """The layer for one chunk of hidden states after the other; what it returns is good until the next call.

        On a CPU all chunks, of all predictions, share their memory: the system gives fresh memory slowly.
        """
        memory: Tensor | None = None
        with suppress(IndexError):  # popped, so that nobody else works in it
            memory = self._memory.pop()

        def apply(rows: Tensor) -> Tensor:
            nonlocal memory
            layer = self.layer
            if not isinstance(layer, nn.Linear) or not _is_just_a_product(layer, rows):
                return self(rows)
            size = len(rows) * layer.out_features
            if memory is None or memory.numel() < size or memory.dtype != rows.dtype:
                with torch.inference_mode(False):  # such memory may be written in either mode
                    memory = torch.empty(size, dtype=rows.dtype, device=rows.device)
            logits = memory[:size].view(len(rows), layer.out_features)
            if layer.bias is None:
                torch.mm(rows, layer.weight.T, out=logits)
            else:
                torch.addmm(layer.bias, rows, layer.weight.T, out=logits)
            return logits.to(self.dtype)

        try:
            yield apply
        finally:
            if memory is not None:
                self._memory[:] = [memory]

    def logits(self, output: Output) -> Tensor:
        """``(N, K, V)``."""
        rows, is_hidden = output
        return self(rows.flatten(0, 1)).view(*rows.shape[:2], -1) if is_hidden else rows

    def run(self, call: Callable[[], Any], shape: torch.Size, wanted: Tensor) -> Output:
        """Call the model with ids of a shape ``(N, W)``; its output at wanted positions ``(N, K)``."""
        keep = (lambda rows: rows[:, :0]) if self.is_late else partial(take, wanted=wanted)
        with self._watched(shape, keep) as (inputs, _):
            output = call()
        columns = shape[1] if not inputs else 0 if self.is_late else wanted.shape[1]
        logits = self._logits(output, shape, columns)
        if inputs:
            return Output(take(inputs[0], wanted), True) if self.is_late else Output(logits, False)
        return Output(take(logits, wanted), False)

    def learn(self, call: Callable[[], Any], shape: torch.Size, wanted: Tensor) -> tuple[Tensor, bool]:
        """Logits ``(N, K, V)`` of a call; and whether the output layer can be applied later, for :attr:`is_late`.

        A layer that is called more than once is forgotten, so that logits are taken from all there are.
        """
        output = None
        with self._watched(shape, partial(take, wanted=wanted)) as (inputs, outputs):
            try:
                output = call()
            except Exception:  # of a model that goes on with what the layer makes, maybe
                if not inputs:
                    raise
        if output is None or len(outputs) > 1:
            self.layer = None  # it is more than the last thing that happens
            return self.learn(call, shape, wanted)
        logits = self._logits(output, shape, wanted.shape[1] if inputs else shape[1])
        if not inputs:
            return take(logits, wanted), False
        hidden, made = take(inputs[0], wanted), outputs[-1]
        if type(self.layer) is not nn.Linear or not _is_plain(self.layer.weight):  # it may not take what is empty
            return logits, False
        if hidden.dtype != self.layer.weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
            return logits, False  # autocast is inside the model alone
        again = self.layer(hidden).to(logits)
        # To the bit; and untouched but for a cast or a move, because a bias that is added behind the layer may be 0
        # now, and trained tomorrow.
        is_untouched = made is logits or made.dtype != logits.dtype or made.device != logits.device
        return logits, is_untouched and torch.equal(again, logits)

    def _logits(self, output: Any, shape: torch.Size, columns: int) -> Tensor:
        """``(N, columns, V)`` of what the model returned for ids ``(N, W)``."""
        if isinstance(output, Mapping) and not hasattr(output, "logits"):
            output = output.get("logits", output)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if logits is None and isinstance(output, tuple):
            logits = output[0]
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
            raise NapDecodeError(f"the model must return logits (B, L, V) or an object with such .logits, not {got}")
        found, wanted = tuple(logits.shape[:2]), (shape[0], columns)
        if self.num_virtual and found == (shape[0], columns + self.num_virtual):
            return logits[:, self.num_virtual :]
        if found != wanted:
            raise NapDecodeError(
                f"the model must return logits for every position, but returned {found[1]} in {found[0]} rows where "
                f"{wanted[1]} in {wanted[0]} were due, of ids {tuple(shape)}. Wrap it into a function "
                "(input_ids, attention_mask) -> logits that cuts off what stands for no id, or adds what is left out"
            )
        return logits

    @contextmanager
    def _watched(
        self, shape: torch.Size, keep: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """While open, the layer sees only what ``keep`` leaves; yields what it was to see, and what it made."""
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        own_thread = threading.get_ident()

        def before(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            hidden = arguments[0] if arguments else None
            if threading.get_ident() != own_thread:  # a call of somebody else's
                return None
            # A tied output layer may be the input embedding itself, which is called with ids.
            if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[:2] != shape:
                return None
            inputs.append(hidden)
            return (keep(hidden), *arguments[1:])

        def after(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            if threading.get_ident() == own_thread:
                outputs.append(output)

        if self.layer is None:
            yield inputs, outputs
            return
        with _CALLING:
            # Before hooks that there are already: they see what passes the layer later.
            handles = [
                self.layer.register_forward_pre_hook(before, prepend=True),
                self.layer.register_forward_hook(after),
            ]
            try:
                yield inputs, outputs
            finally:
                for handle in handles:
                    handle.remove()


def _is_just_a_product(layer: nn.Linear, rows: Tensor) -> bool:
    """Whether calling a layer, on a CPU, is nothing but its product: no hooks, no parameters of another kind."""
    if rows.device.type != "cpu" or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if type(layer) is not nn.Linear or layer._forward_pre_hooks or layer._forward_hooks or "forward" in vars(layer):
        return False
    parameters = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    return all(_is_plain(p) and p.device.type == "cpu" and p.dtype == rows.dtype for p in parameters)


def _is_plain(parameter: Tensor) -> bool:
    """Whether it is numbers and nothing else; quantised ones are of kinds of their own."""
    return type(parameter) is nn.Parameter


def take(rows: Tensor, wanted: Tensor) -> Tensor:
    """``(N, W, H), (N, K) -> (N, K, H)``."""
    # Whole rows at a time: gathering them would look at an index for each of the H numbers.
    first = torch.arange(0, rows.shape[0] * rows.shape[1], rows.shape[1], device=rows.device)[:, None]
    flat = rows.flatten(0, 1).index_select(0, (wanted.to(rows.device) + first).flatten())
    return flat.view(*wanted.shape, rows.shape[2])
