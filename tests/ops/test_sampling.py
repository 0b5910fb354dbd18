import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sephjax.ops import sampling

KEY = jax.random.key(3)
N = 40
kinds = hnp.arrays(np.int8, (N,), elements=st.sampled_from([-1, 0, 0, 1]))
seeds = st.integers(0, 2**31 - 1)


@functools.partial(
    jax.jit,
    static_argnames=(
        "count",
        "positive_fraction",
        "balance_positives",
        "balance_negatives",
        "fill",
        "positive_groups",
        "positive_bins",
        "bins",
    ),
)
def run(key, kind, iou, matched, **options):
    return sampling.sample_rois(
        key, positive=kind == 1, negative=kind == 0, iou=iou, matched=matched, **options
    )


def draw(
    kind,
    *,
    key=KEY,
    iou=None,
    matched=None,
    balance=False,
    fill="repeat",
    count=16,
    fraction=0.25,
    **more,
):
    """Indices and validity as NumPy for given kinds: 1 positive, 0 negative, -1 ignored."""
    kind = jnp.asarray(kind)
    iou = jnp.zeros(kind.shape) if iou is None else jnp.asarray(iou, jnp.float32)
    matched = (
        jnp.zeros(kind.shape, jnp.int32) if matched is None else jnp.asarray(matched, jnp.int32)
    )
    options = {"count": count, "positive_fraction": fraction, "fill": fill} | more
    out = run(
        key, kind, iou, matched, balance_positives=balance, balance_negatives=balance, **options
    )
    return tuple(np.asarray(x) for x in out)


def spread(kind, wanted):
    """Smallest and largest number of times that an element of the kind was taken."""
    counts = np.bincount(wanted, minlength=len(kind))
    return counts.min(), counts.max()


@given(kinds, seeds)
def test_a_subsample_takes_what_is_there_up_to_its_quota(kind, seed):
    positive, negative = jnp.asarray(kind == 1), jnp.asarray(kind == 0)
    taken = sampling.subsample(
        jax.random.key(seed), positive, negative, count=12, positive_fraction=0.5
    )
    positives, negatives = (np.asarray(x) for x in taken)
    assert not (positives & (kind != 1)).any()
    assert not (negatives & (kind != 0)).any()
    assert positives.sum() == min(6, (kind == 1).sum())
    assert negatives.sum() == min(12 - positives.sum(), (kind == 0).sum())


def test_a_subsample_may_want_more_than_there_is():
    positive, negative = jnp.array([True, False, False]), jnp.array([False, True, True])
    taken = sampling.subsample(KEY, positive, negative, count=256, positive_fraction=0.5)
    np.testing.assert_array_equal(taken[0], positive)
    np.testing.assert_array_equal(taken[1], negative)


def test_a_subsample_is_uniform():
    kind = jnp.array([1] * 8 + [0] * 12)
    take = jax.vmap(
        lambda key: sampling.subsample(key, kind == 1, kind == 0, count=8, positive_fraction=0.5)
    )
    positives, negatives = take(jax.random.split(KEY, 4000))
    # Every element is taken half (a third) of the times; 5 sigma is .04 (.037).
    np.testing.assert_allclose(np.mean(positives, axis=0)[:8], 0.5, atol=0.04)
    np.testing.assert_allclose(np.mean(negatives, axis=0)[8:], 1 / 3, atol=0.037)


@given(kinds, seeds, st.booleans())
def test_the_plain_sampler_takes_positives_first_and_nothing_twice(kind, seed, balance):
    matched = np.arange(N) % 5
    indices, valid = draw(
        kind,
        key=jax.random.key(seed),
        fill="none",
        balance=balance,
        matched=matched,
        iou=np.linspace(0, 0.6, N),
    )
    p, q = min(4, (kind == 1).sum()), (kind == 0).sum()
    expected = [1] * p + [0] * min(16 - p, q)
    np.testing.assert_array_equal(kind[indices[valid]], expected)
    assert not valid[len(expected) :].any()
    assert len(set(indices[valid])) == len(expected)
    assert (indices[~valid] == 0).all()


@given(kinds, seeds, st.booleans())
def test_the_exact_sampler_obeys_its_cases(kind, seed, balance):
    indices, valid = draw(
        kind,
        key=jax.random.key(seed),
        balance=balance,
        matched=np.arange(N) % 3,
        iou=np.linspace(0, 0.6, N),
    )
    p, q = (kind == 1).sum(), (kind == 0).sum()
    chosen = kind[indices]
    if p + q == 0:
        assert not valid.any()
        assert (indices == 0).all()
        return
    assert valid.all()
    assert (chosen >= 0).all()
    assert (np.diff(chosen) <= 0).all()  # positives first
    if p > 0 and q >= 12:
        assert (chosen == 1).sum() == min(p, 4)
        assert len(set(indices[chosen == 1])) == min(p, 4)
    if p + q >= 16 and (q >= 16 or p == 0 or q < 12):
        assert len(set(indices)) == 16


def test_the_case_of_enough_of_both():
    kind = np.array([1] * 10 + [0] * 20 + [-1] * 10)
    indices, _ = draw(kind)
    np.testing.assert_array_equal(kind[indices], [1] * 4 + [0] * 12)
    assert len(set(indices)) == 16


@pytest.mark.parametrize("balance", [False, True])
def test_the_case_of_few_positives_repeats_negatives_when_short(balance):
    # 2 positives, 13 negatives: 14 are wanted, at least 12 are there, so one comes twice.
    kind = np.array([1] * 2 + [0] * 13 + [-1] * 25)
    indices, _ = draw(kind, balance=balance)
    np.testing.assert_array_equal(kind[indices], [1] * 2 + [0] * 14)
    assert sorted(indices[:2]) == [0, 1]
    low, high = spread(kind[2:15], indices[2:] - 2)
    assert low >= (0 if balance else 1)
    assert high == 2


def test_the_case_of_no_positive_or_few_negatives_draws_from_all():
    kind = np.array([0] * 20 + [-1] * 20)
    assert len(set(draw(kind)[0])) == 16
    # 30 positives and 8 negatives: more than a quarter may be positive.
    kind = np.array([1] * 30 + [0] * 8 + [-1] * 2)
    indices, _ = draw(kind)
    assert len(set(indices)) == 16
    assert (kind[indices] == 1).sum() >= 8


def test_a_short_list_is_repeated_evenly():
    kind = np.array([1] * 3 + [0] * 2 + [-1] * 35)  # 16 slots for 5: three or four times each
    indices, valid = draw(kind)
    assert valid.all()
    assert spread(kind[:5], indices) == (3, 4)


@pytest.mark.parametrize(
    ("wanted", "quota", "count", "p"), [(96, 12, 128, 32), (384, 48, 512, 128)]
)
def test_balanced_negatives_fill_their_bins_by_quota(wanted, quota, count, p):
    # Section 9's figures: 8 bins, quota wanted // 8, the rest from the pool.
    rng = np.random.default_rng(0)
    iou = np.concatenate([np.zeros(800), rng.uniform(0.0625, 0.5, 700), np.full(p, 0.8)])
    kind = np.array([0] * 1500 + [1] * p)
    edges = -0.2 + 0.0875 * np.arange(1, 8)
    bins = np.digitize(iou, edges)
    assert set(bins[kind == 0]) == {2, 3, 4, 5, 6, 7}  # bins 0 and 1 are always empty
    indices, _ = draw(kind, iou=iou, balance=True, count=count)
    negatives = indices[kind[indices] == 0]
    assert len(set(negatives)) == wanted
    taken = np.bincount(bins[negatives], minlength=8)
    assert (taken[2:] >= quota).all()
    assert wanted - 6 * quota >= wanted // 4  # from the pool
    # The pool is mostly easy: bin 2 holds over half of it.
    assert taken[2] > quota + (wanted - 6 * quota) // 4


def test_a_bin_smaller_than_its_quota_is_taken_whole():
    iou = np.concatenate([np.zeros(300), np.full(5, 0.2), np.full(200, 0.45), np.full(32, 0.9)])
    kind = np.array([0] * 505 + [1] * 32)
    for seed in range(5):
        indices, _ = draw(kind, iou=iou, balance=True, count=128, key=jax.random.key(seed))
        taken = indices[kind[indices] == 0]
        assert len(set(taken)) == 96
        assert np.isin(np.arange(300, 305), taken).all()
        assert (np.isin(taken, np.arange(305, 505))).sum() >= 12


def test_balanced_positives_are_shared_among_ground_truths():
    # 60 positives of ground truth 7, 10 of 2, 3 of 5; 32 wanted: quota 10 each, 3 of the last, 9
    # from the pool, which only ground truth 7 has.
    matched = np.array([7] * 60 + [2] * 10 + [5] * 3 + [1] * 200)
    kind = np.array([1] * 73 + [0] * 200)
    indices, _ = draw(kind, matched=matched, balance=True, count=128)
    taken = np.bincount(matched[indices[:32]], minlength=8)
    np.testing.assert_array_equal(taken, [0, 0, 10, 0, 0, 3, 0, 19])
    assert len(set(indices[:32])) == 32


def test_more_ground_truths_than_wanted_positives_skip_the_shares():
    matched = np.concatenate([np.arange(50), np.zeros(200, np.int64)])
    kind = np.array([1] * 50 + [0] * 200)
    indices, _ = draw(kind, matched=matched, balance=True, count=64)
    assert len(set(indices[:16])) == 16
    assert (kind[indices[:16]] == 1).all()


def test_the_first_sampler_shares_positives_among_five_bins_of_iou():
    # 32 wanted, 6 a bin: 6 of 0.55, none of the empty two, 6 of 0.75, all 3 of 1.0, which is in the
    # last bin; the other 17 come from the 54 and 4 that are left.
    iou = np.array([0.55] * 60 + [0.75] * 10 + [1.0] * 3 + [0.0] * 200)
    kind = np.array([1] * 73 + [0] * 200)
    matched = np.arange(273) % 7
    for seed in range(5):
        options = {"iou": iou, "matched": matched, "key": jax.random.key(seed)}
        indices, _ = draw(kind, balance=True, count=128, positive_groups="iou", **options)
        assert (kind[indices] == 1).sum() == len(set(indices[:32])) == 32
        taken = np.unique(iou[indices[:32]], return_counts=True)
        np.testing.assert_array_equal(taken[0], [0.55, 0.75, 1.0])
        assert taken[1][0] >= 6
        assert taken[1][1] >= 6
        assert taken[1][2] == 3
        truths, _ = draw(kind, balance=True, count=128, **options)
        assert set(truths[:32]) != set(indices[:32])


def test_the_first_samplers_bins_of_positives_have_a_tenth_each():
    # Two of each bin and two wanted of each: every one is taken, which other edges would not give.
    iou = np.array([0.5, 0.59, 0.6001, 0.69, 0.7001, 0.79, 0.8001, 0.89, 0.9001, 1.0])
    many = np.concatenate([iou, np.full(30, 0.55), np.zeros(100)])
    kind = np.array([1] * 40 + [0] * 100)
    indices, _ = draw(kind, iou=many, balance=True, count=40, positive_groups="iou")
    assert set(range(2, 10)) <= set(indices[:10])
    # As few positives as are wanted are all taken, whatever their bins.
    indices, _ = draw(kind, iou=many, balance=True, count=200, positive_groups="iou")
    assert set(indices[kind[indices] == 1]) == set(range(40))


def test_the_first_sampler_has_seven_bins_of_negatives():
    # EXPERIMENTS 4.2: seven bins from -0.2 to 0.5, 13 of 96 each; "IoU reported 0" is in the third.
    rng = np.random.default_rng(1)
    zeros, low = np.zeros(1500), rng.uniform(0.0625, 0.0999, 40)
    iou = np.concatenate(
        [zeros, low, *(rng.uniform(b, b + 0.0999, 13) for b in (0.1, 0.2, 0.3, 0.4))]
    )
    iou = np.concatenate([iou, np.full(32, 0.8)])
    kind = np.array([0] * 1592 + [1] * 32)
    options = {"iou": iou, "balance": True, "count": 128, "positive_groups": "iou"}
    for seed in range(4):
        indices, _ = draw(kind, bins=7, key=jax.random.key(seed), **options)
        taken = indices[kind[indices] == 0]
        assert len(set(taken)) == 96
        assert np.isin(np.arange(1540, 1592), taken).all()  # the four upper bins, whole
        # 13 and 31 of one bin, in which low IoUs are one in 38; a bin of their own would give 13.
        assert np.isin(taken, np.arange(1500, 1540)).sum() < 8
    eight, _ = draw(kind, **options)
    assert np.isin(eight, np.arange(1500, 1540)).sum() >= 12


def test_a_balanced_choice_is_uniform_within_a_bin():
    kind = np.array([0] * 24 + [1] * 4)
    iou = np.array([0.0] * 16 + [0.3] * 8 + [0.9] * 4)
    keys = jax.random.split(KEY, 3000)
    indices = jax.vmap(
        lambda key: run(
            key,
            jnp.asarray(kind),
            jnp.asarray(iou, jnp.float32),
            jnp.zeros(28, jnp.int32),
            count=16,
            positive_fraction=0.25,
            balance_positives=True,
            balance_negatives=True,
            fill="repeat",
        )[0]
    )(keys)
    often = np.bincount(np.asarray(indices).ravel(), minlength=28)[:24] / 3000
    # 12 negatives: one from each bin, ten from the pool of 15 + 7, so 1 + 150/22 of 16 easy ones.
    np.testing.assert_allclose(often[:16], (1 + 150 / 22) / 16, atol=0.05)
    np.testing.assert_allclose(often[16:], (1 + 70 / 22) / 8, atol=0.05)


def test_what_is_ignored_never_matters():
    kind = np.array([1] * 6 + [0] * 14 + [-1] * 20)
    iou, matched = np.linspace(0, 0.6, N), np.arange(N) % 4
    indices, _ = draw(kind, iou=iou, matched=matched, balance=True)
    shuffled = np.random.default_rng(0).permutation(20) + 20
    iou[20:], matched[20:] = iou[shuffled] * 3, matched[shuffled] + 9
    again, _ = draw(kind, iou=iou, matched=matched, balance=True)
    np.testing.assert_array_equal(indices, again)


def test_the_key_decides_the_sample():
    kind = np.array([1] * 10 + [0] * 30)
    first, again, other = (draw(kind, key=jax.random.key(seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("there", [1, 3, 16, 40])
def test_appended_ground_truths_are_sixteen_mirrored_or_cut(there):
    valid = np.zeros(50, bool)
    members = np.random.default_rng(there).permutation(50)[:there]
    valid[members] = True
    indices, ok = sampling.repeat_truth(KEY, jnp.asarray(valid))
    indices = np.asarray(indices)
    assert indices.shape == (16,)
    assert np.asarray(ok).all()
    assert valid[indices].all()
    assert len(set(indices)) == min(there, 16)
    if there == 3:
        a, b, c = indices[:3]
        np.testing.assert_array_equal(indices, [a, b, c, c, b, a, a, b, c, c, b, a, a, b, c, c])


def test_an_image_without_ground_truths_appends_none():
    indices, valid = sampling.repeat_truth(KEY, jnp.zeros(7, bool), count=4)
    np.testing.assert_array_equal(indices, np.zeros(4))
    assert not np.asarray(valid).any()
