"""What was trained, and how it was judged, in words: from a study's plan, configs and records. Imports no torch."""

from collections import Counter
from collections.abc import Collection, Sequence

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.evidence import Evidence
from expertgrid.ablations.results.rows import Results, Row
from expertgrid.ablations.results.tables.notes import counted, machine_words, test_read_notes, verdict_notes
from expertgrid.ablations.study.levels import level_name
from expertgrid.model.system.text import listed
from expertgrid.model.training.recipe import Recipe

NAMES = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "muon": "Muon", "poly": "linear", "none": "constant"}
WORDS = {  # of a recipe's fields; the others go by their names
    "epochs": "epochs {}", "batch_size": "batch size {:,}", "opt": "{}", "lr": "learning rate {:g}", "augment": "{}",
    "weight_decay": "weight decay {:g}", "filter_bias_and_bn": "none on biases and norms", "opt_betas": "betas {}",
    "layer_decay": "layer decay {:g}", "sched": "{} schedule", "decay_epochs": "a decay every {:g} epochs",
    "decay_rate": "by {:g}", "warmup": "warm-up {:g}", "ema_decay": "EMA of the weights {:g}", "auto_augment": "{}",
    "smoothing": "label smoothing {:g}", "normalise": "pixels normalised by {}", "color_jitter": "color jitter {}",
    "hflip": "horizontal flip {:g}", "alternating_flip": "in every other epoch", "vflip": "vertical flip {:g}",
    "scale": "resized crop of areas {}", "ratio": "of ratios {}", "clip_grad": "gradients clipped at the norm {:g}",
    "crop_padding": "random crop with padding {}", "translate": "shift up to {} pixels", "cutout": "Cutout {}",
    "reprob": "random erasing {:g}", "mixup": "mixup {:g}", "cutmix": "CutMix {:g}",
    "small_size": "images of {} pixels at first",
}  # fmt: skip
ALWAYS = ("epochs", "batch_size", "opt", "lr", "sched")
FIELDS = list(Recipe.model_fields)
AUGMENTATION = set(FIELDS[FIELDS.index("auto_augment") : FIELDS.index("amp")]) - {"normalise"}


def recipe_in_words(recipe: Recipe, varied: Collection[str] = ()) -> str:
    """The fields that are not in `varied` and differ from their defaults, or that each training has."""
    words: dict[bool, list[str]] = {False: [], True: []}
    for name, value in recipe:
        is_said = name in ALWAYS or value != Recipe.model_fields[name].default
        if is_said and name not in (*varied, "amp"):  # records say whether that was on
            words[name in AUGMENTATION].append(WORDS.get(name, f"{name} {{}}").format(NAMES.get(value, value)))
    without = "what the factors say" if AUGMENTATION & set(varied) else "none"
    return f"{', '.join(words[False])}; augmentation: {', '.join(words[True]) or without}"


def describe(directory: StudyDirectory, results: Results, rows: Sequence[Row] = ()) -> list[str]:
    """What a study trained, or some of its rows, in two lines. What these differ in is left out: a table has it.

    Reads the config of one trial of each row.
    """
    study, plan, rows = results.study, results.plan, rows or results.rows
    firsts = (directory.config(next(iter(row.trials.values()))) for row in rows if not row.control)
    configs = [config for config in firsts if config]
    models = list(dict.fromkeys(row.model for row in rows if row.levels or not study.factors))
    ours = [f"{name} {level_name(level)}" for name, level in study.set.items() if not name.startswith("recipe.")]
    network = (models[0] if len(models) == 1 else f"{len(models)} networks") + " with " * bool(ours) + ", ".join(ours)
    weights = {config.weights.source if config.weights else "fresh" for config in configs}
    network += f", from {weights.pop()} weights" if len(weights) == 1 else ""
    recipe = "that of each" if {"recipe", "reference"} & study.factors.keys() else study.base.recipe
    recipe += " with changes" if len(ours) < len(study.set) else ""
    for first in configs[:1]:
        varied = [name for name, value in first.recipe if any(getattr(of.recipe, name) != value for of in configs)]
        recipe += f": {recipe_in_words(first.recipe, varied)}"
    used = [
        (
            *machine_words(record),
            *(f"{name} {record.environment.versions.get(name, '?')}" for name in ("timm", "expertgrid")),
        )
        for row in rows
        for record in row.records
    ]
    on = f" Trained on {', '.join(listed(sorted(set(values))) for values in zip(*used))}." if used else ""
    seeds = listed([str(count) for count in sorted({row.seeds for row in rows})])
    return [
        f"Network: {network}. Recipe: {recipe}.",
        f"Data: {plan.data}; {seeds} seed{'s' * (seeds != '1')}; held out: {plan.hold_out}.{on}",
    ]


def methods(directory: StudyDirectory, evidence: Evidence) -> str:
    """The paragraph for a paper: what was done, as far as the records show it."""
    results = evidence.results
    study, rows = results.study, results.rows
    design = "all combinations of" if study.design == "factorial" else "the base, and one change each of"
    factors = [f"{name} ({', '.join(map(level_name, levels))})" for name, levels in study.factors.items()]
    same = " (equal ones were trained once)" if len(rows) < len(results.plan.cells) else ""
    families = ["the main effects"] * bool(evidence.effects) + ["the cells against the base"]
    families += ["the contrasts that the study names"] * bool(evidence.declared)
    judged = [
        "Differences are least-squares estimates within seeds, with 95% intervals that hold together in each family by "
        f"the joint t distribution (families: {listed(families)}).",
        *verdict_notes(evidence),
    ]
    taken = [adopted.directory for row in rows for adopted in row.adopted.values()]
    sentences = [
        f"We compared {counted(len(rows), 'network')}{f': {design} {listed(factors)}{same}' if factors else ''}.",
        *describe(directory, results),
        trials_line(rows),
        *([f"Of them {len(taken)} were taken over from {listed(sorted(set(taken)))}."] if taken else []),
        f"All networks of a seed share their hold-out, whose {evidence.scale.title} after the last step decides.",
        *test_read_notes(directory),
        *(judged if evidence.judgements else []),
    ]
    return " ".join(sentences)


def trials_line(rows: Sequence[Row]) -> str:
    """How many trials there are, and what became of them."""
    kinds = Counter({trial: failure.kind for row in rows for trial, failure in row.failures.items()}.values())
    done = len({record.trial for row in rows for record in row.records})
    missing = len({trial for row in rows for trial in row.missing})
    parts = [f"{done:,} finished", *(f"{count:,} {kind.replace('_', ' ')}" for kind, count in kinds.items())]
    parts += [f"{missing:,} not finished"] if missing else []
    planned = len({trial for row in rows for trial in row.trials.values()})
    return f"{planned:,} trials were planned: {', '.join(parts)}."
