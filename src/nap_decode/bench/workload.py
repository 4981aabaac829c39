"""Workloads of a benchmark, and models of random weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nap_decode.base.errors import NapDecodeError, check_integer, check_name
from nap_decode.canvas import Block, Canvas, CanvasTemplate
from nap_decode.checkpoints import precision_argument
from nap_decode.model.denoiser import Denoiser
from nap_decode.model.families import ModelFamily
from nap_decode.parts.committer import MicroConfidenceCommitter
from nap_decode.parts.decoder import Decoder
from nap_decode.parts.scheduler import Left, MacroParallelScheduler, Scheduler, SemiAutoregressiveScheduler

SCHEDULERS: dict[str, type[Scheduler]] = {
    "macro-parallel": MacroParallelScheduler,
    "semi-autoregressive": SemiAutoregressiveScheduler,
}
"""Schedulers by the names they have on the command line."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a bidirectional Llama with random weights.

    Args:
        hidden: width.
        layers: layers of the body.
        heads: attention heads.
        intermediate: width of the feed-forward layers.
        vocab: ids, the last of which is the mask.
        kv_heads: heads of keys and values; as many as ``heads`` if left out.
        block_size: of block-causal attention; all see all if left out.

    Example:
        >>> Shape.parse("hidden=64,layers=2,heads=2,intermediate=128,vocab=1000").hidden
        64
        >>> Shape.parse("llada-8b").vocab
        126464
    """

    hidden: int = 512
    layers: int = 12
    heads: int = 8
    intermediate: int = 1408
    vocab: int = 32000
    kv_heads: int | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None:
                check_integer(name, value, 16 if name == "vocab" else 1)
        kv_heads = self.kv_heads or self.heads
        if self.hidden % (2 * self.heads) or self.heads % kv_heads:
            raise NapDecodeError(
                f"hidden={self.hidden} must be an even multiple of heads={self.heads}, and heads a multiple of "
                f"kv_heads={kv_heads}"
            )

    @classmethod
    def parse(cls, text: str) -> Shape:
        """A preset's name, or ``name=number`` pairs with commas between; the rest is as in ``"small"``."""
        if "=" not in text:
            check_name("shape", text, SHAPES)
            return SHAPES[text]
        sizes: dict[str, int] = {}
        for pair in text.split(","):
            name, _, value = pair.partition("=")
            name = name.strip()
            check_name("size of a shape", name, (f.name for f in dataclasses.fields(cls)))
            if not value.strip().isdecimal():
                raise NapDecodeError(f"{name} must be a whole number, but is {value!r}")
            sizes[name] = int(value)
        return cls(**sizes)

    @property
    def family(self) -> ModelFamily | None:
        """How a block-causal model is told of its blocks; None if there are none."""
        if self.block_size is None:
            return None
        return ModelFamily(name="block-causal Llama", attention="additive", block_size=self.block_size)

    def build(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0) -> Any:
        """The model, made where it shall live and in its precision."""
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads or self.heads,
            max_position_embeddings=2**15,
            # Weights of trained size: with the usual 0.02 attention is so even that all masked positions look the same.
            initializer_range=1.5 * self.hidden**-0.5,
            is_causal=False,
            mask_token_id=self.vocab - 1,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
        device = torch.device(device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
            torch.manual_seed(seed)
            return transformers.AutoModelForCausalLM.from_config(config, **{precision_argument(): dtype}).eval()


SHAPES = {
    "tiny": Shape(hidden=64, layers=2, heads=2, intermediate=128, vocab=8192),
    "small": Shape(),
    "llada-8b": Shape(hidden=4096, layers=32, heads=32, intermediate=12288, vocab=126464),
    "dream-7b": Shape(hidden=3584, layers=28, heads=28, kv_heads=4, intermediate=18944, vocab=152064),
    "sdar-8b": Shape(hidden=4096, layers=36, heads=32, kv_heads=8, intermediate=12288, vocab=151936, block_size=32),
}
"""Shapes that can be asked for by name: 71 million parameters (38 in the body), and three published models."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is decoded, and in how many steps.

    Args:
        prompt_length: random tokens before the canvas, in each row.
        new_tokens: slots to decode, in each row.
        steps: steps of the fixed schedule.
        blocks: blocks of (nearly) equal length that the slots are cut into.
        batch_size: rows.
        ragged: prompts from half of ``prompt_length`` up to all of it.
        scheduler: ``"macro-parallel"``, all blocks together, or ``"semi-autoregressive"``, one after the other.
        temperature: of the draw; 0 takes the most likely token.
        seed: of prompts and draws.

    Example:
        >>> Workload(new_tokens=64, steps=100)
        Traceback (most recent call last):
        ...
        nap_decode.base.errors.NapDecodeError: steps=100 is more than the 64 tokens to decode in row 0, ...
    """

    prompt_length: int = 64
    new_tokens: int = 256
    steps: int = 64
    blocks: int = 1
    batch_size: int = 1
    ragged: bool = False
    scheduler: Literal["macro-parallel", "semi-autoregressive"] = "macro-parallel"
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_length", "new_tokens", "steps", "blocks", "batch_size"):
            check_integer(name, getattr(self, name), 1)
        check_integer("seed", self.seed, 0)
        check_name("scheduler of a benchmark", self.scheduler, SCHEDULERS)
        if self.blocks > self.new_tokens:
            raise NapDecodeError(f"{self.new_tokens} new tokens cannot be cut into {self.blocks} blocks; ask for fewer")
        self.quotas()  # whose parts check the rest

    def __str__(self) -> str:
        rows = f"{self.batch_size} row{'s' * (self.batch_size > 1)}{', ragged' * self.ragged}"
        slots = f"prompt {self.prompt_length}, {self.new_tokens} new tokens"
        blocks = f" in {self.blocks} blocks ({self.scheduler})" if self.blocks > 1 else ""
        return f"{rows}, {slots}{blocks}, {self.steps} steps, temperature {self.temperature:g}"

    def decoder(self) -> Decoder:
        """How to decode."""
        scheduler = SCHEDULERS[self.scheduler](steps=self.steps)
        return Decoder(scheduler, MicroConfidenceCommitter(temperature=self.temperature))

    def lengths(self) -> Tensor:
        """``(B, M)`` int64, slots of each block."""
        base, rest = divmod(self.new_tokens, self.blocks)
        return torch.tensor([[base + (j < rest) for j in range(self.blocks)]]).expand(self.batch_size, -1)

    def quotas(self) -> Tensor:
        """``(S, B, M)`` int64 on the CPU: tokens that each block commits at each step."""
        scheduler, quotas = self.decoder().scheduler, []
        plan = scheduler.plan(self.lengths())
        left = Left.all(plan.lengths)
        for step in range(self.steps):
            quota, left = scheduler.next(plan, replace(left, step=torch.full_like(left.step, step)))
            quotas.append(quota)
        return torch.stack(quotas)

    def widths(self) -> list[int]:
        """For each step the slots of a row that there is to choose among: masked ones of blocks that commit any."""
        quotas = self.quotas()
        remaining = self.lengths() - quotas.cumsum(0) + quotas  # (S, B, M) before each step
        return [int(width) for width in (remaining * (quotas > 0)).sum(2).amax(1)]

    def canvas(self, denoiser: Denoiser) -> Canvas:
        """The rows to decode, with prompts of random ids."""
        size = denoiser.call.num_embeddings or 0
        banned = denoiser.banned(size, torch.device("cpu")).tolist()
        ids = np.setdiff1d(np.arange(size), [*banned, denoiser.pad_token_id, *denoiser.end_token_ids])
        if not len(ids):
            raise NapDecodeError("the model does not say how many token ids it has, so there are none for a prompt")
        draw = np.random.default_rng(self.seed)
        shortest = self.prompt_length - self.ragged * (self.prompt_length // 2)
        lengths = np.linspace(shortest, self.prompt_length, self.batch_size).round().astype(int)
        blocks = tuple(Block(f"block {j + 1}", int(length)) for j, length in enumerate(self.lengths()[0]))
        return Canvas.from_prompts(
            [draw.choice(ids, length).tolist() for length in lengths],
            CanvasTemplate(blocks),
            mask_token_id=denoiser.mask_token_id,
            pad_token_id=denoiser.pad_token_id,
            device=denoiser.device,
        )
