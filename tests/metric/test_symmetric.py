import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisher_ray.metric import symmetric
from fisher_ray.metric.symmetric import add_gram, eigh_descending, mirror, num_above_noise


def random_matrix(num_rows, num_columns, seed=0):
    return torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(num_rows=st.integers(1, 20), num_columns=st.integers(1, 20), panel=st.integers(1, 25))
def test_panels_of_the_triangle_mirrored_make_the_whole_product(num_rows, num_columns, panel):
    rows, total = random_matrix(num_rows, num_columns), torch.zeros(num_columns, num_columns, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symmetric, "PANEL", panel)
        for part in (rows, rows[: num_rows // 2]):
            add_gram(total, part)
        mirror(total)
        add_gram(total, rows)
        mirror(total)  # once more: what stood below the diagonal is not added to

    expected = 2 * rows.T @ rows + rows[: num_rows // 2].T @ rows[: num_rows // 2]
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(total, total.T)


def test_rows_of_any_layout_and_of_float32_are_taken():
    rows = random_matrix(300, 600)
    for given_rows, tolerance in ((rows.T.contiguous().T, 1e-11), (rows.float(), 1e-3)):
        total = torch.zeros(600, 600, dtype=torch.float64)
        add_gram(total, given_rows)
        mirror(total)
        torch.testing.assert_close(total, rows.T @ rows, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [1, 2, 17, 300])
def test_eigenvectors_have_their_largest_entry_positive_and_rebuild_the_matrix(size):
    rows = random_matrix(size + 3, size)
    matrix = rows.T @ rows
    values, vectors = eigh_descending(matrix)

    assert bool((values[:-1] >= values[1:]).all())
    assert bool((vectors.max(0).values == vectors.abs().max(0).values).all())
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close((vectors * values) @ vectors.T, matrix, rtol=0, atol=1e-12 * float(values[0]))


def test_signs_do_not_follow_the_solvers(monkeypatch):
    rows = random_matrix(9, 6)
    expected = eigh_descending(rows.T @ rows)
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    for flipped in (vectors * signs, -vectors * signs):
        monkeypatch.setattr(torch.linalg, "eigh", lambda _, flipped=flipped: (values, flipped))
        torch.testing.assert_close(eigh_descending(rows), expected, rtol=0, atol=0)


def test_a_matrix_has_as_many_eigenvalues_above_noise_as_its_rank():
    rows = random_matrix(7, 30)
    for scale in (1e-100, 1.0, 1e100):
        assert num_above_noise(eigh_descending(scale * rows.T @ rows)[0]) == 7
    few = torch.tensor([1.0, 1e-13], dtype=torch.float64)
    assert [num_above_noise(few), num_above_noise(few, 300), num_above_noise(few, 3000)] == [2, 2, 1]
    assert num_above_noise(eigh_descending(torch.zeros(4, 4, dtype=torch.float64))[0]) == 0
    assert num_above_noise(eigh_descending(-rows @ rows.T)[0]) == 0
