"""Load checkpoints that bring code of their own, as their pages say, and decode a few tokens beside a plain loop.

    python examples/check_checkpoints.py FOLDER   # writes docs/families.json, and the tables made of it

``FOLDER`` has one checkpoint per family, named as in :data:`FAMILIES`, with code, config and weights; small ones with
random weights will do.  It is not part of the repository, because the code is not ours.  Every checkpoint is loaded in
a process of its own, since some code changes transformers itself.  Run it once with every release of transformers: what
it finds is added to the record.  It runs the code in ``FOLDER``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from nap_decode import AnyOrderScheduler, Decoder, Denoiser, ModelFamily, NapDecodeError, Sampler
from nap_decode.checkpoints import auto_class

DOCS = Path(__file__).parents[1] / "docs"
RECORD = DOCS / "families.json"
FAMILIES = {
    "llada": "LLaDA",
    "llada-fast": "LLaDA in Fast-dLLM",
    "llada-moe": "LLaDA-MoE",
    "illada": "iLLaDA",
    "llada2": "LLaDA2.0",
    "llada21": "LLaDA2.1",
    "dream": "Dream",
    "dream-fast": "Dream in Fast-dLLM",
    "sdar": "SDAR",
    "fast-dllm-v2": "Fast-dLLM v2",
    "stable-diffcoder": "Stable-DiffCoder",
    "lfm2-diffusion": "LFM2.5-Encoder-Diffusion",
    "mdlm": "MDLM",
    "a2d-llama": "A2D Llama",
    "a2d-qwen2": "A2D Qwen2",
    "a2d-qwen3": "A2D Qwen3",
}
"""Folders, and what the tables call them."""
PAGES = {
    "families.md": tuple(FAMILIES),
    "models/llada.md": ("llada", "llada-fast"),
    "models/llada-moe.md": ("llada-moe",),
    "models/illada.md": ("illada",),
    "models/llada2.md": ("llada2", "llada21"),
    "models/dream.md": ("dream", "dream-fast"),
    "models/sdar.md": ("sdar",),
    "models/fast-dllm-v2.md": ("fast-dllm-v2",),
    "models/stable-diffcoder.md": ("stable-diffcoder",),
    "models/lfm2.md": ("lfm2-diffusion",),
    "models/mdlm.md": ("mdlm",),
    "models/a2d.md": ("a2d-llama", "a2d-qwen2", "a2d-qwen3"),
}
"""The pages with a table, and the families in it."""
WORKS = "works"
PROMPTS = ([11, 12, 13, 14, 15, 16, 17], [21, 22, 23])
NEW_TOKENS = 6


def load(folder: Path) -> Any:
    """The model as its page loads it, with the weights that are in the folder.

    Raises:
        ValueError: weights in memory are not those of the folder.
    """
    from safetensors.torch import load_file

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = auto_class(config).from_pretrained(folder, trust_remote_code=True).eval()
    saved, loaded = load_file(folder / "model.safetensors"), model.state_dict()
    wrong = [name for name, value in saved.items() if name not in loaded or not torch.equal(value, loaded[name])]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(saved)} tensors are not those of the checkpoint after from_pretrained")
    return model


def predict(model: Any, family: ModelFamily, row: list[int]) -> Tensor:
    """``(L, V)``: what the bare model says to one row, entry p predicting position p."""
    options: dict[str, Any] = {}
    parameters = inspect.signature(model.forward).parameters
    if "timesteps" in parameters:
        options["timesteps"] = torch.zeros(1)
    if family.block_size is not None and family.attention == "none":
        options["block_size"] = family.block_size
    elif family.block_size is not None:
        block = torch.arange(len(row)) // family.block_size
        seen = block[:, None] >= block
        hidden = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        options["attention_mask"] = (seen if family.attention == "4d" else hidden)[None, None]
    with torch.no_grad():
        out = model(input_ids=torch.tensor([row]), **options)
    logits: Tensor = getattr(out, "logits", out)[0]
    return torch.cat([logits[:1], logits[:-1]]) if family.shift else logits


def plain_loop(model: Any, denoiser: Denoiser, prompt: list[int]) -> list[int]:
    """The prompt and its continuation, the surest token at each step."""
    row = prompt + [denoiser.mask_token_id] * NEW_TOKENS
    for _ in range(NEW_TOKENS):
        logits = predict(model, denoiser.family, row).double()
        logits[:, denoiser.mask_token_id] = -torch.inf
        surest = logits.softmax(dim=1).max(dim=1)
        is_open = torch.tensor(row) == denoiser.mask_token_id
        best = int(surest.values.masked_fill(~is_open, -1).argmax())
        row[best] = int(surest.indices[best])
    return row


def check(folder: Path) -> str:
    """Whether the checkpoint works, else why not."""
    try:
        model = load(folder)
    except Exception as error:
        return f"does not load: {reason(error)}"
    try:
        denoiser = Denoiser(model)
        width = max(len(prompt) for prompt in PROMPTS)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
        sampler = Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(tokens_per_step=1)))
        decoded = sampler.generate(ids, mask, max_new_tokens=NEW_TOKENS, progress=False)
        assert isinstance(decoded, Tensor)
    except NapDecodeError as error:
        return f"refused: {reason(error)}"
    except Exception as error:
        return f"does not run: {reason(error)}"
    for row, prompt in zip(decoded.tolist(), PROMPTS, strict=True):
        if row[width - len(prompt) :] != plain_loop(model, denoiser, prompt):
            return "decodes other tokens than a plain loop"
    return WORKS


def reason(error: Exception) -> str:
    """The kind of an error and the beginning of its message, without this machine's paths."""
    text = re.sub(r" \(?/\S+", "", str(error).strip().split("\n")[0].replace("`", "'"))
    return f"{type(error).__name__}: `{text[:110].strip()}`".replace("``", "")


def check_all(folder: Path) -> dict[str, str]:
    """What is found of the checkpoints in ``folder`` with the release of transformers that is installed."""
    found = {}
    for name in FAMILIES:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
            found[name] = pool.submit(check, folder / name).result()
    return found


def short(said: str) -> str:
    """What a table says; that other code does not load or run is less than a wrong decode."""
    return {WORKS: "yes", "does not load": "no", "does not run": "no"}.get(said.split(":")[0], said.split(":")[0])


def table(record: dict[str, dict[str, str]], families: Sequence[str]) -> str:
    """One row for each family, one column for each release."""
    releases = sorted({release for name in FAMILIES for release in record[name]}, key=as_numbers)
    lines = [f"| transformers | {' | '.join(releases)} |", "|---" * (len(releases) + 1) + "|"]
    for name in families:
        lines.append(f"| {FAMILIES[name]} | {' | '.join(short(record[name][release]) for release in releases)} |")
    return "\n".join(lines)


def reasons(record: dict[str, dict[str, str]], families: Sequence[str]) -> str:
    """What was said where something does not work, and the releases that said it."""
    lines = []
    for name in families:
        releases: dict[str, list[str]] = {}
        for release in sorted(record[name], key=as_numbers):
            releases.setdefault(record[name][release], []).append(release)
        releases.pop(WORKS, None)
        lines += [f"* {FAMILIES[name]}, {', '.join(where)}: {said}" for said, where in releases.items()]
    return "\n".join(lines)


def as_numbers(release: str) -> list[int]:
    return [int(part) for part in release.split(".")]


def fill_in(page: str, record: dict[str, dict[str, str]], families: Sequence[str]) -> str:
    """The page with its table renewed."""
    before, rest = page.split("<!-- releases -->\n")
    after = rest.split("<!-- end -->", 1)[1]
    found = table(record, families)
    if tuple(families) != tuple(FAMILIES):  # where there are all, there is a table only
        found = f"{found}\n\n{reasons(record, families)}".rstrip()
    return f"{before}<!-- releases -->\n{found}\n<!-- end -->{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="one checkpoint per family")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    record: dict[str, dict[str, str]] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name, said in check_all(options.folder.resolve()).items():
        print(f"{transformers.__version__} {FAMILIES[name]}: {said}", flush=True)
        record.setdefault(name, {})[transformers.__version__] = said
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    for page, families in PAGES.items():
        path = DOCS / page
        path.write_text(fill_in(path.read_text(), record, families))


if __name__ == "__main__":
    main()
