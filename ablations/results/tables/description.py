"""What was trained, and how it was judged, in words: from a study's plan, configs and records. Imports no torch."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.evidence import Evidence
from expertgrid.ablations.results.rows import Results, Row
from expertgrid.ablations.results.tables.notes import counted, test_read_notes, verdict_notes
from expertgrid.ablations.study.levels import level_name
from expertgrid.model.training.recipe import Recipe

OPTIMISERS = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "muon": "Muon", "lamb": "LAMB", "lion": "Lion"}
SCHEDULES = {"none": "constant", "poly": "linear"}
WORDS = {  # of a recipe's fields; the others go by their names
    "epochs": "{} epochs", "batch_size": "batch size {:,}", "opt": "{}", "lr": "learning rate {:g}", "augment": "{}",
    "weight_decay": "weight decay {:g}", "filter_bias_and_bn": "none on biases and norms", "opt_betas": "betas {}",
    "layer_decay": "layer decay {:g}", "sched": "{} schedule", "decay_epochs": "a decay every {:g} epochs",
    "decay_rate": "by {:g}", "warmup": "warm-up {:g}", "ema_decay": "EMA of the weights {:g}", "auto_augment": "{}",
    "smoothing": "label smoothing {:g}", "normalise": "pixels normalised by {}", "color_jitter": "color jitter {}",
    "hflip": "horizontal flip {:g}", "alternating_flip": "in every other epoch", "mixup": "mixup {:g}",
    "crop_padding": "random crop with padding {}", "translate": "shift up to {} pixels", "cutout": "Cutout {}",
    "reprob": "random erasing {:g}", "cutmix": "CutMix {:g}", "small_size": "images of {} pixels at first",
}  # fmt: skip
ALWAYS = ("epochs", "batch_size", "opt", "lr", "sched")
FIELDS = [name for name in Recipe.model_fields if name != "amp"]  # records say whether it was on
AUGMENTATION = [name for name in FIELDS[FIELDS.index("auto_augment") : FIELDS.index("tta")] if name != "normalise"]


def recipe_in_words(recipe: Recipe, varied: Collection[str] = ()) -> str:
    """The fields that are not in `varied` and differ from their defaults, or that each training has."""
    values = dict(recipe) | {"opt": OPTIMISERS.get(recipe.opt, recipe.opt)}
    values |= {"sched": SCHEDULES.get(recipe.sched, recipe.sched)}

    def said(names: Iterable[str]) -> str:
        return ", ".join(
            WORDS.get(name, f"{name} {{}}").format(values[name])
            for name in names
            if name not in varied and (name in ALWAYS or values[name] != Recipe.model_fields[name].default)
        )

    augmentation = said(AUGMENTATION) or ("" if set(varied) & set(AUGMENTATION) else "none")
    training = said(name for name in FIELDS if name not in AUGMENTATION)
    return training + (f"; augmentation: {augmentation}" if augmentation else "")


def describe(directory: StudyDirectory, results: Results) -> list[str]:
    """What a study trained, in two lines. What its cells differ in is left out: these are the factors.

    Reads the config of one trial of each cell.
    """
    study, plan, rows = results.study, results.plan, results.rows
    firsts = (directory.config(next(iter(row.trials.values()))) for row in rows if not row.control)
    configs = [config for config in firsts if config]
    models = list(dict.fromkeys(row.model for row in rows if row.levels or not study.factors))
    ours = [f"{name} {level_name(level)}" for name, level in study.set.items() if not name.startswith("recipe.")]
    network = (models[0] if len(models) == 1 else f"{len(models)} networks") + " with " * bool(ours) + ", ".join(ours)
    weights = {config.weights.source if config.weights else "fresh" for config in configs}
    network += f", from {weights.pop()} weights" if len(weights) == 1 else ""
    several = sorted({"recipe", "reference"} & study.factors.keys())
    recipe = f"by the factor {several[0]}" if several else study.base.recipe
    recipe += " with changes" if len(ours) < len(study.set) else ""
    if configs:
        varied = [name for name in FIELDS if len({str(getattr(config.recipe, name)) for config in configs}) > 1]
        recipe += f": {recipe_in_words(configs[0].recipe, varied)}"
    seeds = sorted({row.seeds for row in rows})
    count = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else seeds[0]
    records = [record for row in rows for record in row.records]
    each = [
        (
            of.device,
            counted(of.threads, "thread"),
            "bf16" if record.bfloat16 else "fp32",
            *(f"{name} {of.versions.get(name, 'of an unknown version')}" for name in ("torch", "timm", "expertgrid")),
        )
        for record in records
        for of in [record.environment]
    ]
    on = f" Trained on {', '.join(_and(sorted(set(values))) for values in zip(*each))}." if each else ""
    return [
        f"Network: {network}. Recipe: {recipe}.",
        f"Data: {plan.data}; {count} seeds; held out: {plan.hold_out}.{on}",
    ]


def methods(directory: StudyDirectory, evidence: Evidence) -> str:
    """The paragraph for a paper: what was done, as far as the records show it."""
    results = evidence.results
    study, rows = results.study, results.rows
    design = "all combinations of" if study.design == "factorial" else "the base, and one change each of"
    factors = [f"{name} ({', '.join(map(level_name, levels))})" for name, levels in study.factors.items()]
    same = " (equal ones were trained once)" if len(rows) < len(results.plan.cells_with_trials) else ""
    sentences = [
        f"We compared {counted(len(rows), 'network')}{f': {design} {_and(factors)}{same}' if factors else ''}.",
        *describe(directory, results),
        trials_line(rows),
        f"All networks of a seed share their hold-out, whose {evidence.scale.title} after the last step decides.",
        *test_read_notes(directory),
    ]
    if any(row.control for row in rows):
        sentences.append("The base was trained once more, from other seeds on the same hold-outs, as a control.")
    if evidence.judgements:
        families = ["the main effects"] * bool(evidence.effects) + ["the cells against the base"]
        families += ["the contrasts that the study names"] * bool(evidence.declared)
        sentences += [
            "Differences are least-squares estimates within seeds, with 95% intervals that hold together in each "
            f"family by the joint t distribution (families: {_and(families)}).",
            *verdict_notes(evidence),
        ]
    if any(row.no_verdict for row in rows):
        sentences.append("A network of which a training diverged has no verdict.")
    taken = [adopted.directory for row in rows for adopted in row.adopted.values()]
    sentences += [f"Of the trainings {len(taken)} were taken over from {_and(sorted(set(taken)))}."] if taken else []
    other = sum(len(row.other_code) for row in rows)
    return " ".join(sentences + [f"Trainings of other code were left out: {other}."] * bool(other))


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def trials_line(rows: Sequence[Row]) -> str:
    """How many trials there are, and what became of them."""
    kinds = Counter({trial: failure.kind for row in rows for trial, failure in row.failures.items()}.values())
    done = len({record.trial for row in rows for record in row.records})
    missing = len({trial for row in rows for trial in row.missing})
    parts = [f"{done:,} finished", *(f"{count:,} {kind.replace('_', ' ')}" for kind, count in kinds.items())]
    parts += [f"{missing:,} not finished"] if missing else []
    planned = len({trial for row in rows for trial in row.trials.values()})
    return f"{planned:,} trials were planned: {', '.join(parts)}."
