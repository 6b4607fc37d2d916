"""The hold-out: a partition of the train images, stratified, that the data fixes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.datasets import load_digits

from expertgrid.model.system.errors import InputError
from expertgrid.model.training.holdout import HoldOut, partition_of

LABELS_B = load_digits().target
ROTATING, FIXED = HoldOut(), HoldOut(kind="fixed")


@st.composite
def partitions(draw) -> tuple[np.ndarray, int, str, int]:
    """Labels, the number of parts, a fingerprint, and the number of the partition."""
    parts = draw(st.integers(2, 100))
    counts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12))
    labels_B = np.repeat(np.arange(len(counts)), counts)
    order = np.random.default_rng(draw(st.integers(0, 99))).permutation(len(labels_B))
    return labels_B[order], parts, draw(st.text(max_size=8)), draw(st.integers(0, 200))


@settings(max_examples=100, deadline=None)
@given(partitions())
def test_parts_are_stratified_and_of_equal_size_within_one_image(drawn):
    labels_B, parts, fingerprint, number = drawn
    part_B = partition_of(labels_B, parts, fingerprint, number)
    assert part_B.shape == labels_B.shape
    sizes = np.bincount(part_B, minlength=parts)
    assert len(sizes) == parts, "no image is in a part that there is not"
    assert np.ptp(sizes) <= 1
    for label in np.unique(labels_B):
        assert np.ptp(np.bincount(part_B[labels_B == label], minlength=parts)) <= 1


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 50), st.floats(0.01, 0.5), st.text(max_size=8), st.integers(0, 3))
def test_the_seeds_of_a_partition_hold_out_each_image_once(of_each_class, share, fingerprint, partition):
    hold_out = HoldOut(share=share)
    labels_B = np.arange(10 * of_each_class) % 10
    first = partition * hold_out.parts
    held_out = [hold_out.held_out(labels_B, fingerprint, first + part) for part in range(hold_out.parts)]
    assert sorted(np.concatenate(held_out).tolist()) == list(range(len(labels_B)))
    assert all((np.diff(indices) > 0).all() for indices in held_out), "they are in the order of the source"
    assert hold_out.size(labels_B, fingerprint) == len(held_out[0]) == max(map(len, held_out))


@pytest.mark.parametrize(("share", "parts"), [(0.1, 10), (0.5, 2), (0.02, 50), (0.3, 3), (0.01, 100)])
def test_a_share_makes_so_many_parts(share, parts):
    hold_out = HoldOut(share=share)
    assert hold_out.parts == parts
    assert str(hold_out) == f"each seed its own, one of {parts} parts of the train images"


def test_the_data_fix_the_partition():
    first, same, other = (partition_of(LABELS_B, 10, fingerprint, 0) for fingerprint in ("a", "a", "b"))
    assert (first == same).all()
    assert (first == other).mean() < 0.15, "a tenth of the images are in the same part by chance"


def test_the_partition_stays():
    """The same trials hold out the same images in the next version, and with another version of NumPy."""
    assert "".join(map(str, partition_of(np.arange(20) % 2, 5, "data", 0))) == "33203204421121034014"


def test_seeds_beyond_the_parts_take_a_further_partition():
    parts = [[set(ROTATING.held_out(LABELS_B, "data", 10 * number + part)) for part in range(10)] for number in (0, 1)]
    assert set.union(*parts[0]) == set.union(*parts[1]) == set(range(len(LABELS_B)))
    shared = [len(first & second) for first in parts[0] for second in parts[1]]
    assert max(shared) < 50, "parts of 180 images share 18 by chance"


def test_a_fixed_hold_out_is_the_first_part_for_all_seeds():
    first = ROTATING.held_out(LABELS_B, "data", 0)
    for seed in (0, 1, 9, 10, 999):
        assert FIXED.held_out(LABELS_B, "data", seed).tolist() == first.tolist()
    assert not set(first) & set(ROTATING.held_out(LABELS_B, "data", 1))
    assert str(FIXED) == "the same for all seeds, one of 10 parts of the train images"


def test_a_class_of_few_images_is_named_and_one_that_cannot_be_held_out_is_refused():
    pets = ("cat", "dog", "owl")
    labels_B = np.repeat([0, 1, 2], [100, 24, 2])
    ROTATING.check_fits(labels_B, pets, "pets")
    assert ROTATING.few_images(labels_B, pets) == (
        "class 'owl' has 0 to 1 validation images, which say little of it (2 classes have fewer than 10)"
    )
    of_owl = [(labels_B[ROTATING.held_out(labels_B, "data", seed)] == 2).sum() for seed in range(10)]
    assert sorted(of_owl) == [0] * 8 + [1] * 2
    assert ROTATING.few_images(np.repeat([0, 1, 2], [100, 100, 20]), pets) == (
        "class 'owl' has 2 validation images, which say little of it"
    )
    assert ROTATING.few_images(np.repeat([0, 1, 2], 100), pets) == ""
    with pytest.raises(InputError) as error:
        ROTATING.check_fits(np.repeat([0, 1, 2], [20, 1, 10]), pets, "pets")
    assert str(error.value) == "hold-out of pets: class 'dog' has 1 train images; at least 2 are needed"


@pytest.mark.parametrize("fields", [{"share": 0.0}, {"share": 0.6}, {"kind": "random"}, {"seed": 1}])
def test_wrong_hold_outs(fields):
    with pytest.raises(ValidationError):
        HoldOut(**fields)
