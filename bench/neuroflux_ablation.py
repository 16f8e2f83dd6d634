"""What the parts of adaptive local learning are worth: heads, visits, views, activation types, blocks; one changed at a time.

A VGG-11 for CIFAR-10 under a budget that cuts it into several blocks; the same images, epochs and seed for all. The first row is the
method as it is by default.

    python bench/neuroflux_ablation.py [--quick] [--data cifar10 | npz:cifar10.npz] [--again]

Finished runs are kept in bench/.cache/. About a quarter of an hour on one core.
"""

import argparse
from typing import Any

from common import Cache, default_cifar10, markdown_table, write_results
from neuroflux_runs import MB, NEUROFLUX, OPTIONS, Runs, Setting

NETWORK, WIDTH, BUDGET = "cifar-vgg11", 0.25, 33_000_000
# Points that two such rows may differ by for no reason: two deviations of a difference of means of two runs.
NOISE = 2.0

VARIANTS: dict[str, dict[str, Any]] = {
    "by default: adaptive heads, sequential, float32": {},
    "heads: classic (256 filters, whole maps)": {"heads": "classic"},
    "heads: auglocal": {"heads": "auglocal"},
    "heads: linear": {"heads": "linear"},
    "visits: laps=2": {"visits": "laps=2"},
    "visits: laps=3": {"visits": "laps=3"},
    "visits: interleaved, 512 images at a time": {"visits": "interleaved", "macro_batches": 1},
    "activations: bfloat16": {"activation_dtype": "bfloat16"},
    "activations: float16": {"activation_dtype": "float16"},
    "activations: int8": {"activation_dtype": "int8"},
    "augmented, one view": {"augment": "basic"},
    "augmented, two views": {"augment": "basic", "views": 2},
    "augmented, four views": {"augment": "basic", "views": 4},
    "augmented, interleaved, 512 images at a time": {"augment": "basic", "visits": "interleaved", "macro_batches": 1},
    "heads: linear; activations: int8": {"heads": "linear", "activation_dtype": "int8"},
    "blocks: alike": {"blocks": "alike"},
    "blocks: alike, tolerance 0.25": {"blocks": "alike", "block_tolerance": 0.25},
}


def table_of(found: dict[str, dict[str, Any]]) -> str:
    """A row per variant."""
    base = found[next(iter(found))]
    heads = (
        "variant", "blocks", "batches", "val %", "test %", "points", "s", "ratio", "caching s", "cache MB", "written MB",
        "peak MB",
    )  # fmt: skip
    rows = []
    for name, own in found.items():
        if "reason" in own:
            rows.append((name, *("-" for _ in range(len(heads) - 2)), "does not fit"))
            continue
        caching = "-" if own["caching"] is None else f"{own['caching']:.1f}"
        rows.append(
            (
                name, str(len(own["batches"])), ", ".join(map(str, own["batches"])), f"{100 * own['val']:.1f}", f"{100 * own['test']:.1f}",
                f"{100 * (own['test'] - base['test']):+.1f}", f"{own['seconds']:.0f}", f"{own['seconds'] / base['seconds']:.2f}",
                caching, f"{own['cache_bytes'] / MB:.0f}", f"{own['bytes_written'] / MB:.0f}", f"{own['peak'] / MB:.0f}",
            )
        )  # fmt: skip
    return markdown_table(heads, rows)


def main() -> None:
    """Run all variants and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=default_cifar10(), help="32x32 images in colour")
    parser.add_argument("--quick", action="store_true", help="few images, two epochs, one seed")
    parser.add_argument("--again", action="store_true", help="forget the runs that are finished")
    arguments = parser.parse_args()
    name = "neuroflux_ablation_quick" if arguments.quick else "neuroflux_ablation"
    images, tests, epochs, seeds = (1000, 500, 2, (0,)) if arguments.quick else (4000, 2000, 6, (0, 1))
    runs = Runs(Cache(name, arguments.again))
    found: dict[str, dict[str, Any]] = {}
    for variant, options in VARIANTS.items():
        each = [
            runs.own(
                Setting(NETWORK, WIDTH, arguments.data, BUDGET, images, tests, epochs, 0.2, seed),
                {**OPTIONS[NEUROFLUX], **options},
            )
            for seed in seeds
        ]
        if "reason" not in each[0]:
            means = {key: sum(own[f"{key}_accuracy"] for own in each) / len(each) for key in ("val", "test")}
            each[0] = {**each[0], **means, "seconds": min(own["seconds"] for own in each)}
        found[variant] = each[0]
    lines = [
        f"{NETWORK}, width {WIDTH:g}, budget {BUDGET / MB:.0f} MB, CIFAR-10: {images} images, a fifth of which validates, {tests} to test on.",
        f"{epochs} epochs for every layer, SGD with momentum, batches as large as fit; accuracies are means of {len(seeds)} seed(s), times",
        f"the faster run's. On so few test images differences below {NOISE:g} points say nothing.",
        '"Augmented, one view": the first block sees other augmented images in every epoch, and later blocks one copy of the images',
        "as they are.",
        "",
        table_of(found),
    ]
    write_results(name, "Adaptive local learning: what its parts are worth", "\n".join(lines), {"variants": found})


if __name__ == "__main__":
    main()
