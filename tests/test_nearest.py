"""Facts about exact nearest neighbours, whichever way they are searched."""

import copy
import gc
import math
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from clbench.methods import bounds as narrow
from clbench.methods import nearest as searching
from clbench.methods.bounds import GROUP, TINY, Bounds, gamma
from clbench.methods.nearest import Search, k_nearest, nearest

# Name -> the type of few bits and the number of directions (None: all features); None for plain products.
WAYS = {
    "plain": None,
    "bfloat16": (torch.bfloat16, None),
    "bfloat16 and 8 directions": (torch.bfloat16, 8),
    "float32": (torch.float32, None),
    "float32 and 3 directions": (torch.float32, 3),
}
CASES = (
    "random",
    "half of the queries are entries",
    "duplicates",
    "near ties",
    "large norms",
    "norms of all sizes",
    "small distances",
    "small values",
    "values whose squares underflow",
    "a large offset",
    "two distant clusters",
    "constant features",
    "zeros",
    "few different values",
    "few directions",
    "an outlier",
    "one entry",
    "more features than entries",
)


def case(name: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries [Q, D] and a bank [M, D] with what the case is named after."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    def some(of: Tensor, count: int) -> Tensor:
        return of[torch.randint(len(of), (count,), generator=random)]

    entries, size = {"one entry": (1, 24), "more features than entries": (20, 200)}.get(name, (500, 24))
    bank, queries = normal(entries, size), normal(60, size)
    if name == "half of the queries are entries":
        queries[::2] = some(bank, 30)
    elif name == "duplicates":
        bank = some(bank[:100], 500)
        queries[::2] = some(bank, 30)
    elif name == "near ties":
        bank = some(bank[:20], 500) * (1 + 1e-7 * normal(500, size))
        queries[::2] = some(bank, 30)
    elif name == "large norms":
        bank, queries = 1e12 * bank, 1e12 * queries
    elif name == "norms of all sizes":
        bank, queries = bank * 10 ** (3 * normal(500, 1)), queries * 10 ** (3 * normal(60, 1))
    elif name == "small distances":
        queries = some(bank, 60) + 1e-6 * queries
    elif name == "small values":
        bank, queries = 1e-12 * bank, 1e-12 * queries
    elif name == "values whose squares underflow":
        bank, queries = 1e-21 * bank, 1e-21 * queries
    elif name == "a large offset":
        bank, queries = bank + 1e4, queries + 1e4
    elif name == "two distant clusters":
        bank, queries = bank + 1e4 * normal(500, 1).sign(), queries + 1e4 * normal(60, 1).sign()
    elif name == "constant features":
        bank[:, ::2], queries[:, ::2] = 3, 3
    elif name == "zeros":
        bank, queries[::2] = 0 * bank, 0
    elif name == "few different values":
        bank, queries = bank.round(), queries.round()
    elif name == "few directions":
        mixed = normal(2, size)
        bank, queries = normal(500, 2) @ mixed, normal(60, 2) @ mixed + 0.01 * queries
    elif name == "an outlier":
        bank[7] *= 1e6
    return queries, bank


def squared(queries: Tensor, bank: Tensor) -> Tensor:
    """Squared distances [Q, M] from differences, in single precision."""
    return torch.stack([(bank - query).square().sum(1) for query in queries])


def by_differences(queries: Tensor, bank: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """What `nearest` is to find, [K, Q] both: from all differences, the first of equals."""
    distances, rows, begin = [], [], 0
    for entries in bank.split(sizes):
        each = squared(queries, entries)
        least = each.min(1).values
        rows.append((each == least[:, None]).int().argmax(1) + begin)
        distances.append(least.sqrt())
        begin += len(entries)
    return torch.stack(distances), torch.stack(rows)


def directions(bank: Tensor, count: int) -> Tensor:
    """Random orthonormal directions [D, count], shortened a little."""
    random = torch.Generator().manual_seed(1)
    mixed = torch.randn(bank.shape[1], count, generator=random, dtype=torch.float64)
    return (torch.linalg.qr(mixed).Q * (1 - 1e-4)).float()


def made(way: str, bank: Tensor, pieces: list[tuple[int, int]], left_out: Tensor) -> Bounds | None:
    """The bounds of a way, in place of those that would be the quickest."""
    chosen = WAYS[way]
    if chosen is None:
        return None
    dtype, count = chosen
    centre = bank.mean(0)
    basis = None if count is None else directions(bank, count)
    found = Bounds(bank, pieces, dtype, basis, centre, left_out)
    if count:
        found.rough = Bounds(bank, pieces, dtype, directions(bank, 2), centre, left_out)
    return found


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One way of searching, from the first query on, in pieces and blocks that do not divide anything."""
    monkeypatch.setattr(searching, "bounds_of", lambda *given: made(request.param, *given))
    for name, value in (("_WORTH", 0), ("_LEAST", 0), ("_TRIALS", 0), ("_PIECE", 210)):
        monkeypatch.setattr(searching, name, value)
    monkeypatch.setattr(searching, "_BYTES", 4 * 256 * 17)
    yield request.param


@pytest.mark.parametrize("name", CASES)
def test_the_nearest_entries_are_those_by_differences(name: str, way: str) -> None:
    queries, bank = case(name)
    for sizes in [len(bank)], [len(bank) // 3, len(bank) - len(bank) // 3]:
        if all(sizes):
            distances, rows = nearest(queries, bank, sizes)
            expected, expected_rows = by_differences(queries, bank, sizes)
            assert torch.equal(rows, expected_rows)
            assert torch.equal(distances, expected)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_missed_where_products_leave_most_entries(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "_CROWDED", 10**9)  # bounds hand over to plain products
    monkeypatch.setattr(searching, "_sampled", lambda: False)
    queries, bank = case(name, seed=1)
    distances, rows = nearest(queries, bank, [len(bank)])
    expected, expected_rows = by_differences(queries, bank, [len(bank)])
    assert torch.equal(rows, expected_rows)
    assert torch.equal(distances, expected)


@pytest.mark.parametrize("chosen", [way for way in WAYS if WAYS[way]])
@pytest.mark.parametrize("name", CASES)
def test_a_bound_is_never_above_the_distance(name: str, chosen: str) -> None:
    for seed in range(3):
        queries, bank = case(name, seed)
        bounds = made(chosen, bank, [(0, len(bank))], torch.zeros(len(bank), dtype=torch.bool))
        assert bounds is not None
        values = bounds.values(bounds.queries(queries), 0, lambda count, kind: torch.empty(count, dtype=kind))
        rows = bounds.rows(0)[: len(bank)]
        assert sorted(rows.tolist()) == list(range(len(bank)))
        distances = squared(queries, bank)[:, rows] * (1 + 2 * gamma(bank.shape[1] + 8)) + TINY
        limits = torch.stack([bounds.limit(column) for column in distances.T], 1)
        assert (values[:, : len(bank)] <= limits).all()


def test_bounds_leave_few_entries_where_features_are_correlated() -> None:
    random = torch.Generator().manual_seed(0)
    mixed = torch.randn(400, 64, generator=random) * torch.arange(1, 65) ** -1.5
    bank, queries = mixed[:384], mixed[384:]
    bounds = narrow.bounds_of(bank, [(0, 384)], torch.zeros(384, dtype=torch.bool))
    assert bounds is not None
    values = bounds.values(bounds.queries(queries), 0, lambda count, kind: torch.empty(count, dtype=kind))
    limits = bounds.limit(squared(queries, bank).min(1).values)
    assert (values <= limits[:, None]).float().mean() < 0.1


def images(seed: int, apart: float = 2) -> tuple[Tensor, Tensor, list[int]]:
    """Patches of images [B, P, D] that belong to three banks, the banks, and their sizes."""
    random = torch.Generator().manual_seed(seed)
    centers = apart * torch.randn(3, 1, 16, generator=random)
    banks = centers + torch.randn(3, 230, 16, generator=random)
    owners = torch.randint(3, (7,), generator=random)
    patches = centers[owners] + torch.randn(7, 9, 16, generator=random)
    return patches, banks.flatten(0, 1), [230] * 3


def test_the_closest_bank_is_the_one_with_the_smallest_mean_distance(way: str) -> None:
    for seed in range(6):
        patches, bank, sizes = images(seed, apart=2 / (1 + seed))
        if seed == 5:  # two equal banks: the first is taken
            bank = torch.cat([bank[:230], bank[230:460], bank[230:460]])
        distances, rows = by_differences(patches.flatten(0, 1), bank, sizes)
        distances, rows = distances.view(3, 7, 9), rows.view(3, 7, 9)
        expected = distances.mean(2).argmin(0)
        selected, near, at, _ = Search().closest_bank(patches, bank, sizes)
        assert torch.equal(selected, expected)
        assert torch.equal(near, distances[expected, torch.arange(7)])
        assert torch.equal(at, rows[expected, torch.arange(7)])


def test_banks_that_cannot_be_the_closest_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []
    search = searching._Banks._search
    monkeypatch.setattr(searching, "_WORTH", 0)
    monkeypatch.setattr(searching, "_LEAST", 0)
    monkeypatch.setattr(searching, "bounds_of", lambda *given: made("bfloat16", *given))
    monkeypatch.setattr(
        searching._Banks, "_search", lambda self, *given: searched.append(given[-1]) or search(self, *given)
    )
    patches, bank, sizes = images(0, apart=20)
    selected = Search().closest_bank(patches[:1], bank, sizes)[0]
    assert set(searched) == set(selected.tolist())


@pytest.mark.parametrize("name", [name for name in CASES if name != "one entry"])
def test_many_small_banks_are_told_apart_by_one_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of which a product says that they cannot be the closest are not searched; those found are those by differences."""
    monkeypatch.setattr(searching, "_PIECE", 37)  # a few banks at a time
    queries, bank = case(name)
    sizes = [1, 2, 3, 4] + (len(bank) > 100) * [*range(1, 22), 42, *97 * [2]]
    bank, patches = bank[: sum(sizes)], queries.view(5, -1, queries.shape[1])
    distances, rows = by_differences(patches.flatten(0, 1), bank, sizes)
    distances, rows = (found.view(len(sizes), *patches.shape[:2]) for found in (distances, rows))
    search = Search()
    lower = search._known(bank, sizes)._lower_means(patches)
    assert (lower <= distances.double().mean(2) * (1 + 1e-6)).all()
    searched = []
    plain = searching._Banks._distances
    monkeypatch.setattr(
        searching._Banks, "_distances", lambda *given: searched.append(given[-1]) or plain(*given)
    )
    selected, near, at, _ = search.closest_bank(patches, bank, sizes)
    means = distances.mean(2)
    each = torch.arange(5)
    assert (means[selected, each] <= means.amin(0) * (1 + 1e-6)).all() and None not in searched
    assert torch.equal(near, distances[selected, each]) and torch.equal(at, rows[selected, each])


def test_values_that_are_not_finite_stay_with_their_query(way: str) -> None:
    queries, bank = case("random")
    broken = queries.clone()
    broken[3, 5], broken[4, 0] = torch.nan, torch.inf
    distances, rows = nearest(broken, bank, [200, 300])
    expected, expected_rows = nearest(queries, bank, [200, 300])
    well = torch.ones(60, dtype=torch.bool)
    well[3:5] = False
    assert not distances[:, 3:5].isfinite().any()
    assert ((rows >= 0) & (rows < 500)).all()
    assert torch.equal(distances[:, well], expected[:, well])
    assert torch.equal(rows[:, well], expected_rows[:, well])
    near = Search().closest_bank(broken[None], bank, [200, 300])[1]
    assert not near[0, 3:5].isfinite().any()


def test_tensors_need_not_be_contiguous(way: str) -> None:
    queries, bank = case("random")
    wide = torch.cat([bank, bank], 1)[:, :24]
    found = nearest(queries.T.contiguous().T, wide, [500])
    assert all(map(torch.equal, found, nearest(queries, bank, [500])))


def test_a_bank_that_changed_is_searched_anew(way: str) -> None:
    queries, bank = case("random")
    bank[0] = 1000
    search = Search()
    search(queries, bank, [500])
    bank[0] = queries[0]
    assert search(queries, bank, [500])[1][0, 0] == 0
    other = bank.flip(0)
    assert search(queries, other, [500])[1][0, 0] == 499
    assert search(queries, other, [499, 1])[1][1].eq(499).all()
    with torch.inference_mode():  # changes go unseen there, so nothing is kept
        inside = bank.clone()
        search(queries, inside, [500])
        inside[0] = 9
        assert search(queries, inside, [500])[1][0, 0] != 0


def test_what_is_kept_of_a_bank_goes_with_it(way: str) -> None:
    queries, bank = case("random")
    search = Search()
    gc.disable()
    try:
        search(queries, bank, [500])
        kept = weakref.ref(search._banks)
        assert kept() is not None
        assert copy.deepcopy(search)._banks is None
        del bank
        assert kept() is None
        bank = case("random")[1]
        search(queries, bank, [500])
        kept = weakref.ref(search._banks)
        del search
        assert kept() is None
    finally:
        gc.enable()


def test_bounds_go_on_only_where_they_are_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(searching.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(searching, "bounds_of", lambda *given: made("float32", *given))
    queries, bank = case("random")
    distances = searching._Banks._distances
    for cost, stays in ((0.5, True), (1.5, False)):

        def counted(banks: searching._Banks, *given: Tensor, cost: float = cost) -> tuple[Tensor, Tensor]:
            now[0] += cost if banks._bounds else 1
            return distances(banks, *given)

        monkeypatch.setattr(searching._Banks, "_distances", counted)
        monkeypatch.setattr(searching, "_LEAST", 0)
        monkeypatch.setattr(searching, "_WORTH", len(queries) / queries.shape[1])
        search = Search()
        used = []
        for _ in range(6):
            search(queries, bank, [500])
            assert search._banks is not None
            used.append(search._banks._bounds is not None)
        assert used[0] is False  # so many queries a feature are searched plainly first
        assert used[1] is True
        assert used[-1] is stays


def test_entries_that_repeat_others_are_left_out() -> None:
    for name in "duplicates", "few different values", "zeros", "random":
        bank = case(name)[1][:, :4].contiguous()
        earlier = torch.ones(500, 500).tril(-1).bool()
        expected = ((bank[:, None] == bank).all(2) & earlier).any(1).nonzero()[:, 0]
        search = Search()
        search(bank, bank, [500])
        assert search._banks is not None
        assert torch.equal(search._banks._norms.isinf().nonzero()[:, 0], expected)


def test_few_queries_and_small_banks_are_not_worth_bounds() -> None:
    random = torch.Generator().manual_seed(0)
    search = Search()
    bank = torch.randn(40, 8, generator=random)
    for _ in range(5):
        search(torch.randn(64, 8, generator=random), bank, [40])
    assert search._banks is not None
    assert search._banks._bounds is None


@pytest.mark.parametrize("kind", ["correlated", "independent", "constant", "huge"])
def test_bounds_suit_the_features(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    bank = torch.randn(600, 128, generator=random)
    if kind == "correlated":
        bank = bank * torch.arange(1, 129) ** -1.0
    elif kind == "constant":
        bank = torch.ones(600, 128)
    elif kind == "huge":
        bank = 1e19 * bank
    everything = torch.zeros(600, dtype=torch.bool)
    found = {}
    for quick in True, False:
        monkeypatch.setattr(narrow, "_quicker_in_bfloat16", lambda device, quick=quick: quick)
        bounds = narrow.bounds_of(bank, [(0, 600)], everything)
        found[quick] = bounds and (bounds.bytes, bounds._basis is None)
    assert found == {
        "correlated": {True: (2, False), False: (4, False)},
        "independent": {True: (2, True), False: None},
        "constant": {True: (2, False), False: (4, False)},
        "huge": {True: None, False: None},
    }[kind]  # fmt: skip


def test_searching_is_in_single_precision_whatever_the_networks_are_in(way: str) -> None:
    queries, bank = case("near ties")
    expected = by_differences(queries, bank, [500])
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest(queries, bank, [500])
        assert torch.is_autocast_enabled("cpu")
    assert all(map(torch.equal, found, expected))


def test_threads_may_search_the_same_banks() -> None:
    bank = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    queries = [torch.randn(400, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    expected = [nearest(each, bank, [1000])[1] for each in queries]
    search = Search()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda number: search(queries[number % 2], bank, [1000])[1], range(40)))
    assert all(torch.equal(each, expected[number % 2]) for number, each in enumerate(found))


def test_pairs_are_looked_at_in_parts_where_nearly_all_are_candidates(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(0)
    bank = 1 + 1e-6 * torch.randn(500, 16, generator=random)
    queries = 1 + 1e-6 * torch.randn(60, 16, generator=random)
    shares, look = [], searching._not_above

    def noted(groups: Tensor, some: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        shares.append(len(some) / (groups.shape[0] * groups.shape[1]))
        return look(groups, some, limit)

    monkeypatch.setattr(searching, "_not_above", noted)
    monkeypatch.setattr(searching, "_LOOKED", GROUP)
    found, expected = Search()(queries, bank, [500]), by_differences(queries, bank, [500])
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert len(shares) > 16 and max(shares) <= 1 / 16


def test_queries_that_are_no_numbers_get_rows_of_the_bank_and_gradients() -> None:
    queries = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    queries[3] = math.nan
    queries.requires_grad_()
    distances, rows = k_nearest(queries, torch.randn(100, 16), 6)
    assert int(rows.max()) < 100
    distances.sum().backward()
    assert queries.grad is not None and queries.grad[4:].isfinite().all()
