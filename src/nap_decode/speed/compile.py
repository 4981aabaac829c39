"""A model without its output layer, through torch.compile."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from nap_decode.base.errors import NapDecodeError

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function, **options: Any) -> Function:
    """A function through ``torch.compile``, whose failures are told as ours.

    Args:
        function: the function.
        options: those of ``torch.compile``.

    Raises:
        NapDecodeError: when it is called: the installed torch does not compile it.
    """
    fast = torch.compile(function, **options)

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        try:
            return fast(*args, **named)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise NapDecodeError(
                f"torch {torch.__version__} does not compile this ({reason}); another torch, or another transformers, "
                "may. Leave compile= out to decode without"
            ) from error

    return cast(Function, call)


class CompiledBody:
    """Everything before a model's output layer, compiled: for the first shape of its input, and for all others.

    It is a copy of the modules on the way to the output layer, with something in the place of that layer that lets
    hidden states through; all others, and all parameters, are the model's own.  A hook would not do: compiled code
    may leave out hooks that are registered later, and keep those that are removed.

    Args:
        module: the model.
        head: its output layer.
        options: those of ``torch.compile``.
    """

    def __init__(self, module: nn.Module, head: nn.Linear, **options: Any) -> None:
        self.module = _without(module, head)
        self._first_shape: torch.Size | None = None
        # Kernels for one shape are the faster ones, but a new shape must not cost a compilation each time.
        self._first, self._other = (compiled(self.plain, **{"dynamic": d} | options) for d in (False, True))

    def plain(self, tokens: Tensor, options: dict[str, Any]) -> Tensor:
        """``(N, W) -> (N, W, H)``, not compiled.

        Args:
            tokens: ``(N, W)`` int64.
            options: arguments of the model besides.
        """
        output = self.module(input_ids=tokens, **options)
        hidden: Tensor
        hidden = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else output.logits
        return hidden

    def __call__(self, tokens: Tensor, options: dict[str, Any]) -> Tensor:
        """The same, compiled."""
        if self._first_shape is None:
            self._first_shape = tokens.shape
        return (self._first if tokens.shape == self._first_shape else self._other)(tokens, options)


class _Through(nn.Linear):
    """In the place of an output layer; code that asks for the weights finds them."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


def _without(module: nn.Module, head: nn.Linear) -> nn.Module:
    """The module itself if the output layer is not in it, else a copy of it without."""
    if module is head:
        through = copy.copy(head)
        through.__class__ = _Through
        return through
    parts = {name: part and _without(part, head) for name, part in module._modules.items()}
    if all(part is module._modules[name] for name, part in parts.items()):
        return module
    other = copy.copy(module)
    other._modules = parts
    return other
