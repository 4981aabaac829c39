"""Decode with trained weights that come with PyPI packages, and tabulate what each decoder restores.

    pip install --no-deps rxnmapper==0.4.3 sapiens==1.0.5
    python examples/real_weights.py            # writes the table in docs/models/masked-lm.md

Takes a minute on one core.  The packages' files are read; their code, which needs old packages, is not run.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AlbertForMaskedLM, PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from nap_decode import Denoiser, Sampler, decoders

PAGE = Path(__file__).parents[1] / "docs" / "models" / "masked-lm.md"
MARKS = "<!-- reactions -->\n", "<!-- end -->"
SHARE = 0.6
"""How much of each product is hidden, in its middle."""
DECODERS: list[tuple[str, dict[str, Any]]] = [
    ("left_to_right", {}),
    ("llada_random", {}),
    ("llada_low_confidence", {}),
    ("left_to_right", {"tokens_per_step": 4}),
    ("llada_low_confidence", {"tokens_per_step": 4}),
    ("entropy_bounded", {}),
    ("fast_dllm_threshold", {}),
    ("klass", {}),
    ("wino", {}),
    ("lopa", {}),
]

# rxnmapper's own, from its smiles_utils.py: an atom, a bond, a ring, a branch, a dot or an arrow.
SMILES_TOKEN = r"\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|\%[0-9]{2}|[0-9]"
# Reactions of textbooks, precursors in alphabetical order, as the model was trained.
REACTIONS = {
    "Suzuki coupling": "O=C([O-])[O-].O=Cc1ccc(Br)cc1.OB(O)c1ccccc1.[K+].[K+].[Pd]>>O=Cc1ccc(-c2ccccc2)cc1",
    "amide from an acid chloride": "CCN(CC)CC.ClCCl.NCc1ccccc1.O=C(Cl)c1ccccc1>>O=C(NCc1ccccc1)c1ccccc1",
    "ester hydrolysis": "CCOC(=O)c1ccc(OC)cc1.O.[Na+].[OH-]>>COc1ccc(C(=O)O)cc1",
    "Williamson ether synthesis": "BrCc1ccccc1.CN(C)C=O.O=C([O-])[O-].Oc1ccc(Cl)cc1.[K+].[K+]>>Clc1ccc(OCc2ccccc2)cc1",
    "Boc deprotection": "CC(C)(C)OC(=O)N1CCN(c2ccccc2)CC1.ClCCl.O=C(O)C(F)(F)F>>c1ccc(N2CCNCC2)cc1",
    "ketone reduction": "CC(=O)c1ccc(F)cc1.CO.[BH4-].[Na+]>>CC(O)c1ccc(F)cc1",
    "nitro reduction": "CCO.CCOC(=O)c1ccc([N+](=O)[O-])cc1.[H][H].[Pd]>>CCOC(=O)c1ccc(N)cc1",
    "reductive amination": "C1CCNCC1.CC(=O)O[BH-](OC(C)=O)OC(C)=O.O=Cc1ccccc1.[Na+]>>c1ccc(CN2CCCCC2)cc1",
    "sulfonamide synthesis": "Cc1ccc(S(=O)(=O)Cl)cc1.NCCc1ccccc1.c1ccncc1>>Cc1ccc(S(=O)(=O)NCCc2ccccc2)cc1",
    "aromatic substitution": "C1COCCN1.CS(C)=O.O=[N+]([O-])c1ccc(F)cc1>>O=[N+]([O-])c1ccc(N2CCOCC2)cc1",
    "Boc protection": "CC(C)(C)OC(=O)OC(=O)OC(C)(C)C.ClCCl.OCC1CCNCC1>>CC(C)(C)OC(=O)N1CCC(CO)CC1",
    "Sonogashira coupling": "C#Cc1ccc(OC)cc1.CCN(CC)CC.Cl[Pd]Cl.Ic1ccccc1.[Cu]I>>COc1ccc(C#Cc2ccccc2)cc1",
    "alcohol oxidation": "O=[Mn]=O.OCc1ccc(Br)cc1>>O=Cc1ccc(Br)cc1",
    "thioether synthesis": "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F",
}


def folder_of(package: str) -> Path:
    """Where an installed package lies; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit(f"{package} is not installed; see the top of examples/real_weights.py")
    return Path(spec.submodule_search_locations[0])


def word_tokenizer(words: list[str], pattern: str, names: dict[str, str]) -> PreTrainedTokenizerFast:
    """A tokenizer that finds words by a regular expression, and joins them without spaces.

    Args:
        words: the vocabulary, in the order of the ids.
        pattern: matches a word.
        names: special tokens by their names in transformers; there must be a ``cls_token`` and a ``sep_token``.
    """
    first, last = names["cls_token"], names["sep_token"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=names["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(word, words.index(word)) for word in (first, last)]
    )
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def load_rxnmapper() -> tuple[Any, PreTrainedTokenizerFast]:
    """RXNMapper's ALBERT, trained on reaction SMILES (MIT; Schwaller et al. 2021), and its tokenizer."""
    folder = folder_of("rxnmapper") / "models" / "transformers" / "albert_heads_8_uspto_all_1310k"
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = word_tokenizer((folder / "vocab.txt").read_text().splitlines(), SMILES_TOKEN, names)
    return AlbertForMaskedLM.from_pretrained(folder).eval(), tokenizer


def load_sapiens(chain: str = "H") -> tuple[Any, PreTrainedTokenizerFast]:
    """Sapiens' RoBERTa, trained on human antibodies (MIT; Prihoda et al. 2022), and its tokenizer.

    Args:
        chain: ``"H"`` for the heavy one, ``"L"`` for the light one.
    """
    folder = folder_of("sapiens") / "models" / "v1"
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(folder / f"checkpoint_v{chain.lower()}.pt", map_location="cpu", weights_only=True)["model"]
    state = {_name_in_transformers(name): value for name, value in saved.items()}
    state["lm_head.decoder.bias"] = state["lm_head.bias"]
    state["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, 128)  # fairseq has none
    config = RobertaConfig(
        vocab_size=25,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=256,
        max_position_embeddings=len(state["roberta.embeddings.position_embeddings.weight"]),
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    model = RobertaForMaskedLM(config).eval()
    model.load_state_dict(state)
    residues = [line.split()[0] for line in (folder / "dict.txt").read_text().splitlines()]
    names = {
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "mask_token": "<mask>",
    }
    return model, word_tokenizer(["<s>", "<pad>", "</s>", "<unk>", *residues, "<mask>"], ".", names)


def _name_in_transformers(name: str) -> str:
    """A weight's name in transformers, from that in fairseq."""
    for theirs, ours in (
        ("decoder.sentence_encoder.embed_tokens", "roberta.embeddings.word_embeddings"),
        ("decoder.sentence_encoder.embed_positions", "roberta.embeddings.position_embeddings"),
        ("decoder.sentence_encoder.emb_layer_norm", "roberta.embeddings.LayerNorm"),
        ("decoder.sentence_encoder.layers", "roberta.encoder.layer"),
        ("decoder.lm_head.weight", "lm_head.decoder.weight"),
        ("decoder.lm_head", "lm_head"),
        ("self_attn_layer_norm", "attention.output.LayerNorm"),
        ("self_attn.out_proj", "attention.output.dense"),
        ("self_attn.q_proj", "attention.self.query"),
        ("self_attn.k_proj", "attention.self.key"),
        ("self_attn.v_proj", "attention.self.value"),
        ("fc1", "intermediate.dense"),
        ("fc2", "output.dense"),
        ("final_layer_norm", "output.LayerNorm"),
    ):
        name = name.replace(theirs, ours)
    return name


def hide_product(reaction: str, share: float) -> str:
    """The reaction with masks for a share of its product's tokens, those in the middle."""
    precursors, product = reaction.split(">>")
    tokens = re.findall(SMILES_TOKEN, product)
    number = round(share * len(tokens))
    begin = (len(tokens) - number) // 2
    tokens[begin : begin + number] = ["[MASK]"] * number
    return f"{precursors}>>{''.join(tokens)}"


def table(model: Any, tokenizer: PreTrainedTokenizerFast) -> str:
    """A Markdown table with a line for every decoder."""
    denoiser, reactions = Denoiser(model, tokenizer), list(REACTIONS.values())
    hidden = [hide_product(reaction, SHARE) for reaction in reactions]
    truth = [tokenizer(reaction)["input_ids"] for reaction in reactions]
    lines = ["| decoder | whole products restored | tokens restored | forward passes a reaction |", "|---|---|---|---|"]
    for name, options in DECODERS:
        out = Sampler(denoiser, decoder=decoders.make(name, **options)).infill(hidden, seed=0, progress=False)
        whole = sum(text == reaction for text, reaction in zip(out.text, reactions, strict=True))
        right = total = 0
        for tokens, ids, is_slot, present in zip(
            out.sequences, truth, out.trace.block >= 0, out.canvas.attention_mask.bool(), strict=True
        ):
            hits = (tokens[present] == torch.tensor(ids))[is_slot[present]]
            right, total = right + int(hits.sum()), total + len(hits)
        arguments = "".join(f", {key}={value}" for key, value in options.items())
        passes = out.trace.forward_passes.double().mean().item()
        lines.append(f"| `{name}`{arguments} | {whole} of {len(reactions)} | {right} of {total} | {passes:.1f} |")
    return "\n".join(lines) + "\n"


def fill_in(page: str, rows: str) -> str:
    """The page with its table renewed."""
    before, rest = page.split(MARKS[0])
    return before + MARKS[0] + rows + MARKS[1] + rest.split(MARKS[1], 1)[1]


def main() -> None:
    """Measure, and renew the page."""
    rows = table(*load_rxnmapper())
    print(rows)
    PAGE.write_text(fill_in(PAGE.read_text(), rows))


if __name__ == "__main__":
    main()
