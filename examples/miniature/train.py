"""Train one model of the study.

    python -m examples.miniature.train examples/miniature/configs/paths.yaml --seed 0 --output runs/paths-0

Everything is determined by the configuration and ``--seed``: step s draws its batch from the stream (seed, s), so an
interrupted run that is started again continues after its last saved step (``training_state.pt`` in the output
directory, removed at the end) as if nothing had happened.  It takes minutes on one CPU core; on a processor with matrix
units for bfloat16, ``--precision bfloat16 --compile`` is the faster way.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import yaml
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from examples.miniature.data import HEADERS, LAYOUTS, PROMPT_LENGTH, TASKS, Task, make_batch

STATE_FILE = "training_state.pt"
LOG_FILE = "training_log.json"
SAVE_EVERY = 100
WARMUP = 50


@dataclass(frozen=True)
class Stage:
    """Some steps with one schedule: warm-up, then cosine.

    Args:
        steps: of the stage.
        peak_learning_rate: of Muon after the warm-up; that of AdamW is a tenth of it.
        neutral: share of problems thinned out with neutral elements, see :meth:`~examples.miniature.data.Task.sample`.
        slips: share of rows in which a path goes wrong, see :func:`~examples.miniature.data.make_batch`.
        cut: share of batches that end before the canvas does, see there, too.
    """

    steps: int
    peak_learning_rate: float
    neutral: float = 0.0
    slips: float = 0.0
    cut: float = 0.0

    def learning_rate(self, step: int) -> float:
        """At a step of the stage."""
        return (
            self.peak_learning_rate * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        )


@dataclass(frozen=True)
class Config:
    """One model: its problems, how their solutions are written, its noise, its training.

    Args:
        name: of the model; by default that of the file.
        task: see :data:`~examples.miniature.data.TASKS`.
        layout: see :data:`~examples.miniature.data.LAYOUTS`.
        noise: ``"uniform"`` or ``"structured"``.
        max_rate: of the structured noise.
        batch: rows of a batch.
        stages: of the training.
        hidden_size: of the model, as are the following.
        num_layers: of the model.
        num_heads: of the model.
        intermediate_size: of the model.
    """

    name: str
    task: str
    layout: str
    noise: str
    max_rate: float
    batch: int
    stages: tuple[Stage, ...]
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 384

    @classmethod
    def read(cls, file: Path) -> Config:
        """From a YAML file.

        Raises:
            ValueError: an option that is unknown or missing, or the name of something that there is not.
        """
        values: dict[str, Any] = {"name": file.stem} | yaml.safe_load(file.read_text())
        known = {field.name: field for field in dataclasses.fields(cls)}
        missing = [n for n, field in known.items() if field.default is dataclasses.MISSING and n not in values]
        unknown = [n for n in values if n not in known]
        if missing or unknown:
            raise ValueError(f"{file}: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}")
        config = cls(**values | {"stages": tuple(Stage(**stage) for stage in values["stages"])})
        for name, value, choices in (("task", config.task, TASKS), ("layout", config.layout, LAYOUTS)):
            if value not in choices:
                raise ValueError(f"{file}: {name} must be one of {', '.join(choices)}, got {value!r}")
        config.draw_batch(seed=0, step=0)  # complains of what does not go together
        return config

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def length(self) -> int:
        """Tokens of a problem and the whole canvas."""
        return PROMPT_LENGTH + len(LAYOUTS[self.layout].template.encode(TASKS[self.task].make_tokenizer(), 0)[0])

    def stage(self, step: int) -> tuple[Stage, int]:
        """The stage of a step, and the step's number in it."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        raise ValueError(f"step {step} is past the last stage")

    def draw_batch(self, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, noised tokens and where the loss counts, each ``(batch, L)``."""
        stage = self.stage(step)[0]
        batch = make_batch(
            np.random.default_rng([seed, step]),
            TASKS[self.task],
            LAYOUTS[self.layout],
            self.batch,
            noise=self.noise,
            max_rate=self.max_rate,
            neutral=stage.neutral,
            slips=stage.slips,
            cut=stage.cut,
        )
        return torch.from_numpy(batch.tokens), torch.from_numpy(batch.noised), torch.from_numpy(batch.learnt)

    def make_model(self) -> LlamaForCausalLM:
        """A Llama that attends both ways; position n predicts token n."""
        ids = TASKS[self.task].ids
        config = LlamaConfig(
            vocab_size=len(ids) + 2,  # two rows more than the tokenizer has, as in released checkpoints
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=256,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            tie_word_embeddings=True,
            pad_token_id=ids["<pad>"],
            bos_token_id=ids["<bos>"],
            eos_token_id=ids["<eos>"],
            mask_token_id=ids["<mask>"],
            is_causal=False,
        )
        return LlamaForCausalLM(config)


def save_tokenizer(task: Task, output: Path) -> None:
    """So that transformers 4 and 5 can load it: they know other names."""
    task.make_tokenizer().save_pretrained(output)
    file = output / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = config.pop("extra_special_tokens", HEADERS)
    file.write_text(json.dumps(config, indent=2) + "\n")


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms.

    With AdamW alone, models stay on a plateau for hundreds of steps, some longer than others, and what they know at
    the end is a matter of luck: after 600 steps, half of the masked states right against nine tenths with Muon.
    """
    inside = {name: p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name}
    others = [p for name, p in model.named_parameters() if name not in inside]
    return [
        torch.optim.Muon(inside.values(), lr=0.0, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def train(
    config: Config,
    seed: int,
    output: Path,
    *,
    device: str = "cpu",
    precision: str = "float32",
    compiles: bool = False,
) -> None:
    """Train a model and write it to a directory, with its tokenizer and a log; does nothing if it is there.

    Args:
        config: what to train.
        seed: of the initial weights and of all batches; below 1000, held-out problems use larger ones.
        output: the directory.
        device: for torch.
        precision: of matrix products, ``"float32"`` or ``"bfloat16"``; the weights are in float32.
        compiles: use torch.compile, which needs a C++ compiler.
    """
    if (output / LOG_FILE).exists():
        return
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = config.make_model().to(device).train()
    model.set_attn_implementation("eager")  # for 50 tokens faster than the fused kernels
    optimizers = make_optimizers(model)
    log: list[dict[str, float]] = []
    first, seconds = 0, 0.0
    state_file = output / STATE_FILE
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        log, first, seconds = state["log"], state["step"], state["seconds"]
        print(f"{output.name}: continuing after step {first}", flush=True)
    compiled, length = torch.compile(model) if compiles else model, config.length

    started = time.perf_counter() - seconds
    for step in range(first, config.steps):
        stage, step_of_stage = config.stage(step)
        for optimizer, scale in zip(optimizers, (1.0, 0.1), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = scale * stage.learning_rate(step_of_stage)
        tokens, noised, learnt = (tensor.to(device) for tensor in config.draw_batch(seed, step))
        forward = compiled if tokens.shape[1] == length else model  # cut ones are too rare to be compiled for
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = forward(input_ids=noised, use_cache=False).logits
        logits = logits.float()[learnt]
        loss = F.cross_entropy(logits, tokens[learnt])  # the mean over masked tokens
        model.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % SAVE_EVERY == 0:
            accuracy = (logits.argmax(-1) == tokens[learnt]).float().mean().item()
            log.append({"step": step + 1, "loss": round(loss.item(), 5), "masked_token_accuracy": round(accuracy, 4)})
            seconds = time.perf_counter() - started
            print(f"{output.name}: {log[-1]}  {seconds:.0f} s", flush=True)
            state = {"model": model.state_dict(), "optimizers": [each.state_dict() for each in optimizers]}
            state |= {"log": log, "step": step + 1, "seconds": seconds}
            torch.save(state, part := state_file.with_suffix(".part"))
            part.rename(state_file)

    model.set_attn_implementation("sdpa")
    model.eval().save_pretrained(output)
    save_tokenizer(TASKS[config.task], output)
    record = {
        "script": "examples/miniature/train.py",
        "config": dataclasses.asdict(config),
        "seed": seed,
        "parameters": model.num_parameters(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "precision": precision,
        "compiled": compiles,
        "seconds": round(time.perf_counter() - started),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "log": log,
    }
    (output / LOG_FILE).write_text(json.dumps(record, indent=1) + "\n")
    state_file.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a file of examples/miniature/configs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="directory to write the checkpoint to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="use torch.compile, which needs a C++ compiler")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(
        Config.read(args.config),
        args.seed,
        args.output,
        device=args.device,
        precision=args.precision,
        compiles=args.compile,
    )


if __name__ == "__main__":
    main()
