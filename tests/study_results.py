"""Results to look at."""

from examples.miniature.evaluate import DECODERS, Result
from examples.miniature.study import KIND_NAMES


def make_result(kind="paths", decoder="any_order", value=6, correct=50, seed=0, split="test", problems=100, **changes):
    return Result(
        **{
            "task": "nim_sum",
            "kind": kind,
            "seed": seed,
            "split": split,
            "decoder": decoder,
            "setting": DECODERS[decoder].setting,
            "value": value,
            "problems": problems,
            "correct": correct,
            "path_ends_correct": 0.5,
            "forward_passes": 6.0,
            "tokens_per_forward": 5.0,
            "arness_global": 0.25,
            "arness_local": 0.1,
            "arness_blocks": "0.500 0.250",
        }
        | changes
    )


def make_all_results():
    """Every kind, decoder, value, split, with two seeds."""
    return [
        make_result(kind=kind, decoder=decoder.name, value=value, seed=seed, split=split)
        for kind in KIND_NAMES
        for decoder in DECODERS.values()
        for value in decoder.values
        for seed in (0, 1)
        for split in ("tune", "test")
    ]
