"""Other people's code: torch's wrappers, transformers, PEFT, accelerate and what comes with checkpoints.

Everything that is known of it by name is known here; the rest of the package asks these functions.  Each looks for
what code can do, not for its version.  What is found here is still tried out, see :mod:`nap_decode.model.probe`.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# ---------------------------------------------------------------------------------------------- signatures


def parameters_of(function: Any) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of a function or a module's forward, by name; None if its code does not tell."""
    if isinstance(function, nn.Module):
        function = function.forward
    schema = getattr(function, "schema", None)  # TorchScript
    if schema is not None and hasattr(schema, "arguments"):
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return {a.name: inspect.Parameter(a.name, kind) for a in schema.arguments if a.name != "self"}
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def mask_argument(function: Any) -> str | int | None:
    """Where a function, or a module's forward, takes its mask besides the ids: by name, or second; None for nowhere.

    What may be left out is no mask, unless it is called one.
    """
    parameters = parameters_of(function)
    if parameters is None or "attention_mask" in parameters:
        return 1 if parameters is None else "attention_mask"
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [parameter for parameter in parameters.values() if parameter.kind in positional]
    if len(named) > 1:
        return 1 if named[1].default is inspect.Parameter.empty or "mask" in named[1].name else None
    return 1 if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters.values()) else None


def passes_on(module: Any) -> bool:
    """Whether a module's forward names none of its arguments, or cannot be read: another says what it takes."""
    parameters = parameters_of(module)
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameters is None or all(parameter.kind in variable for parameter in parameters.values())


def is_readable(module: Any) -> bool:
    """Whether a module says what it takes, itself or by the one module that it passes everything on to."""
    if isinstance(module, torch.jit.ScriptModule) or not passes_on(module):
        return True
    children = list(module.children())
    return len(children) == 1 and getattr(children[0], "config", None) is None and is_readable(children[0])


def takes_ids_by_name(module: Any) -> bool:
    """Whether a module is called as transformers models are."""
    return isinstance(module, nn.Module) and "input_ids" in (parameters_of(module) or {})


def unwrapped(model: Any) -> list[Any]:
    """A model, the wrappers in it, and last the module that facts come from.

    A wrapper passes on what it is called with (``torch.compile``, DataParallel, DDP, FSDP, accelerate's, PEFT's
    without a task, ``functools.partial``, a module's ``forward``), or it names arguments and shares config and output
    layer with what it wraps (PEFT's with a task).
    """
    found = [model]
    inner: Any = None
    if isinstance(model, functools.partial) and not model.args:
        inner = model.func
    elif inspect.ismethod(model) and model.__name__ in ("forward", "__call__"):
        inner = model.__self__
    if inner is not None and takes_ids_by_name((chain := unwrapped(inner))[-1]):
        found += chain
    elif isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule):
        inside = [chain for child in model.children() if takes_ids_by_name((chain := unwrapped(child))[-1])]
        inside = [chain for chain in inside if _wraps(model, chain[-1])]
        if len(inside) == 1:
            found += inside[0]
    return found


def _wraps(outer: nn.Module, inner: nn.Module) -> bool:
    config = getattr(outer, "config", None)
    same_config = config is getattr(inner, "config", None)
    if passes_on(outer):
        return config is None or same_config
    layer, own = part_of(inner, "get_output_embeddings"), part_of(outer, "get_output_embeddings")
    kinds = [parameter.kind for parameter in (parameters_of(outer) or {}).values()]
    passes_layer = own is layer or (own is None and inspect.Parameter.VAR_KEYWORD in kinds)
    return takes_ids_by_name(outer) and same_config and layer is not None and passes_layer


def innermost(model: Any) -> Any:
    """The module that facts about a model come from, see :func:`unwrapped`; a function itself."""
    return unwrapped(model)[-1]


def wrappers_of_others(model: Any) -> list[Any]:
    """What is around a module and may change what it says: wrappers of nobody's but the user's."""
    known = ("torch", "peft", "accelerate")
    return [one for one in unwrapped(model)[:-1] if type(one).__module__.split(".")[0] not in known]


def state_of(model: nn.Module | None, layer: nn.Module | None) -> tuple[object, ...]:
    """Changes when modules of a model are exchanged, or what makes its output of them: forwards, hooks, autocast.

    Of hooks those count that see what the output layer ``layer`` makes, and may change it.
    """
    parts = dict(model.named_modules()) if model is not None else {}
    path = next((name for name, part in parts.items() if part is layer), "").split(".")
    above = [parts[".".join(path[:depth])] for depth in range(len(path))] if parts else []
    forwards = [vars(part).get("forward") for part in parts.values()]
    return (
        hash(tuple((id(part), type(part)) for part in parts.values())),
        tuple(number for part in above for number in part._forward_hooks),  # numbers are never given again
        tuple(_reference(one) for one in forwards if one is not None and not getattr(one, "only_looks", False)),
        tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")),
    )


def _reference(value: Any) -> object:
    """Equal to another one of the same object, while that is there."""
    try:
        return weakref.ref(value)
    except TypeError:
        return id(value)


def is_compiled(chain: list[Any]) -> bool:
    """Whether torch compiled any of these as a whole: such code may not run hooks that come later, or keep them."""
    return any(hasattr(one, "_orig_mod") or getattr(one, "_compiled_call_impl", None) is not None for one in chain)


def part_of(model: Any, getter: str) -> nn.Module | None:
    """What a model names by one of transformers' getters, such as ``get_output_embeddings``; None if it does not."""
    try:
        part = getattr(model, getter, lambda: None)()
    except NotImplementedError:  # so transformers' own say that they do not know
        return None
    return part if isinstance(part, nn.Module) else None


# ---------------------------------------------------------------------------------------------- configs


def text_config(module: Any) -> Any:
    """The config of a module that is called as transformers models are, or its part about text; None for others."""
    config = getattr(module, "config", None) if takes_ids_by_name(module) else None
    part: Any = getattr(config, "get_text_config", lambda: config)()
    return part


def attention_window(config: Any) -> int | None:
    """Positions that a layer with a window looks at, 1 if the config only says that there are some; None for none."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and all(kind == "full_attention" for kind in kinds):
        return None
    every = getattr(config, "global_attn_every_n_layers", None) or 1  # ModernBERT before transformers 5
    uses = getattr(config, "use_sliding_window", True)  # Qwen's
    size = getattr(config, "sliding_window", None) if uses else None
    if kinds is None and every <= 1:
        return size
    return size or getattr(config, "local_attention", None) or 1


def first_position(module: nn.Module | None) -> int:
    """Where a model starts to count: RoBERTa-like ones, which derive positions from the ids, not at 0."""
    for name, part in module.named_modules() if module is not None else ():
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding):
            return part.padding_idx + 1 if part.padding_idx is not None else 0
    return 0


def position_limit(module: nn.Module | None, config: Any, embeddings: nn.Module | None) -> tuple[int | None, bool]:
    """Positions that a model has or was trained with, None if nothing tells; and whether they are a table that ends.

    Rotary positions go on behind the number that a config names, with scaling as far as that says.
    """
    names = ("max_position_embeddings", "max_sequence_length", "model_length")
    limits = [value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0]
    if not limits:
        return None, False
    limit = limits[0]
    for part in module.modules() if module is not None else ():
        if isinstance(part, nn.Embedding) and part is not embeddings and part.num_embeddings == limit:
            return limit - first_position(module), True
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for rope in (scaling, *scaling.values()):  # those of each kind of layer may be apart
        if isinstance(rope, Mapping) and rope.get("factor"):
            limit = max(limit, int(rope["factor"] * (rope.get("original_max_position_embeddings") or limits[0])))
    return limit, False


# transformers' own, which do nothing with a 2-D attention mask but make a 4-D one of it.
# fmt: off
_EXPANDS_MASKS = frozenset({
    "bert", "camembert", "distilbert", "electra", "eurobert", "roberta", "xlm-roberta",
    "gemma", "granite", "llama", "olmo2", "qwen2", "qwen3",
})
# fmt: on


def takes_expanded_mask(module: nn.Module, config: Any) -> bool:
    """Whether to pass the 4-D mask that transformers itself makes of a 2-D one after a wait for the device."""
    defined_in = vars(sys.modules[type(module).__module__])
    return (
        getattr(config, "model_type", None) in _EXPANDS_MASKS
        and type(module).__module__.startswith("transformers.")
        and ("create_bidirectional_mask" in defined_in or "create_causal_mask" in defined_in)
        and getattr(config, "_attn_implementation", None) == "sdpa"
        and attention_window(config) is None
    )


def sizes_of(config: Any) -> tuple[float, float] | None:
    """Width of all layers' heads together, and share of experts that a token asks; None if not all is said."""

    def said(*names: str) -> Any:
        return next((value for name in names if (value := getattr(config, name, None))), None)

    layers, hidden = said("num_hidden_layers", "n_layers"), said("hidden_size", "d_model")
    heads, experts = said("num_attention_heads", "n_heads"), said("num_experts", "num_local_experts") or 1
    if not (layers and hidden and heads):
        return None
    width = heads * (said("head_dim") or hidden // heads)
    return layers * width, min(said("num_experts_per_tok") or experts, experts) / experts


# ---------------------------------------------------------------------------------------------- wrappers


def execution_device(module: nn.Module) -> torch.device | None:
    """Where a module computes whose weights accelerate loads when they are needed; None if nothing tells."""
    hook = getattr(module, "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


def virtual_tokens(chain: list[Any]) -> int:
    """Positions that PEFT's prompt tuning puts in front of every row; 0 for none."""
    for one in chain:
        config: Any = getattr(one, "active_peft_config", None) if hasattr(one, "peft_config") else None
        if getattr(config, "is_prompt_learning", False):
            return int(config.num_virtual_tokens)
    return 0
