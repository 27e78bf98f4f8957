"""Hadamard matrices, transforms and rotations."""

import math

import pytest
import torch
from compress.kernels.hadamard import (
    base_order,
    hadamard_matrix,
    hadamard_transform,
    random_hadamard,
    random_orthogonal,
    rotation,
    rotation_name,
)
from compress.kernels.hadamard.construct import base_matrix, character_matrix, find_base, sylvester_matrix

# Hidden and intermediate sizes of current models, and the construction each one rests on.
SIZES = {
    ("Paley II", 36): (576, 1152, 2304),
    ("Paley I", 28): (896, 3584, 7168, 14336, 28672),
    ("Paley I", 60): (960, 1920),
    ("Paley I", 12): (1536, 3072, 6144, 12288),
    ("Paley I", 20): (2560, 5120),
    ("Paley I", 84): (2688, 5376),
    ("Paley II", 76): (4864, 9728),
    ("Paley I", 108): (6912, 13824, 27648),
    ("Paley I", 140): (8960,),
    ("Paley II", 148): (18944,),
    ("Paley I", 344): (11008,),
    ("Paley I", 68): (17408,),
    ("Paley II", 100): (25600,),
    ("Paley II", 924): (29568,),
    ("Sylvester", 1): (1, 2, 64, 128, 2048, 4096, 16384),
}
TABLE = [(n, name, order) for (name, order), sizes in SIZES.items() for n in sizes]


def assert_hadamard(H: torch.Tensor) -> None:
    n = H.shape[0]
    assert H.shape == (n, n)
    assert torch.equal(H.abs(), torch.ones_like(H))
    assert torch.equal(H @ H.T, n * torch.eye(n, dtype=H.dtype))


@pytest.mark.parametrize(("n", "name", "order"), TABLE)
def test_base_of_every_size_of_the_table(n, name, order):
    base = find_base(n)
    assert (base.name, base.order, base_order(n)) == (name, order, order)


@pytest.mark.parametrize("order", sorted({order for _, order in SIZES}))
def test_every_base_matrix_is_hadamard(order):
    assert_hadamard(base_matrix(find_base(order)).double())


@pytest.mark.parametrize("n", [n for n, _, _ in TABLE if n <= 1152])
def test_dense_matrix_is_hadamard(n):
    H = hadamard_matrix(n)
    assert H.dtype == torch.float64
    assert_hadamard(H)


@pytest.mark.parametrize("n", [n for n, _, _ in TABLE])
def test_transform_of_unit_vectors_gives_rows_of_the_kronecker_product(n):
    """Entry (r, c) of H_K (x) Sylvester is H_K[r div 2^e, c div 2^e] * (-1)^popcount((r & c) mod 2^e)."""
    base = base_matrix(find_base(n)).double()
    power = n // base.shape[0]
    rows = sorted({0, 1 % n, n // 3, n // 2, n - 1})
    c = torch.arange(n)
    expected = []
    for r in rows:
        parity = torch.tensor([bin(v).count("1") & 1 for v in ((r % power) & (c % power)).tolist()])
        expected.append(base[r // power, c // power] * (1 - 2 * parity))
    units = torch.zeros(len(rows), n, dtype=torch.float64)
    units[range(len(rows)), rows] = 1
    torch.testing.assert_close(
        hadamard_transform(units) * math.sqrt(n), torch.stack(expected).double(), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("n", [n for n, _, _ in TABLE])
def test_transform_keeps_inner_products(n):
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = hadamard_transform(x)
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=0, atol=1e-12 * n)


@pytest.mark.parametrize("n", [12, 28, 36, 576, 896, 1152, 2048])
def test_transform_equals_dense_product(n):
    x = torch.randn(2, 3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    dense = x @ hadamard_matrix(n) / math.sqrt(n)
    torch.testing.assert_close(hadamard_transform(x), dense, rtol=0, atol=1e-12)
    single = hadamard_transform(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), dense, rtol=0, atol=1e-5)


def test_transform_reads_strided_input_and_leaves_it_alone():
    x = torch.randn(24, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    torch.testing.assert_close(hadamard_transform(x.T), hadamard_transform(x.T.contiguous()), rtol=0, atol=0)
    assert torch.equal(x, before)


def test_transform_needs_floating_point():
    with pytest.raises(ValueError, match="floating point"):
        hadamard_transform(torch.ones(4, dtype=torch.int64))


@pytest.mark.parametrize("n", [3, 6, 18, 92, 188, 232, 7552])
def test_orders_without_a_construction(n):
    assert base_order(n) is None
    with pytest.raises(ValueError, match=f"order {n}$"):
        hadamard_matrix(n)
    with pytest.raises(ValueError, match=f"order {n}$"):
        hadamard_transform(torch.ones(n))


def test_a_larger_base_is_found_when_the_smallest_order_has_no_construction():
    assert base_order(23 * 8) is None
    assert base_order(23 * 16) == 368
    assert base_order(23 * 64) == 368
    assert_hadamard(hadamard_matrix(368))


@pytest.mark.parametrize("n", [0, -4])
def test_order_must_be_positive(n):
    with pytest.raises(ValueError, match="positive"):
        base_order(n)
    with pytest.raises(ValueError, match="positive"):
        random_orthogonal(n, 0)


@pytest.mark.parametrize("q", [3, 7, 13, 29])
def test_character_of_a_prime_field_follows_eulers_criterion(q):
    chi = character_matrix(q)
    for a in range(q):
        power = pow(a, (q - 1) // 2, q)
        assert chi[a, 0] == (power - q if power > 1 else power)


@pytest.mark.parametrize("q", [9, 25, 27, 49, 343])
def test_character_of_a_prime_power_field(q):
    """Jacobsthal's identities: Q Q^T = qI - J, Q J = 0, and Q^T = chi(-1) Q."""
    Q = character_matrix(q).double()
    assert torch.equal(Q @ Q.T, q * torch.eye(q, dtype=Q.dtype) - 1)
    assert torch.equal(Q.sum(1), torch.zeros(q, dtype=Q.dtype))
    assert torch.equal(Q.T, Q if q % 4 == 1 else -Q)


@pytest.mark.parametrize("q", [1, 6, 8, 45])
def test_character_needs_an_odd_prime_power(q):
    with pytest.raises(ValueError, match=f"got {q}"):
        character_matrix(q)


def test_sylvester_needs_a_power_of_two():
    with pytest.raises(ValueError, match="got 12"):
        sylvester_matrix(12)


@pytest.mark.parametrize("n", [64, 576, 896])
def test_random_hadamard_is_signed_rows(n):
    Q = random_hadamard(n, 3)
    ratio = Q * math.sqrt(n) / hadamard_matrix(n)
    assert Q.dtype == torch.float64
    torch.testing.assert_close(ratio, ratio[:, :1].expand(n, n).sign(), rtol=0, atol=1e-12)
    assert 0 < (ratio[:, 0] > 0).sum() < n
    torch.testing.assert_close(Q @ Q.T, torch.eye(n, dtype=Q.dtype), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 188, 300])
def test_random_orthogonal(n):
    Q = random_orthogonal(n, 0)
    assert Q.dtype == torch.float64
    torch.testing.assert_close(Q @ Q.T, torch.eye(n, dtype=Q.dtype), rtol=0, atol=1e-12)


def test_random_orthogonal_is_haar_distributed():
    """LAPACK's own Q always has a negative corner; under Haar E[Q_00] = 0 and E[Q_00^2] = 1/n."""
    corner = torch.tensor([random_orthogonal(4, seed)[0, 0].item() for seed in range(400)])
    assert abs(corner.mean()) < 0.1
    assert abs(corner.square().mean() - 0.25) < 0.06


@pytest.mark.parametrize("make", [random_hadamard, random_orthogonal])
def test_seeds_are_private_and_reproducible(make):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = make(48, 7)
    torch.manual_seed(2)
    assert torch.equal(first, make(48, 7))
    assert not torch.equal(first, make(48, 8))
    torch.manual_seed(1)
    make(48, 7)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("n", "kind", "words"),
    [
        (576, "hadamard", "Hadamard 36x16 (Paley II)"),
        (896, "hadamard", "Hadamard 28x32 (Paley I)"),
        (12, "hadamard", "Hadamard 12 (Paley I)"),
        (64, "hadamard", "Hadamard 64 (Sylvester)"),
        (188, "hadamard", "random orthogonal (no Hadamard construction for 188)"),
        (64, "random", "random orthogonal"),
    ],
)
def test_rotation_says_what_it_used(n, kind, words):
    Q, description = rotation(n, kind, 5)
    assert description == words == rotation_name(n, kind)
    expected = random_hadamard(n, 5) if words.startswith("Hadamard") else random_orthogonal(n, 5)
    assert torch.equal(Q, expected)


def test_rotation_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="fourier"):
        rotation(64, "fourier", 0)
