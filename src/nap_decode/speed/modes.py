"""What ``Sampler(compile=)`` asks for."""

from __future__ import annotations

from functools import partial

from nap_decode.base.errors import NapDecodeError
from nap_decode.model.denoiser import Denoiser
from nap_decode.parts.decoder import Decoder
from nap_decode.speed.compile import compiled, compiled_model
from nap_decode.speed.graphs import CudaRecorder, Graphs


def prepare(denoiser: Denoiser, decoder: Decoder, mode: bool | str) -> tuple[Denoiser, Decoder, Graphs | None]:
    """A model and a decoder with their kernels compiled, and what captures their steps, as a mode says.

    Raises:
        NapDecodeError: an unknown mode, or one that they do not go with.
    """
    device = denoiser.device
    modes: dict[bool | str, tuple[bool, bool]] = {
        False: (False, False),
        "kernels": (True, False),
        "graphs": (False, True),
        True: (True, device.type == "cuda"),
    }
    if not isinstance(mode, bool | str) or mode not in modes:
        raise NapDecodeError(f'compile must be False, True, "kernels" or "graphs", but is {mode!r}')
    kernels, graphs = modes[mode]
    if graphs:
        _check_captured(denoiser, decoder)
    if kernels:
        committer = decoder.committer.compiled(partial(compiled, dynamic=True))
        denoiser, decoder = compiled_model(denoiser), Decoder(decoder.scheduler, committer, decoder.close_on)
    return denoiser, decoder, Graphs(CudaRecorder(device)) if graphs else None


def _check_captured(denoiser: Denoiser, decoder: Decoder) -> None:
    instead = 'which captured steps cannot; use compile="kernels"'
    if decoder.needs.memory or decoder.needs.committed:
        raise NapDecodeError(f"{type(decoder.committer).__name__} keeps things from step to step, {instead}")
    if denoiser.reuse is not None:
        raise NapDecodeError(f"{type(denoiser.reuse).__name__} chooses positions at each pass, {instead}")
    if denoiser.device.type != "cuda":
        raise NapDecodeError(
            f'compile="graphs" needs a model on a CUDA device, but it is on {denoiser.device}; use compile="kernels", '
            "or leave it out"
        )
    if denoiser.is_split or not denoiser.hides_padding:
        reason = "is split over devices" if denoiser.is_split else "does not hide padding"
        raise NapDecodeError(f'compile="graphs" is not for a model that {reason}; use compile="kernels"')
