"""Loading a checkpoint, of whichever kind it is."""

from __future__ import annotations

from os import PathLike
from typing import Any


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
    renamed = tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56)
    options = {"dtype" if renamed else "torch_dtype": dtype}
    model = auto_class(config).from_pretrained(path, config=config, **options, **trust)
    return model.to(device).eval(), transformers.AutoTokenizer.from_pretrained(path, **trust)


def auto_class(config: Any) -> Any:
    """The transformers class that loads a checkpoint with this config."""
    import transformers

    names, remote = config.architectures or [], getattr(config, "auto_map", None) or {}
    if any(name.endswith("ForMaskedLM") for name in names):
        return transformers.AutoModelForMaskedLM
    # A class of the checkpoint's own may be called anything; it says with what to load it.
    for name in ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel"):
        if name in remote:
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM
