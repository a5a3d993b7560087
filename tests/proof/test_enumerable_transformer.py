"""The training loop against the exact optimum of an enumerable transformer, at a small size."""

import pytest

from benchmarks.enumerable_transformer import save_reference, train_and_compare


@pytest.fixture(scope="module")
def reference_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("enumerable") / "model"
    save_reference(directory, steps=200)
    return directory


@pytest.mark.slow
def test_training_approaches_the_optimum_and_stays_below_the_frontier(reference_dir, tmp_path):
    outcome = train_and_compare(reference_dir, tmp_path, pairs=8_000, learning_rate=2e-3)
    assert outcome.start_kl > 0.5
    assert outcome.kl < 0.2 * outcome.start_kl, outcome
    assert outcome.correlation > 0.93, outcome
    (kl, reward), (best_kl, best_reward) = outcome.point, outcome.best_point
    assert reward - kl <= best_reward - best_kl + 1e-9  # beta is 1
    assert reward > 0.75 * best_reward


@pytest.mark.slow
def test_training_on_a_4_bit_base_approaches_its_own_optimum(reference_dir, tmp_path):
    outcome = train_and_compare(
        reference_dir, tmp_path, pairs=4_000, rank=8, quantization="nf4", learning_rate=4e-3
    )
    assert outcome.kl < 0.5 * outcome.start_kl, outcome
    assert outcome.correlation > 0.8, outcome
