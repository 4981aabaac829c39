"""Train the checkpoint that the package embeds: a tiny masked-diffusion model on nim-sum problems.

    python examples/train_demo.py --output src/nap_decode/demo/checkpoint

About eleven minutes on one CPU core, and five more to measure what it learnt.  Everything is
determined by ``--seed``: step s draws its batch from the stream (seed, s), so an interrupted run that
is started again continues after its last saved step (``training_state.pt`` in the output directory,
removed at the end) as if nothing had happened.

What the model sees (see ``nap_decode.demo.problems`` for the task)::

    <bos> 6 0 6 4 6 2 1 2 4 7 0 6 = <think 1> 6 0 4 ... 6 <think 2> 4 5 ... 6 <think 3> 3 ... 6 <summary> 6 <eos>
    '------------ prompt ---------'           '-- R_1 --'           '- R_2 -'           '-- R_3 -'         '- S -'

* Noise: one masking rate t ~ U(0, 1) for all path tokens of a row; headers are never masked; the
  summary is held back (masked) until 1 - t >= 0.8, then masked with probability one half.
  This is NAP's structured noise, simplified.
* Zeros: in half of the rows each digit is 0 with probability 0.6, so that neighbouring states are
  often equal.  Without this first signal the paths stay on a plateau.  Tests use uniform digits.
* Slips (second stage): in 40 % of the rows one path goes wrong at a random state and stays wrong;
  its wrong states carry no loss and the summary keeps the majority answer, so that the summary
  learns to vote instead of copying one path.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nap_decode import AnyOrderScheduler, BlockScheduler, CanvasTemplate, Denoiser, MacroParallelScheduler, Sampler
from nap_decode.demo.problems import (
    NUM_DIGITS,
    NUM_PATHS,
    PATH_LENGTH,
    SUMMARY_LENGTH,
    running_totals,
    sample_problems,
)

SPECIAL = ["<pad>", "<mask>", "<bos>", "<eos>", "<unk>"]
HEADERS = [f"<think {j + 1}>" for j in range(NUM_PATHS)] + ["<summary>"]
WORDS = [*SPECIAL, *HEADERS, "=", *map(str, range(8))]
TOKEN = {word: i for i, word in enumerate(WORDS)}
DIGIT0 = TOKEN["0"]

PROMPT = NUM_DIGITS + 2  # <bos> digits =
PATHS = NUM_PATHS * (1 + PATH_LENGTH)
LENGTH = PROMPT + PATHS + 1 + SUMMARY_LENGTH

BATCH = 64
STAGES = ((1200, 2e-3, 0.0), (700, 1.2e-3, 0.4))  # steps, peak learning rate, share of rows with a slip
WARMUP = 50


def make_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(WordLevel(TOKEN, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", TOKEN["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        mask_token="<mask>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=HEADERS,
        padding_side="left",
        model_max_length=256,
    )


def save_tokenizer(output: Path) -> None:
    make_tokenizer().save_pretrained(output)
    # transformers 5 writes names that 4 does not know; both know these.
    file = output / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = config.pop("extra_special_tokens", HEADERS)
    file.write_text(json.dumps(config, indent=2) + "\n")


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=20,  # two rows more than the tokenizer has, as in released checkpoints
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        pad_token_id=TOKEN["<pad>"],
        bos_token_id=TOKEN["<bos>"],
        eos_token_id=TOKEN["<eos>"],
        mask_token_id=TOKEN["<mask>"],
        is_causal=False,
    )
    return LlamaForCausalLM(config)


def make_batch(rng: np.random.Generator, slips: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, noised tokens and loss mask, each ``(BATCH, LENGTH)``."""
    digits = rng.integers(0, 8, (BATCH, NUM_DIGITS))
    zeroed = (rng.random((BATCH, 1)) < 0.5) & (rng.random((BATCH, NUM_DIGITS)) < 0.6)
    digits[zeroed] = 0
    states = running_totals(digits)  # (BATCH, NUM_PATHS, PATH_LENGTH)
    answer = states[:, 0, -1].copy()

    # A slip adds a constant to every state from some place on in one path.
    slipped = rng.random(BATCH) < slips
    which = np.arange(NUM_PATHS)[None, :, None] == rng.integers(0, NUM_PATHS, BATCH)[:, None, None]
    after = np.arange(PATH_LENGTH)[None, None] >= rng.integers(0, PATH_LENGTH, BATCH)[:, None, None]
    wrong = slipped[:, None, None] & which & after
    states = np.where(wrong, states ^ rng.integers(1, 8, BATCH)[:, None, None], states)

    tokens = np.empty((BATCH, LENGTH), dtype=np.int64)
    tokens[:, 0] = TOKEN["<bos>"]
    tokens[:, 1 : PROMPT - 1] = DIGIT0 + digits
    tokens[:, PROMPT - 1] = TOKEN["="]
    paths = tokens[:, PROMPT : PROMPT + PATHS].reshape(BATCH, NUM_PATHS, 1 + PATH_LENGTH)
    paths[:, :, 0] = [TOKEN[h] for h in HEADERS[:-1]]
    paths[:, :, 1:] = DIGIT0 + states
    tokens[:, PROMPT : PROMPT + PATHS] = paths.reshape(BATCH, PATHS)
    tokens[:, -3] = TOKEN["<summary>"]
    tokens[:, -2] = DIGIT0 + answer
    tokens[:, -1] = TOKEN["<eos>"]

    t = rng.random((BATCH, 1))
    masked = np.zeros((BATCH, LENGTH), dtype=bool)
    path_masked = rng.random((BATCH, NUM_PATHS, 1 + PATH_LENGTH)) < t[:, :, None]
    path_masked[:, :, 0] = False
    masked[:, PROMPT : PROMPT + PATHS] = path_masked.reshape(BATCH, PATHS)
    masked[:, -2:] = (t > 0.2) | (rng.random((BATCH, SUMMARY_LENGTH)) < 0.5)
    noised = np.where(masked, TOKEN["<mask>"], tokens)

    learnt = masked.copy()
    spoilt = np.concatenate([np.zeros((BATCH, NUM_PATHS, 1), dtype=bool), wrong], axis=2)
    learnt[:, PROMPT : PROMPT + PATHS] &= ~spoilt.reshape(BATCH, PATHS)
    return torch.from_numpy(tokens), torch.from_numpy(noised), torch.from_numpy(learnt)


def learning_rate(step: int) -> tuple[float, float]:
    """Learning rate (warm-up, then cosine, per stage) and share of slips at a step."""
    for steps, peak, slips in STAGES:
        if step < steps:
            return peak * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps)), slips
        step -= steps
    raise ValueError(f"step {step} is past the last stage")


def train(output: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = make_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    log: list[dict[str, float]] = []
    first = 0
    state_file = output / "training_state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log, first = state["log"], state["step"]
        print(f"continuing after step {first}", flush=True)

    total = sum(steps for steps, _, _ in STAGES)
    started = time.perf_counter()
    for step in range(first, total):
        rate, slips = learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens, noised, learnt = make_batch(np.random.default_rng([seed, step]), slips)
        logits = model(input_ids=noised, use_cache=False).logits[learnt]
        loss = F.cross_entropy(logits, tokens[learnt])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            accuracy = (logits.argmax(-1) == tokens[learnt]).float().mean().item()
            log.append({"step": step + 1, "loss": round(loss.item(), 5), "masked_token_accuracy": round(accuracy, 4)})
            print(f"{log[-1]}  {time.perf_counter() - started:.0f} s", flush=True)
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log, "step": step + 1},
                state_file,
            )

    model.eval().save_pretrained(output)
    save_tokenizer(output)
    record = {
        "script": "examples/train_demo.py",
        "seed": seed,
        "batch": BATCH,
        "stages": [dict(zip(("steps", "peak_learning_rate", "slips"), stage, strict=True)) for stage in STAGES],
        "parameters": model.num_parameters(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "log": log,
    }
    (output / "training_log.json").write_text(json.dumps(record, indent=1) + "\n")
    state_file.unlink(missing_ok=True)


def evaluate(output: Path, problems: int = 500, seed: int = 1000) -> None:
    """Decode problems that training never saw, and add the accuracies to the log."""
    model = LlamaForCausalLM.from_pretrained(output).eval()
    denoiser = Denoiser(model, PreTrainedTokenizerFast.from_pretrained(output))
    template = CanvasTemplate.nap(NUM_PATHS, path_length=PATH_LENGTH, summary_length=SUMMARY_LENGTH)
    held_out = sample_problems(problems, seed)
    prompts = [problem.prompt for problem in held_out]
    accuracy: dict[str, dict[str, float]] = {}
    for k in (1, 2, 3, 4, 6, 8, 12):
        schedulers: dict[str, BlockScheduler] = {
            "parallel-forced": MacroParallelScheduler(tokens_per_step=k),
            "parallel-forced, last step shared": MacroParallelScheduler(tokens_per_step=k, share_last_step=True),
            "any-order": AnyOrderScheduler(tokens_per_step=k),
        }
        for name, scheduler in schedulers.items():
            summaries = Sampler(denoiser, scheduler=scheduler, template=template)(prompts).summary
            correct = sum(p.is_correct(s) for p, s in zip(held_out, summaries, strict=True))
            accuracy.setdefault(name, {})[str(k)] = round(100 * correct / problems, 1)
            print(f"{name}, {k} tokens per step: {accuracy[name][str(k)]} %", flush=True)
    file = output / "training_log.json"
    record = json.loads(file.read_text())
    record["accuracy_by_tokens_per_step"] = {"problems": problems, "seed": seed} | accuracy
    file.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=0, help="below 1000; held-out problems use larger ones")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the checkpoint that is there")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.evaluate_only:
        train(args.output, args.seed)
    evaluate(args.output)


if __name__ == "__main__":
    main()
