import torch

from lilliput.data import Tokens, overlap


def tokens(ids):
    return Tokens.of(ids, "test")


def random_ids(rows, width, seed):
    return torch.randint(0, 50_000, (rows, width), generator=torch.Generator().manual_seed(seed))


def slow(a, b, n):
    def grams(x):
        return [tuple(row[i : i + n]) for row in x.ids.tolist() for i in range(len(row) - n + 1)]

    seen = set(grams(a))
    asked = grams(b)
    return sum(x in seen for x in asked) / len(asked)


def test_unrelated_text_does_not_overlap_and_equal_text_does():
    a, b = tokens(random_ids(8, 64, 0)), tokens(random_ids(8, 64, 1))
    assert overlap(a, b) == 0.0
    assert overlap(a, a) == 1.0


def test_planted_overlap_is_found_exactly():
    a, b = random_ids(6, 100, 0), random_ids(5, 80, 1)
    b[2, 10:40] = a[4, 51:81]  # 30 tokens hold 18 13-grams
    b[0, :13] = a[0, :13]
    b[1, :12] = a[0, :12]  # one token too short
    assert overlap(tokens(a), tokens(b)) == 19 / (5 * 68)
    assert overlap(tokens(a), tokens(b)) == slow(tokens(a), tokens(b), 13)


def test_agrees_with_sets_where_tokens_repeat():
    generator = torch.Generator().manual_seed(3)
    a = tokens(torch.randint(0, 3, (20, 50), generator=generator))
    b = tokens(torch.randint(0, 3, (10, 40), generator=generator))
    for n in (1, 2, 5, 7):
        assert overlap(a, b, n) == slow(a, b, n)
    assert 0.0 < overlap(a, b, 7) < 1.0


def test_order_of_tokens_matters():
    a = torch.arange(40).view(1, 40)
    assert overlap(tokens(a), tokens(a.flip(1))) == 0.0


def test_windows_too_short_hold_no_grams():
    assert overlap(tokens(random_ids(4, 12, 0)), tokens(random_ids(4, 12, 0))) == 0.0
    assert overlap(tokens(random_ids(4, 12, 0)), tokens(random_ids(4, 20, 0))) == 0.0
