"""A model without its output layer, through torch.compile."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from nap_decode.base.errors import NapDecodeError
from nap_decode.model.call import ModelCall, Options
from nap_decode.model.denoiser import Denoiser
from nap_decode.model.head import take
from nap_decode.parts.decoder import Decoder
from nap_decode.speed.graphs import CudaRecorder, Graphs

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function, **options: Any) -> Function:
    """A function through ``torch.compile``, whose failures are told as ours when it is called."""
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


def compiled_model(denoiser: Denoiser, **options: Any) -> Denoiser:
    """The same model with everything before its output layer compiled by ``torch.compile``.

    It is compiled when it is called: for the first shape ``(N, W)`` that it is called with, and at the first other one
    once for all.  Rows with padding and without are compiled apart, and so is a single row.  The result is that of the
    model as it is: weights that are trained are seen, and if modules are exchanged, such as for adapters, the next
    :meth:`Denoiser.refresh` compiles anew.

    Args:
        denoiser: the model.
        options: those of ``torch.compile``, such as ``mode="max-autotune"`` or ``fullgraph=True``.

    Raises:
        NapDecodeError: the output layer cannot be told from the rest of the model.
    """
    return denoiser.replace(through=partial(_compiled_call, compiler_options=options))


@torch.no_grad()
def _compiled_call(call: ModelCall, tokens: Tensor | None, compiler_options: dict[str, Any]) -> ModelCall:
    """See :meth:`Denoiser.replace`."""
    if tokens is None:
        raise NapDecodeError(f"{call.name} cannot be compiled here; compile it before, with torch.compile")
    if call.head.is_late and isinstance(call.head.layer, nn.Linear):
        body = _CompiledBody(call.module, call.head.layer, **compiler_options)
        options, wanted = call.whole(tokens), torch.zeros_like(tokens[:, :1])
        if torch.equal(take(body.plain(tokens, options), wanted), call(tokens, options, wanted).rows):
            other = copy.copy(call)
            other.body = body
            return other
    raise NapDecodeError(
        f"{call.name} cannot be compiled here, because its output layer cannot be told from the rest: it must be a "
        "torch.nn.Linear that get_output_embeddings() names, whose output is returned as it is, in a model that is "
        "neither compiled nor split over devices already. Use it as it is"
    )


class _CompiledBody:
    """Everything before a model's output layer, compiled: for the first shape of its input, and for all others.

    It is a copy of the modules on the way to the output layer, with something in the place of that layer that lets
    hidden states through; all others, and all parameters, are the model's own.  A hook would not do: compiled code
    may leave out hooks that are registered later, and keep those that are removed.
    """

    def __init__(self, module: nn.Module, head: nn.Linear, **options: Any) -> None:
        self.module = _without(module, head)
        self._first_shape: torch.Size | None = None
        # Kernels for one shape are the faster ones, but a new shape must not cost a compilation each time.
        self._first, self._other = (compiled(self.plain, **{"dynamic": d} | options) for d in (False, True))

    def plain(self, tokens: Tensor, options: Options) -> Tensor:
        """Hidden states of ids, ``(N, W) -> (N, W, H)``, not compiled."""
        output = self.module(input_ids=tokens, **options)
        hidden: Tensor
        hidden = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else output.logits
        return hidden

    def __call__(self, tokens: Tensor, options: Options) -> Tensor:
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


def prepare(denoiser: Denoiser, decoder: Decoder, mode: bool | str) -> tuple[Denoiser, Decoder, Graphs | None]:
    """What runs in place of a model and a decoder, and what captures their steps; ``mode`` is ``compile=``."""
    if mode not in (False, True, "kernels", "graphs") or not isinstance(mode, bool | str):
        raise NapDecodeError(f'compile must be False, True, "kernels" or "graphs", but is {mode!r}')
    graphs = None
    if mode == "graphs" or (mode is True and denoiser.device.type == "cuda"):
        _check_captured(denoiser, decoder)
        graphs = Graphs(CudaRecorder(denoiser.device))
    if mode in (True, "kernels"):
        committer = decoder.committer.compiled(partial(compiled, dynamic=True))
        denoiser, decoder = compiled_model(denoiser), Decoder(decoder.scheduler, committer, decoder.close_on)
    return denoiser, decoder, graphs


def _check_captured(denoiser: Denoiser, decoder: Decoder) -> None:
    reason = None
    if decoder.needs.memory or decoder.needs.committed:
        reason = f"{type(decoder.committer).__name__} keeps things from step to step, which captured steps cannot"
    elif denoiser.reuse is not None:
        reason = f"{type(denoiser.reuse).__name__} chooses positions at each pass, which captured steps cannot"
    elif denoiser.device.type != "cuda":
        reason = f'compile="graphs" needs a model on a CUDA device, but it is on {denoiser.device}'
    elif denoiser.call.is_split:
        reason = 'compile="graphs" is not for a model that is split over devices'
    elif not denoiser.hides_padding:
        reason = 'compile="graphs" is not for a model that does not hide padding'
    if reason is not None:
        raise NapDecodeError(f'{reason}; use compile="kernels"')
