"""Probabilities in the precision of the model: LLaDA's and Dream's rules, operation for operation, in bfloat16."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import MASK
from torch.nn import functional

from nap_decode import MicroConfidenceCommitter, NapDecodeError, Sampler, decoders
from nap_decode.integrations import dream, llada

VOCABULARY, CASES = 50, range(30)


class Confident(torch.nn.Module):
    """Bfloat16 logits that are sure of some id, drawn for every row of ids anew: confidences of 0.9 to 1."""

    device = torch.device("cpu")

    def __init__(self, seed, dtype=torch.bfloat16):
        super().__init__()
        self.seed, self.dtype = seed, dtype
        self.config = SimpleNamespace(max_position_embeddings=None)

    def forward(self, ids, attention_mask):
        return torch.stack([self.row(tuple(row)) for row in ids.tolist()]).to(self.dtype)

    def row(self, ids):
        generator = torch.Generator().manual_seed(hash((self.seed, ids)) % 2**31)
        logits = torch.randn(len(ids), VOCABULARY, generator=generator)
        sure = torch.randint(4, VOCABULARY, (len(ids), 1), generator=generator)
        logits = logits.scatter_add(1, sure, 6 + 6 * torch.rand(len(ids), 1, generator=generator))
        logits[:, MASK] = -1e4  # the published code may emit it
        return logits.bfloat16()


def llada_decode(model, prompt, *, length, steps, without=()):
    """LLaDA's ``generate``: one block, temperature 0."""
    x = torch.tensor([prompt + [MASK] * length])
    for step in range(steps):
        masked = x == MASK
        logits = model(x, None)
        x0 = logits.argmax(-1)
        scored = logits.clone()
        scored[:, :, list(without)] = -torch.inf
        p = functional.softmax(scored, dim=-1)
        x0_p = torch.gather(p, -1, x0[..., None])[..., 0]
        confidence = torch.where(masked, x0_p, -torch.inf)
        chosen = confidence[0].topk(length // steps + (step < length % steps)).indices
        x[0, chosen] = x0[0, chosen]
    return x[0].tolist()


def dream_decode(model, prompt, *, length, steps, alg, top_p=None, top_k=None):
    """Dream's ``_sample`` at temperature 0."""
    x = torch.tensor([prompt + [MASK] * length])
    times = torch.linspace(1, 1e-3, steps + 1)
    for step in range(steps):
        masked = x == MASK
        logits = model(x, None)
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)[masked]
        if top_p is not None:
            ordered, order = torch.sort(logits, descending=True)
            beyond = functional.softmax(ordered, dim=-1).cumsum(-1) > top_p
            beyond[..., 1:] = beyond[..., :-1].clone()
            beyond[..., 0] = False
            beyond = torch.zeros_like(beyond).scatter(-1, order, beyond)
            logits = logits.masked_fill(beyond, torch.finfo(logits.dtype).min)
        if top_k is not None:
            logits = logits.masked_fill(logits < logits.topk(top_k)[0][..., -1:], torch.finfo(logits.dtype).min)
        p = torch.softmax(logits, dim=-1)
        confidence, x0 = p.max(dim=-1)
        if alg == "topk_margin":
            ordered, _ = torch.sort(p, dim=-1, descending=True)
            confidence = ordered[:, 0] - ordered[:, 1]
        elif alg == "entropy":
            confidence = torch.sum(p * torch.log(p + 1e-10), dim=-1)
        number = masked.sum() / 1
        number = int(number * (1 - times[step + 1] / times[step])) if step < steps - 1 else int(number)
        everywhere = torch.full_like(x, -torch.inf, dtype=logits.dtype)
        everywhere[masked] = confidence
        tokens = torch.full_like(x, MASK)
        tokens[masked] = x0
        chosen = everywhere[0].topk(number).indices
        x[0, chosen] = tokens[0, chosen]
    return x[0].tolist()


def equal(decode, published):
    """In how many of the cases two decoders make the same of a model and a prompt."""
    cases = [(Confident(seed), [5, 6 + seed % 9]) for seed in CASES]
    return sum(decode(model, prompt) == published(model, prompt) for model, prompt in cases)


def check_page(rule, before):
    """The page says how many were equal without the option, give or take what another processor rounds."""
    page = (Path(__file__).parents[2] / "docs" / "compared.md").read_text()
    printed, after = re.search(rf"^\| {re.escape(rule)} \| (\d+) of 30 \| (\d+) of 30 \|$", page, re.M).groups()
    assert abs(int(printed) - before) <= 2
    assert int(after) == len(CASES)


class TestLLaDA:
    @pytest.mark.parametrize("options", [{}, {"confidence_eos_eot_inf": True}], ids=["", "without ends"])
    def test_it_makes_the_published_tokens(self, options, monkeypatch):
        monkeypatch.setattr(llada, "EOS_TOKEN_ID", 7)
        monkeypatch.setattr(llada, "EOT_TOKEN_ID", 20)
        without = (7, 20) if options else ()

        def ours(model_precision):
            return lambda model, prompt: llada.generate(
                model,
                torch.tensor([prompt]),
                gen_length=24,
                steps=8,
                mask_id=MASK,
                model_precision=model_precision,
                **options,
            )[0].tolist()

        def theirs(model, prompt):
            return llada_decode(model, prompt, length=24, steps=8, without=without)

        assert equal(ours(True), theirs) == len(CASES)
        before = equal(ours(False), theirs)
        assert before < len(CASES) / 2
        if not options:
            check_page("LLaDA", before)

    def test_samplers_decide_themselves(self):
        with pytest.raises(NapDecodeError, match="model_precision=True would have no effect: the sampler decides that"):
            llada.generate(Confident(0), torch.tensor([[5]]), sampler="klass", mask_id=MASK, model_precision=True)


class TestDream:
    @pytest.mark.parametrize("cuts", [{}, {"top_p": 0.95}, {"top_k": 3}, {"top_p": 0.9, "top_k": 4}], ids=str)
    @pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
    def test_it_makes_the_published_tokens(self, alg, cuts):
        options = {"alg": alg, "steps": 6} | cuts

        def ours(model_precision):
            def decode(model, prompt):
                dream.install(model, model_precision=model_precision)
                ids = torch.tensor([prompt])
                return model.diffusion_generate(ids, max_new_tokens=20, mask_token_id=MASK, **options)[0].tolist()

            return decode

        def theirs(model, prompt):
            return dream_decode(model, prompt, length=20, **options)

        assert equal(ours(True), theirs) == len(CASES)
        if not cuts:
            check_page(f'Dream, `alg="{alg}"`', equal(ours(False), theirs))

    def test_samplers_decide_themselves(self):
        with pytest.raises(NapDecodeError, match="model_precision=True would have no effect: the sampler decides that"):
            dream.install(Confident(0), "klass", model_precision=True)


def test_drawn_tokens_are_those_that_the_rounded_cut_leaves():
    """A confidence of 0 would be that of a token which the rounded sum cuts off, and the other does not."""
    model = Confident(0)
    dream.install(model, model_precision=True)
    options = {"alg": "maskgit_plus", "temperature": 1.0, "top_p": 0.9, "num_return_sequences": 50}
    out = model.diffusion_generate(torch.tensor([[5]]), max_new_tokens=8, steps=8, mask_token_id=MASK, **options)
    assert MASK not in out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_other_precisions_it_makes_no_difference(dtype):
    for seed in range(5):
        model = Confident(seed, dtype)
        options = {"gen_length": 12, "steps": 6, "mask_id": MASK}
        one, other = (llada.generate(model, torch.tensor([[5]]), model_precision=on, **options) for on in (False, True))
        assert torch.equal(one, other)


def test_it_is_a_part_that_is_saved(tmp_path):
    committer = MicroConfidenceCommitter(model_precision=True, confidence="negative_entropy")
    decoder = decoders.llada_low_confidence().set(steps=4, committer=committer)
    sampler = Sampler(Confident(1), decoder=decoder, mask_token_id=MASK)
    sampler.save(tmp_path / "sampler.json")
    again = type(sampler).load(tmp_path / "sampler.json", Confident(1), mask_token_id=MASK)
    assert again.decoder.committer == committer
    want = sampler.generate(torch.tensor([[5, 6]]), max_new_tokens=12)
    for one in (
        again,
        sampler.set(committer=committer.compiled(lambda function: function)),
    ):  # compiled, it is what it was
        assert torch.equal(one.generate(torch.tensor([[5, 6]]), max_new_tokens=12), want)
