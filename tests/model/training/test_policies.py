"""Policies for whole batches: that timm's are drawn, that what is drawn is done, and which images they take."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.random import RandomState
from PIL import Image
from scipy.stats import chi2_contingency, ks_2samp
from timm.data import auto_augment as timms
from timm.data.auto_augment import AugMixAugment, AutoAugment
from torchvision.transforms import ColorJitter, transforms
from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation

from expertgrid.ablations.study.changes import changed_recipe
from expertgrid.model.system.errors import InputError
from expertgrid.model.training import policies
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.operations import COLOUR, GEOMETRIC
from expertgrid.model.training.pillow import FUNCTIONS
from expertgrid.model.training.policies import NUMBERS, OPERATIONS, Drawn, Policy

CPU = torch.device("cpu")
RANDOM = ImageData.random(100, 32, 32)
DRAWS = 8_000
LEAST_P = 1e-3  # of the same distribution, for seeds that are fixed
FIRST = Image.new("RGB", (32, 32))

ALIKE = """equalize invert rotate posterize solarize solarize_add color contrast brightness sharpness shear_x shear_y
gaussian_blur"""
CALLED = {name: getattr(timms, name) for name in ALIKE.split()} | {  # what timm calls for each of our operations
    "autocontrast": timms.auto_contrast,
    "translate_x": timms.translate_x_rel,
    "translate_y": timms.translate_y_rel,
    "hue": adjust_hue,
}
NAMES = {function: name for name, function in CALLED.items()} | {
    timms.desaturate: "color",
    timms.gaussian_blur_rand: "gaussian_blur",
    adjust_brightness: "brightness",
    adjust_contrast: "contrast",
    adjust_saturation: "color",
}
WITHOUT_VALUE = ("autocontrast", "equalize", "invert")
Sequences = list[list[tuple[str, float, bool]]]  # for each image its operations: name, argument, whether bicubic


def policy(data: ImageData = RANDOM, **fields) -> Policy:
    recipe = changed_recipe("fast", fields)
    return Policy(recipe.auto_augment, recipe.color_jitter, data.mean, data.image_size, CPU)


def ours(drawn: Drawn) -> Sequences:
    return [
        [
            (OPERATIONS[number], value, number != NUMBERS[OPERATIONS[number]])
            for number, value in zip(numbers, values)
            if number
        ]
        for numbers, values in zip(drawn.operations_NL.tolist(), drawn.values_NL.tolist())
    ]


class Recorder:
    """Stands for the functions that timm and torchvision call, and notes the calls."""

    def __init__(self):
        self.calls: Sequences = []

    def of(self, function):
        def record(image, *arguments, resample=None, **_):
            value = arguments[0] if arguments else 0.0
            if function is timms.desaturate:
                value = min(1.0, max(0.0, 1 - value))
            if function is timms.gaussian_blur_rand:
                value = random.uniform(0.1, 2.0 * value)
            cubic = resample is not None and random.choice(resample) == Image.Resampling.BICUBIC
            self.calls[-1].append((NAMES[function], value, cubic and NAMES[function] in GEOMETRIC))
            return image

        return record


def theirs(text: str) -> Sequences:
    """What timm does to DRAWS images."""
    parameters = {"translate_const": 14, "img_mean": (1, 2, 3)}
    if text.startswith("rand"):
        built = timms.rand_augment_transform(text, parameters)
    elif text.startswith("augmix"):
        built = timms.augment_and_mix_transform(text, parameters | {"translate_pct": 0.3})
    else:
        built = timms.auto_augment_transform(text, parameters)
    recorder = Recorder()
    for op in (op for part in built.policy for op in part) if isinstance(built, AutoAugment) else built.ops:
        op.aug_fn = recorder.of(op.aug_fn)
    random.seed(0)
    np.random.seed(0)
    for _ in range(DRAWS):
        recorder.calls.append([])
        built(FIRST)
    return recorder.calls


def p_values(first: Sequences, second: Sequences) -> dict[str, float]:
    """How likely two lists of draws would differ as much, if they were from one distribution.

    Of the operations in their order, and of the arguments of each operation.
    """
    counts = [Counter(tuple((name, cubic) for name, _, cubic in calls) for calls in draws) for draws in (first, second)]
    table = np.array([[count[key] for key in counts[0] | counts[1]] for count in counts])
    rare = table.sum(0) < 20
    table = np.c_[table[:, ~rare], table[:, rare].sum(1)]
    found = {"operations": chi2_contingency(table[:, table.sum(0) > 0]).pvalue if table.shape[1] > 1 else 1.0}
    for name in {name for calls in first for name, *_ in calls} - {*WITHOUT_VALUE}:
        values = [[value for calls in draws for n, value, _ in calls if n == name] for draws in (first, second)]
        always = all(len(set(drawn)) == 1 for drawn in values)
        found[name] = float(values[0][0] == values[1][0]) if always else ks_2samp(*values).pvalue
    return found


POLICIES = """rand-m9-mstd0.5-inc1 rand-m9 rand-m15-mmax20-n1-p1 rand-m7-n3-p0.3-mstd1-tweights
rand-m6-n2-p1-mstd101-inc1 rand-m8-mstd2-t3a rand-m8-mstd2-t3aw original originalr-mstd0.5 v0 v0r-mstd2 3a-mstd0.5"""


@pytest.mark.parametrize("text", POLICIES.split())
def test_draws_have_timms_distribution(text):
    found = p_values(ours(policy(auto_augment=text).draw(RandomState(1), DRAWS)), theirs(text))
    assert min(found.values()) > LEAST_P, found


OTHERS = """rand-m9-mstd0.5 rand-m9-mstd1, rand-m9-inc1 rand-m9, rand-m9-tweights rand-m9-inc1,
rand-m9-p0.5 rand-m9-p0.6, original originalr"""


@pytest.mark.parametrize(("text", "other"), [pair.split() for pair in OTHERS.split(",")])
def test_another_policy_has_another_distribution(text, other):
    found = p_values(ours(policy(auto_augment=text).draw(RandomState(1), DRAWS)), theirs(other))
    assert min(found.values()) < 1e-6, found


@pytest.mark.parametrize("text", ["augmix-m5", "augmix-m3-w4-d2-mstd0.5", "augmix-a0.3"])
def test_augmix_draws_have_timms_distribution(text, monkeypatch):
    """The chains of an image are told apart by what timm mixes after each."""
    mixed, dirichlet, beta = [], np.random.dirichlet, np.random.beta

    def drawn(function):
        def draw(*arguments):
            mixed.append(function(*arguments))
            return mixed[-1]

        return draw

    monkeypatch.setattr(np.random, "dirichlet", drawn(dirichlet))
    monkeypatch.setattr(np.random, "beta", drawn(beta))
    chains = theirs(text)
    drawing = policy(auto_augment=text)
    found = drawing.draw(RandomState(1), DRAWS)
    width = drawing.timms.width
    together = ours(found)
    images = [[call for chain in together[i : i + width] for call in chain] for i in range(0, len(together), width)]
    assert len(images) == len(chains) == DRAWS
    lengths = [np.bincount(list(map(len, calls)), minlength=20) for calls in (images, chains)]
    used = np.array(lengths)[:, np.sum(lengths, 0) > 20]
    assert used.shape[1] == 1 or chi2_contingency(used).pvalue > LEAST_P
    firsts = [[calls[:1] for calls in draws] for draws in (images, chains)]
    values = [[[call] for calls in draws for call in calls] for draws in (images, chains)]
    for pair in (firsts, values):
        p = p_values(*pair)
        assert min(p.values()) > LEAST_P, p
    shares, strengths = np.array(mixed[::2]), np.array(mixed[1::2])
    assert ks_2samp(found.strength_B, strengths).pvalue > LEAST_P
    for k in range(width):
        assert ks_2samp(found.shares_BK[:, k], shares[:, k]).pvalue > LEAST_P
    np.testing.assert_allclose(found.shares_BK.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("jitter", [(0.4, 0.3, 0.2), (0.4, 0, 1.5, 0.1), (0, 0, 0, 0.5)])
def test_jitter_has_torchvisions_distribution(jitter, monkeypatch):
    recorder = Recorder()
    for function in (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue):
        monkeypatch.setattr(transforms.F, function.__name__, recorder.of(function))
    torch.manual_seed(0)
    built = ColorJitter(*jitter)
    for _ in range(DRAWS):
        recorder.calls.append([])
        built(FIRST)
    drawn = policy(color_jitter=jitter).draw(RandomState(1), DRAWS)
    found = p_values(ours(drawn), recorder.calls)
    assert len(found) == 1 + sum(map(bool, jitter))
    assert min(found.values()) > LEAST_P, found


def pils(pixels_HWC: np.ndarray, calls: Sequence[tuple[str, float, bool]], fill: tuple[int, ...]) -> Image.Image:
    """What Pillow makes of an image."""
    image = Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[2] == 1 else pixels_HWC)
    for name, value, cubic in calls:
        kind = {"resample": Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR, "fillcolor": fill}
        if name in GEOMETRIC:
            image = CALLED[name](image, value, **kind)
        elif name == "posterize" and value < 1:
            image = image.point(lambda _: 0)
        else:
            integer = name in ("posterize", "solarize", "solarize_add")
            image = CALLED[name](image, *([] if name in WITHOUT_VALUE else [int(value) if integer else value]))
    return image


@pytest.mark.parametrize("text", ["rand-m9-n3-p0.8-mstd2-inc1", "rand-m10-n3-p1", "v0", "3a", ""])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_drawn_is_done(text, channels, digits):
    data = digits if channels == 1 else RANDOM
    drawing = policy(data, auto_augment=text, color_jitter=(0.4, 0.4, 0.4) if text in ("3a", "") else ())
    pixels_BHWC = torch.from_numpy(data.train.pixels_BHWC[:100])
    before = pixels_BHWC.clone()
    drawn = drawing.draw(RandomState(0), len(pixels_BHWC))
    found = drawing.apply(pixels_BHWC, drawn)
    assert torch.equal(pixels_BHWC, before)
    fill = tuple(drawing.fill_C.tolist())
    assert fill == tuple(round(255 * mean) for mean in data.mean)
    for pixels_HWC, calls, found_HWC in zip(pixels_BHWC.numpy(), ours(drawn), found.numpy()):
        np.testing.assert_array_equal(found_HWC, np.asarray(pils(pixels_HWC, calls, fill)).reshape(found_HWC.shape))
    assert (found != before).flatten(1).any(1).float().mean() > 0.5


@pytest.mark.parametrize("text", ["augmix-m5", "augmix-m7-w4-d2", "augmix-m5-b1"])
def test_augmix_is_mixed_as_timm_does_it(text):
    drawing = policy(auto_augment=text)
    pixels_BHWC = torch.from_numpy(RANDOM.train.pixels_BHWC)
    drawn = drawing.draw(RandomState(0), len(pixels_BHWC))
    plain = policy(auto_augment=text.replace("-b1", "")).draw(RandomState(0), len(pixels_BHWC))  # the shares as drawn
    found = drawing.apply(pixels_BHWC, drawn)
    width, fill, chains = drawing.timms.width, tuple(drawing.fill_C.tolist()), ours(drawn)
    for i, found_HWC in enumerate(found.numpy()):
        done = iter(chains[i * width : (i + 1) * width])
        mixing = AugMixAugment([lambda image, done=done: pils(np.asarray(image), next(done), fill)], 1.0, width, 1)
        mix = mixing._apply_blended if drawing.timms.blended else mixing._apply_basic
        wanted = mix(Image.fromarray(RANDOM.train.pixels_BHWC[i]), plain.shares_BK[i], plain.strength_B[i])
        np.testing.assert_array_equal(found_HWC, np.asarray(wanted))


@pytest.mark.parametrize("text", ["rand-m10-n6-p1", "rand-m20-n6-p1-mmax20-inc1", "3a", "augmix-m5"])
def test_large_images_on_a_cpu_get_the_same_from_pillow(text, monkeypatch):
    fields = {"auto_augment": text} | ({"color_jitter": (0.4, 0.4, 0.4, 0.3)} if text == "3a" else {})
    data = ImageData.random(40, 72, 60)
    pixels_BHWC = torch.from_numpy(data.train.pixels_BHWC)
    by_pillow = policy(data, **fields)
    monkeypatch.setattr(policies, "LARGEST_BATCHED", 72 * 60)
    batched = policy(data, **fields)
    assert (by_pillow.with_pillow, batched.with_pillow) == (True, False)
    drawn = batched.draw(RandomState(0), len(pixels_BHWC))
    assert torch.equal(by_pillow.apply(pixels_BHWC, drawn), batched.apply(pixels_BHWC, drawn))


def test_every_operation_is_timms_or_torchvisions():
    assert {*COLOUR, *GEOMETRIC} == set(CALLED) == set(FUNCTIONS)


def test_an_operation_that_timm_adds_is_refused(monkeypatch):
    monkeypatch.setitem(timms.NAME_TO_OP, "Swirl", timms.invert)
    monkeypatch.setitem(timms.LEVEL_TO_ARG, "Swirl", None)
    monkeypatch.setattr(timms, "_RAND_TRANSFORMS", ["Invert", "Swirl"])
    with pytest.raises(InputError, match=r"auto_augment: .* none of ours: \['Swirl'\]"):
        changed_recipe("fast", {"auto_augment": "rand-m9"})


def test_policies_need_one_or_three_channels(digits):
    recipe = changed_recipe("fast", {"auto_augment": "rand-m9"})
    recipe.check_fits(digits, 1293)
    recipe.check_fits(ImageData.random(200, 32, 32), 180)
    two = replace(digits.train, pixels_BHWC=digits.train.pixels_BHWC.repeat(2, axis=3))
    with pytest.raises(InputError, match="recipe.auto_augment: needs images of 1 or 3 channels; those of"):
        recipe.check_fits(replace(digits, train=two), 1293)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rand-n16-tweights", "16 operations are chosen, each at most once, and there are 15"),
        ("augmix-a0", "nothing can be drawn from it"),
    ],
)
def test_policies_of_which_nothing_can_be_drawn(text, complaint):
    with pytest.raises(InputError, match=complaint):
        changed_recipe("fast", {"auto_augment": text, "batch_size": 8}).check_fits(RANDOM, 90)


def test_jitter_is_for_a_policy_that_uses_it():
    assert changed_recipe("fast", {"auto_augment": "3a", "color_jitter": 0.3}).color_jitter == (0.3, 0.3, 0.3)
    for text in ("rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.3-tweights", "augmix-m5-w4-d2", "original-mstd0.5"):
        with pytest.raises(InputError, match="no effect in timm"):
            changed_recipe("fast", {"auto_augment": text, "color_jitter": 0.3})


def test_nothing_is_drawn_from_the_global_random_numbers(digits):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    policies.check_images("augmix-m5", (), digits)
    drawing = policy(digits, auto_augment="augmix-m5")
    drawing.apply(torch.from_numpy(digits.train.pixels_BHWC[:9]), drawing.draw(RandomState(0), 9))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
