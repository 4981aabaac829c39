"""Models that nobody here trained, from PyPI's rxnmapper 0.4.3 and sapiens 1.0.5, installed with ``--no-deps``."""

from __future__ import annotations

import copy
import functools
import warnings
from importlib.util import find_spec
from pathlib import Path
from random import Random

import pytest
import torch

from nap_decode import CommittedReuse, Denoiser, Sampler, decoders
from nap_decode.speed.reuse import Reuse

MISSING = [package for package in ("rxnmapper", "sapiens") if find_spec(package) is None]
pytestmark = [
    pytest.mark.weights,
    pytest.mark.skipif(bool(MISSING), reason=f"needs pip install --no-deps of {' and '.join(MISSING)}"),
]

ANTIBODIES = {  # trastuzumab's variable domains
    "H": "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRY"
    "ADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS",
    "L": "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQGTKVEIK",
}
DECODERS = ["left_to_right", "llada_low_confidence", "fast_dllm_threshold", "entropy_bounded"]


@functools.cache
def load(name):
    """A model, its tokenizer, and ids of texts it was made for."""
    from examples import real_weights

    if name == "rxnmapper":
        model, tokenizer = real_weights.load_rxnmapper()
        texts = list(real_weights.REACTIONS.values())
    else:
        model, tokenizer = real_weights.load_sapiens(name[-1])
        texts = [ANTIBODIES[name[-1]], ANTIBODIES[name[-1]][20:80]]
    return model, tokenizer, texts


@pytest.fixture(scope="module", params=["rxnmapper", "sapiens H", "sapiens L"])
def loaded(request):
    return load(request.param)


def with_holes(ids, mask, *, number, seed):
    """The ids with a run of masks in the last two thirds, and two single masks anywhere."""
    random, ids = Random(seed), list(ids)
    begin = random.randrange(len(ids) // 3, len(ids) - 1 - number)
    for position in (
        *range(begin, begin + number),
        random.randrange(1, len(ids) - 1),
        random.randrange(1, len(ids) - 1),
    ):
        ids[position] = mask
    return ids


@torch.no_grad()
def textbook(model, ids, mask, order):
    """One row, one or more masks at a time, the surest or leftmost first: ids, and the step of every commit."""
    ids, steps, step = torch.tensor(ids), torch.full((len(ids),), -1), 0
    while (holes := (ids == mask).nonzero()[:, 0]).numel():
        probabilities = model(ids[None]).logits[0, holes].softmax(-1)  # of all ids, the mask's among them
        entropies = torch.special.entr(probabilities).sum(-1)
        probabilities[:, mask] = 0
        best, tokens = probabilities.max(-1)
        if order == "left_to_right":
            chosen = torch.tensor([0])
        elif order == "llada_low_confidence":
            chosen = best.argmax()[None]
        elif order == "fast_dllm_threshold":
            chosen = (best >= 0.9).nonzero()[:, 0] if bool((best >= 0.9).any()) else best.argmax()[None]
        else:
            assert order == "entropy_bounded"  # all but the largest entropy of those taken are at most gamma in sum
            by_entropy = entropies.argsort()
            total = entropies[by_entropy].cumsum(0) - entropies[by_entropy].cummax(0).values
            chosen = by_entropy[: max(int((total <= 0.1).sum()), 1)]
        ids[holes[chosen]], steps[holes[chosen]] = tokens[chosen], step
        step += 1
    return ids.tolist(), steps.tolist()


def test_texts_survive_the_tokenizer(loaded):
    _, tokenizer, texts = loaded
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert not set(ids[1:-1]) & set(tokenizer.all_special_ids)


def test_the_tokens_of_a_reaction_are_those_of_rxnmapper():
    _, tokenizer, _ = load("rxnmapper")
    words = tokenizer.convert_ids_to_tokens(tokenizer("C[C@@H](Br)CCl.[Na+]~[OH-]>>C%10")["input_ids"])
    assert words[1:-1] == ["C", "[C@@H]", "(", "Br", ")", "C", "Cl", ".", "[Na+]", "~", "[OH-]", ">>", "C", "%10"]


def test_sapiens_says_what_its_readme_says():
    model, tokenizer, _ = load("sapiens H")
    rest = (
        "SGVEVKKPGASVKVSCKASGYTFTNYYMYWVRQAPGQGLEWMGGINPSNGGTNFNEKFKN"
        "RVTLTTDSSTTTAYMELKSLQFDDTAVYYCARRDYRFDMGFDYWGQGTTVTVSS"
    )
    text = "<mask><mask>QLV<mask>" + rest
    with torch.no_grad():
        probabilities = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)
    printed = [
        [0.003272, 0.004147, 0.004011, 0.004590],
        [0.012038, 0.003854, 0.006803, 0.008174],
        [0.003384, 0.003895, 0.003726, 0.004068],
        [0.004612, 0.005325, 0.004443, 0.004641],
        [0.005519, 0.003664, 0.003555, 0.005269],
    ]
    torch.testing.assert_close(probabilities[0, 1:6, 4:8], torch.tensor(printed), atol=1e-6, rtol=0)
    for name in ("llada_low_confidence", "fast_dllm_threshold"):
        assert Sampler(model, tokenizer, decoders.make(name)).infill(text).text == "QVQLVQ" + rest


def test_single_masks_are_those_of_fill_mask(loaded):
    from transformers import pipeline

    model, tokenizer, texts = loaded
    masked = []
    for text in texts[:4]:
        ids = tokenizer(text)["input_ids"][1:-1]
        for position in range(len(ids)):
            masked.append(tokenizer.decode([*ids[:position], tokenizer.mask_token_id, *ids[position + 1 :]]))
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
    theirs = [fill(text, top_k=1)[0]["token_str"] for text in masked]
    ours = (
        Sampler(model, tokenizer, decoder=decoders.make("left_to_right"))
        .infill(masked, progress=False)
        .blocks["hole 1"]
    )
    assert ours == theirs
    assert len(ours) > 150


@pytest.mark.parametrize("decoder", DECODERS)
def test_holes_are_filled_as_by_a_plain_loop(loaded, decoder):
    model, tokenizer, texts = loaded
    model = copy.deepcopy(model).double()  # else some are equally sure up to rounding
    sampler = Sampler(Denoiser(model, tokenizer), decoder=decoders.make(decoder))
    mask = tokenizer.mask_token_id
    for seed, text in enumerate(texts[:6]):
        row = with_holes(tokenizer(text)["input_ids"], mask, number=6, seed=seed)
        out = sampler.infill([row], progress=False)
        assert (out.sequences[0].tolist(), out.trace.step[0].tolist()) == textbook(model, row, mask, decoder)
        assert out.forward_passes == int(out.trace.step.max()) + 1


@pytest.mark.parametrize("decoder", [*DECODERS, "klass", "wino", "lopa"])
def test_a_batch_says_what_rows_alone_say(loaded, decoder):
    model, tokenizer, texts = loaded
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # padding is hidden, so nothing is decoded in groups
        sampler = Sampler(Denoiser(model, tokenizer), decoder=decoders.make(decoder))
        rows = [
            with_holes(tokenizer(text)["input_ids"], tokenizer.mask_token_id, number=5, seed=seed)
            for seed, text in enumerate(texts[:3])
        ]
        together = sampler.infill(rows, progress=False)
    assert len({len(row) for row in rows}) > 1
    for index, row in enumerate(rows):
        alone = sampler.infill([row], progress=False)
        assert together.sequences[index][: len(row)].tolist() == alone.sequences[0].tolist()
        assert together.trace.forward_passes[index] == alone.trace.forward_passes[0]


@pytest.mark.parametrize("decoder", ["llada_low_confidence", "fast_dllm_threshold"])
def test_no_special_token_is_emitted(loaded, decoder):
    model, tokenizer, texts = loaded
    ids = [tokenizer(text)["input_ids"] for text in texts[:2]]
    hidden = [[*row[:2], *[tokenizer.mask_token_id] * (len(row) - 4), *row[-2:]] for row in ids]  # nearly all of it
    out = Sampler(model, tokenizer, decoders.make(decoder)).infill(hidden, progress=False)
    emitted = set(out.sequences[out.trace.block >= 0].tolist())
    assert not emitted & set(tokenizer.all_special_ids)
    assert all(" " not in text for text in out.text)


def test_what_a_denoiser_knows_of_them(loaded):
    model, tokenizer, _ = loaded
    denoiser = Denoiser(model, tokenizer)
    probe = denoiser.probe()
    assert probe.sees_future
    assert probe.hides_padding
    assert denoiser.mask_token_id == tokenizer.mask_token_id


class Everything(Reuse):
    """Computes everything that is there, but as a choice: what is kept is right if that is exact."""

    def select(self, glance):
        return glance.present


def test_keys_and_values_are_reused(loaded):
    """Also of a layer that is called twelve times, as ALBERT's is."""
    model, tokenizer, texts = loaded
    masked = list(tokenizer(texts[0])["input_ids"])
    masked[3:9] = [tokenizer.mask_token_id] * 6
    outputs = [
        Sampler(
            Denoiser(model, tokenizer, reuse=reuse), decoder=decoders.make("llada_low_confidence", tokens_per_step=1)
        ).infill([masked])
        for reuse in (None, Everything(), CommittedReuse())
    ]
    assert outputs[1].sequences.tolist() == outputs[0].sequences.tolist()
    assert outputs[2].positions_forwarded[0] < outputs[2].positions_exact[0] / 2


def test_the_page_shows_the_table():
    from examples import real_weights

    page = real_weights.PAGE.read_text()
    assert real_weights.fill_in(page, real_weights.table(*real_weights.load_rxnmapper())) == page


def test_the_notebook_reads_the_same_tokens():
    from examples import real_weights

    notebook = Path(__file__).parents[1] / "examples" / "notebooks" / "real_weights.ipynb"
    assert real_weights.SMILES_TOKEN.replace("\\", "\\\\") in notebook.read_text()
