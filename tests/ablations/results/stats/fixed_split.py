"""What a study would have said with a fixed split and the test that is usual for it: fixed_split.py DIR.

The networks are the same. The fixed split is the test images, on which all of them were measured. The usual test
compares each cell with the base by a paired t-test over the seeds, corrected by Holm. Beside it: the study's own
verdicts, and its spread from seed to seed against what finite hold-outs alone give.
"""

import sys
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.stats import ttest_rel
from statsmodels.stats.multitest import multipletests

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.evidence import Evidence, read_evidence
from expertgrid.ablations.results.rows import on_test
from expertgrid.ablations.results.stats.contrasts import judge
from expertgrid.ablations.results.stats.planning import binomial_spread
from expertgrid.model.system.text import render


def spreads(directory: StudyDirectory, found: Evidence) -> dict[str, float]:
    """Standard deviations in points of a network's validation accuracy from seed to seed, within a hold-out.

    Networks that share their images differ by at least what the images on which only one of a pair is right would give,
    were they drawn anew. `binomial` is of networks that share none.
    """
    shares, images = [], 0
    for seed in range(found.results.study.seeds):
        trials = [row.trials[seed] for row in found.results.rows if seed in row.by_seed]
        kept = [directory.predictions(trial) for trial in dict.fromkeys(trials)]
        right = [one.validation == one.validation_labels for one in kept if one is not None]
        images = len(right[0])
        shares += [float((first != second).mean()) for first, second in combinations(right, 2)]
    accuracy = float(np.mean([row.mean(lambda record: 100 * record.validation_accuracy) for row in found.results.rows]))
    return {
        "measured": found.spread or float("nan"),
        "floor, shared images": 100 * float(np.sqrt(np.mean(shares) / images / 2)),
        "binomial": binomial_spread(accuracy, images),
    }


def effects(found: Evidence) -> list[dict[str, object]]:
    """The main effects: on each seed's own hold-out, as the study says, and on the test images by the same model."""
    first = {network: row for row, network in reversed(list(zip(found.results.row_of, found.asked.network_of)))}
    scores_US = found.results.scores(on_test)[[first[unit] for unit in range(len(found.asked.networks))]]
    on_fixed = judge(found.asked.effect_weights_QU, scores_US, found.margin).judgements
    return [
        {
            "factor": effect.factor,
            "change": effect.change,
            "rotating": f"{effect.judgement.mean:+.2f} {effect.judgement.verdict}",
            "test images": f"{fixed.mean:+.2f} {fixed.verdict}",
        }
        for effect, fixed in zip(found.effects, on_fixed)
    ]


def cells(found: Evidence) -> list[dict[str, object]]:
    """Each cell against the base: the study's verdict, and the usual test's on the test images."""
    scores_CS = found.results.scores(on_test)
    p_C = [ttest_rel(scores_S, scores_CS[0]).pvalue for scores_S in scores_CS[1:]]
    decided_C = multipletests(p_C, alpha=0.05, method="holm")[0]
    return [
        {
            "cell": row.name,
            "rotating": f"{judgement.mean:+.2f} {judgement.verdict}" if judgement and judgement.mean else None,
            "test images, paired t and Holm": f"{difference:+.2f} {'decided' if decided else 'undecided'}",
        }
        for row, judgement, difference, decided in zip(
            found.results.rows[1:], found.against_base[1:], (scores_CS - scores_CS[0]).mean(1)[1:], decided_C
        )
    ]


def main(place: Path) -> None:
    directory = StudyDirectory(place)
    found = read_evidence(directory)
    print("\n".join(f"{name}: {value:.2f} points" for name, value in spreads(directory, found).items()), "\n")
    print(render(effects(found), "text"), "\n")
    print(render(cells(found), "text"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
