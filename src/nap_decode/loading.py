"""Loading a checkpoint, of whichever kind it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from threading import Lock, get_ident
from typing import Any

from nap_decode.errors import NapDecodeError


def load_checkpoint(
    path: str | PathLike[str],
    *,
    device: str = "cpu",
    dtype: str = "auto",
    bidirectional: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A model, in evaluation mode, and its tokenizer.

    Args:
        path: directory or hub name of a transformers checkpoint.
        device: where the model goes, for example ``"cuda"``.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"`` for that of the checkpoint.
        bidirectional: set ``is_causal = False`` in the config of a decoder.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        NapDecodeError: the checkpoint lacks weights of the model, or has them in other shapes.

    Example:
        >>> from nap_decode import demo
        >>> model, tokenizer = load_checkpoint(demo.CHECKPOINT)
        >>> model.num_parameters()
        855680
    """
    import transformers

    trust = {"trust_remote_code": trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(path, **trust)
    if bidirectional:
        config.is_causal = False
    # What releases before 4.56 call torch_dtype, in configs as in from_pretrained.
    options = {"dtype" if hasattr(transformers.PretrainedConfig(), "dtype") else "torch_dtype": dtype}
    model = AllWeights(auto_class(config)).from_pretrained(path, config=config, **options, **trust)
    return model.to(device).eval(), transformers.AutoTokenizer.from_pretrained(path, **trust)


def auto_class(config: Any) -> Any:
    """The transformers class that loads a checkpoint with this config."""
    import transformers

    names, remote = config.architectures or [], getattr(config, "auto_map", None) or {}
    if any(name.endswith("ForMaskedLM") for name in names):
        return transformers.AutoModelForMaskedLM
    if "AutoModel" in remote and "AutoModelForCausalLM" not in remote:
        return transformers.AutoModel
    return transformers.AutoModelForCausalLM


class AllWeights:
    """A transformers class whose ``from_pretrained`` raises where its own fills a model up with random weights.

    Args:
        loader: the class.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def from_pretrained(self, path: str | PathLike[str], **options: Any) -> Any:
        """The model.

        Raises:
            NapDecodeError: parameters that the checkpoint does not have, or has in other shapes.  Buffers may be
                missing: these are computed, not learnt.
        """
        with _reports() as reports:
            try:
                model = self.loader.from_pretrained(path, **options)
            except RuntimeError:  # what transformers raises about shapes, not always with their names, and about more
                self.loader.from_pretrained(path, **options, ignore_mismatched_sizes=True)
                found = [key for _, info in reports for key in info["mismatched_keys"]]
                names = sorted(key if isinstance(key, str) else key[0] for key in found)  # some releases add the shapes
                if not names:
                    raise
                raise NapDecodeError(
                    f"{len(names)} weights of the checkpoint {path} have other shapes than its config says: "
                    f"{_some(names)}; take config and weights of one model"
                ) from None
        for whole, info in reports:
            missing = sorted(set(info["missing_keys"]).difference(name for name, _ in whole.named_buffers()))
            if missing:
                unexpected = sorted(info["unexpected_keys"])
                hint = f", which has {len(unexpected)} others, such as {unexpected[0]}" if unexpected else ""
                raise NapDecodeError(
                    f"{len(missing)} weights of {type(whole).__name__} are not in the checkpoint {path}{hint}: "
                    f"{_some(missing)}. They would be random. Is it complete, "
                    "and of this architecture? To decode such a model all the same, load it with transformers and make "
                    "a sampler of it"
                )
        return model


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if names[3:] else "")


_one_at_a_time = Lock()


@contextmanager
def _reports() -> Iterator[list[tuple[Any, Any]]]:
    """The models that this thread loads meanwhile, each with what transformers says about its weights.

    It says so to whoever asks ``from_pretrained`` for it, but the published code of a model (Dream's) may have a
    ``from_pretrained`` of its own, which cannot be asked; the one that all of them call in the end is asked instead.
    """
    import transformers

    base, thread = transformers.PreTrainedModel, get_ident()
    reports: list[tuple[Any, Any]] = []

    def reporting(cls: Any, *args: Any, **options: Any) -> Any:
        if get_ident() != thread or options.get("output_loading_info"):
            return plain.__func__(cls, *args, **options)
        model, info = plain.__func__(cls, *args, **options, output_loading_info=True)
        reports.append((model, info))
        return model

    with _one_at_a_time:
        plain = base.__dict__["from_pretrained"]
        base.from_pretrained = classmethod(reporting)
        try:
            yield reports
        finally:
            base.from_pretrained = plain
