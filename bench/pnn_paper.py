"""Every figure of the PNN paper, again: histograms, accuracy against computation, N_L, kappa, kappa against learning rate, recovery.

Partitioned Neural Network training (Karadağ and Topaloğlu, arXiv 2403.11204, sections 3 to 5): 784-80-60-60-60-47, ReLU after every
layer but the last, cut after the second hidden layer; SGD 0.01, momentum 0.9, batch 1410, no shuffling on the left; the baseline is the
whole network for 40 epochs. Beside them a tuned baseline, and a tuned PNN: both chosen on a validation part of the training data.

    python bench/pnn_paper.py --quick                        # fewer runs and epochs: minutes
    python bench/pnn_paper.py [--runs 10] [--sweep-runs 3]   # the whole, about an hour on 2 cores
    python bench/pnn_paper.py --data emnist-balanced         # the paper's own split, downloaded

Each finished training is kept in bench/.cache/pnn_paper: run the same command again to go on. Curves are test accuracy after every
epoch, as in the paper; nothing is chosen by them.
"""

import argparse
import os

from common import RESULTS, default_emnist, machine, write_results
from pnn_page import pictures, text
from pnn_study import CACHE, EPOCHS_RIGHT, Study, best, train_all
from pnn_weights import weights_of_many


def main() -> None:
    """Train all that is missing, then write the page and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=default_emnist())
    parser.add_argument("--runs", type=int, default=10, help="of figures 6 and 10; of the tuned ones at most 5")
    parser.add_argument("--sweep-runs", type=int, default=3, help="of each point of figures 7, 8 and 9")
    parser.add_argument("--histograms", type=int, default=300, help="trainings for figure 1")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="trainings at a time, a thread each")
    parser.add_argument("--quick", action="store_true", help="one run of each, 40 epochs on the right, fewer points")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.runs = arguments.sweep_runs = 1
        arguments.histograms = 30
    os.environ["OMP_NUM_THREADS"] = "1"
    study = Study(arguments.data, arguments.runs, arguments.sweep_runs, 40 if arguments.quick else EPOCHS_RIGHT, arguments.quick)
    wholes, pnns = study.candidates()
    first = [*study.baseline(), *study.recovered(), *wholes, *pnns, *(training for runs in study.like_lr() for training in runs)]
    swept = [training for group in (*study.left_epochs().values(), *study.kappas().values()) for training in group]
    train_all([*first, *swept], arguments.workers)
    train_all([*study.tuned(best(wholes)), *study.tuned(best(pnns), recovery=True)], arguments.workers)

    histograms = weights_of_many(arguments.data, arguments.histograms, CACHE)
    suffix = "_quick" if arguments.quick else ""
    names = pictures(study, histograms, RESULTS, suffix)
    everything = [*first, *swept, *study.tuned(best(wholes)), *study.tuned(best(pnns), recovery=True)]
    outcomes = [training.outcome() for training in dict.fromkeys(everything)]
    page = text(study, histograms, names, sum(outcome["seconds"] for outcome in outcomes))
    write_results(f"pnn_paper{suffix}", "The PNN paper, figure by figure", page, {"setting": machine(), "trainings": outcomes})


if __name__ == "__main__":
    main()
