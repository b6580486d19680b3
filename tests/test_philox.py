"""Random numbers: the published vectors, an independent implementation in Python integers, and their distribution."""

from __future__ import annotations

import math

import pytest
import torch

from csmask import philox

M32 = 0xFFFFFFFF


def philox_in_integers(counter, key):
    """Philox4x32-10 after the paper's figure, one counter at a time."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for round_ in range(10):
        if round_:
            k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
        high0, low0 = divmod(0xD2511F53 * x0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x2, 2**32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
    return x0, x1, x2, x3


# kat_vectors of Random123 (https://github.com/DEShawResearch/random123), philox4x32 10
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((M32,) * 4, (M32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    assert philox_in_integers(counter, key) == words
    got = philox.philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(w.item() for w in got) == words


def test_any_counter_and_key():
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 2**32, (200, 6), generator=generator)
    words[0], words[1, :4], words[2, 4:] = M32, 0, M32
    for row in words.tolist():
        got = philox.philox4x32(tuple(torch.tensor([c]) for c in row[:4]), tuple(row[4:]))
        assert tuple(w.item() for w in got) == philox_in_integers(row[:4], row[4:])


def expected_words(count, seed, stream, purpose):
    words = []
    for block in range((count + 3) // 4):
        words += philox_in_integers((block & M32, block >> 32, stream, purpose), (seed & M32, seed >> 32))
    return words[:count]


@pytest.mark.parametrize("chunk", [1, 3, 4, 1 << 20])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 12, 13, 47])
def test_words_of_a_stream(count, chunk, monkeypatch):
    monkeypatch.setattr(philox, "_CHUNK", chunk)
    for seed, stream, purpose in ((0, 0, 0), (2**64 - 1, 7, 2), (2**32 + 5, 2**31, 1)):
        got = philox.random_words(count, seed, stream, purpose)
        assert got.dtype == torch.int64
        assert got.tolist() == expected_words(count, seed, stream, purpose)


def test_a_real_chunk_boundary():
    count = 4 * philox._CHUNK + 9
    got = philox.random_words(count, 3, 1, 0)
    assert got.shape == (count,)
    for block in (0, philox._CHUNK - 1, philox._CHUNK, philox._CHUNK + 1):
        assert tuple(got[4 * block : 4 * block + 4].tolist()) == philox_in_integers((block, 0, 1, 0), (3, 0))


@pytest.mark.parametrize("chunk", [2, 1 << 20])
def test_uniform_is_made_of_the_words(chunk, monkeypatch):
    monkeypatch.setattr(philox, "_CHUNK", chunk)
    got = philox.random_uniform(23, 5, 6, 7)
    assert got.dtype == torch.float32
    assert got.tolist() == [(2 * (w >> 8) + 1 - 2**24) / 2**24 for w in expected_words(23, 5, 6, 7)]


@pytest.mark.parametrize("chunk", [2, 1 << 20])
def test_normal_is_made_of_the_bytes(chunk, monkeypatch):
    monkeypatch.setattr(philox, "_CHUNK", chunk)
    got = philox.random_normal(11, 5, 6, 7)
    words = expected_words(44, 5, 6, 7)
    for i, value in enumerate(got.tolist()):
        total = sum(sum(w.to_bytes(4, "little")) for w in words[4 * i : 4 * i + 4])
        assert value == pytest.approx((total - 2040) / math.sqrt(16 * (256**2 - 1) / 12), rel=1e-6, abs=1e-9)


def test_extremes_stay_in_the_open_interval(monkeypatch):
    for word, bound in ((0, -1 + 2**-24), (M32, 1 - 2**-24)):
        monkeypatch.setattr(philox, "random_words", lambda count, *_, word=word: torch.full((count,), word))
        assert philox.random_uniform(2, 0, 0, 0).tolist() == [bound, bound]


def test_moments():
    n = 200_000
    uniform = philox.random_uniform(n, 1, 2, 3).double()
    assert abs(uniform.mean().item()) < 4 / math.sqrt(3 * n)
    assert uniform.var().item() == pytest.approx(1 / 3, abs=4 * math.sqrt(4 / 45 / n))
    normal = philox.random_normal(n, 1, 2, 3).double()
    assert abs(normal.mean().item()) < 4 / math.sqrt(n)
    assert normal.var().item() == pytest.approx(1, abs=4 * math.sqrt(2 / n))
    # the sum of 16 uniforms: kurtosis 3 - 6 / (5 * 16)
    assert (normal**4).mean().item() == pytest.approx(3 - 0.075, abs=4 * math.sqrt(96 / n))
    assert (normal.abs() < 1).double().mean().item() == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.006)


def test_bytes_are_uniform():
    words = philox.random_words(64_000, 9, 0, 1)
    for shift in (0, 8, 16, 24):
        counts = torch.bincount((words >> shift) & 0xFF, minlength=256).double()
        chi2 = ((counts - 250) ** 2 / 250).sum().item()
        assert 255 - 5 * math.sqrt(510) < chi2 < 255 + 5 * math.sqrt(510)


def test_no_values_at_all():
    for draw in (philox.random_words, philox.random_uniform, philox.random_normal):
        assert draw(0, 1, 2, 3).shape == (0,)


def test_seed_stream_and_purpose_each_matter():
    base = philox.random_words(64, 1, 2, 3)
    for other in ((2, 2, 3), (1 + 2**32, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert (philox.random_words(64, *other) == base).sum() == 0
    assert torch.equal(philox.random_words(64, 1, 2, 3), base)
    assert torch.equal(philox.random_words(40, 1, 2, 3), base[:40])  # an element's draw does not depend on the count


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (-1, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
        (2**64, ValueError, r"seed must be in \[0, 2\*\*64\), got 18446744073709551616"),
        (1.0, TypeError, "seed must be an int, got float"),
        (True, TypeError, "seed must be an int, got bool"),
        (None, TypeError, "seed must be an int, got NoneType"),
        ("1", TypeError, "seed must be an int, got str"),
    ],
)
def test_bad_seeds(seed, error, message):
    for call in (philox.check_seed, lambda s: philox.random_words(4, s, 0, 0)):
        with pytest.raises(error, match=message):
            call(seed)


def test_good_seeds():
    assert philox.check_seed(0) == 0
    assert philox.check_seed(2**64 - 1) == 2**64 - 1
