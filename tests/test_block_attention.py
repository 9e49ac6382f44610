"""Block attention: every CPU variant and the plain form against the oracle; what must not be read is NaN."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from backend import BACKEND, DTYPES, VARIANTS, cpu_only
from bounds import assert_close
from dgemma_ext import _C
from dgemma_ext.ops import block_attention, block_attention_plain
from reference import block_attention as reference

NAN = float("nan")
SENTINEL = 777.0  # exact in bfloat16
# Orders of summing in the low-precision result that the element-wise bound is made from; with many elements one matrix
# product and one plain sum say enough.
ORDERS = 8
ORDERS_OF_LARGE = 2
LARGE = 10_000

# What a raw op raises: invalid arguments reach Python as ValueError, the rest as RuntimeError; NotImplementedError is
# the dispatcher's, for tensors on several devices.
RAW_ERRORS = (ValueError, RuntimeError, NotImplementedError)

Spans = list[tuple[int, int]]


@dataclass
class Request:
    """One request: `prefix` positions in the cache, `rows` in the block; `slot` -1 is skipped."""

    prefix: int
    rows: int
    slot: int = 0
    spans: Spans = field(default_factory=list)


@dataclass
class Case:
    requests: list[Request]
    query_heads: int = 4
    key_heads: int = 2
    head_dim: int = 32
    window: int = 0
    capacity: int = 64
    block: int = 0  # rows of the tensors, at least the longest request
    causal: bool = False
    scale: float = 1.0


class Built:
    """The tensors of a case. Padding rows of the block, and cache rows that hold no position, are NaN.

    `keys[b]` and `values[b]` are [P + n, key heads, head dim]: all that was ever computed for request b.
    """

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case = case
        batch, heads, dim = len(case.requests), case.key_heads, case.head_dim
        block = max([case.block, *(r.rows for r in case.requests)])
        slots = max([1, *(r.slot + 1 for r in case.requests)])
        self.query = torch.full((batch, block, case.query_heads, dim), NAN, dtype=dtype)
        self.key = torch.full((batch, block, heads, dim), NAN, dtype=dtype)
        self.value = self.key.clone()
        self.prefix_key = torch.full((slots, case.capacity, heads, dim), NAN, dtype=dtype)
        self.prefix_value = self.prefix_key.clone()
        self.keys, self.values = [], []
        for b, r in enumerate(case.requests):
            # Scores with a standard deviation of 2: neither flat nor a single key.
            query = torch.randn(r.rows, case.query_heads, dim) * (2 / dim**0.5 / case.scale)
            self.query[b, : r.rows] = query.to(dtype)
            keys = torch.randn(r.prefix + r.rows, heads, dim).to(dtype)
            values = torch.randn(r.prefix + r.rows, heads, dim).to(dtype)
            self.key[b, : r.rows], self.value[b, : r.rows] = keys[r.prefix :], values[r.prefix :]
            for position in range(r.prefix if r.slot >= 0 else 0):  # later positions overwrite earlier ones
                self.prefix_key[r.slot, position % case.capacity] = keys[position]
                self.prefix_value[r.slot, position % case.capacity] = values[position]
            self.keys.append(keys)
            self.values.append(values)
        self.slot = torch.tensor([r.slot for r in case.requests], dtype=torch.int32)
        self.prefix_length = torch.tensor([r.prefix for r in case.requests], dtype=torch.int32)
        self.length = torch.tensor([r.rows for r in case.requests], dtype=torch.int32)
        most = max((len(r.spans) for r in case.requests), default=0)
        self.spans = torch.zeros(batch, most, 2, dtype=torch.int32) if most else None
        for b, r in enumerate(case.requests):
            for i, span in enumerate(r.spans):
                assert self.spans is not None
                self.spans[b, i] = torch.tensor(span)

    def operands(self) -> tuple[Any, ...]:
        case = self.case
        common = (self.query, self.key, self.value, self.prefix_key, self.prefix_value)
        common += (self.slot, self.prefix_length, self.length)
        return (*common, *([self.spans] if case.causal else []), case.window, case.scale)

    def run(self, module: Any = block_attention) -> torch.Tensor:
        function = module.causal_attention if self.case.causal else module.canvas_attention
        result: torch.Tensor = function(*self.operands())
        return result

    def mask(self, b: int) -> torch.Tensor:
        case, r = self.case, self.case.requests[b]
        if case.causal:
            return reference.causal_mask(r.prefix, r.rows, case.window, r.spans, case.capacity)
        return reference.canvas_mask(r.prefix, r.rows, case.window)

    def wanted(self, b: int) -> torch.Tensor:
        """Request b in float64: [rows, query heads, head dim]."""
        query = self.query[b, : self.case.requests[b].rows]
        return reference.attend(query, self.keys[b], self.values[b], self.mask(b), self.case.scale)

    def in_low_precision(self, b: int, exact: torch.Tensor) -> torch.Tensor:
        """Request b in the tensors' own type, summed in several orders: at each element the result that is farthest
        from `exact`.

        With a handful of elements the error of one order may be nearly zero by chance, and torch's own would fail a
        bound made from another's.
        """
        worst = exact
        query = self.query[b, : self.case.requests[b].rows]
        for order in range(ORDERS if exact.numel() < LARGE else ORDERS_OF_LARGE):
            one_by_one = query.dtype == torch.float32 and order % 2 == 1
            d, k = torch.randperm(self.case.head_dim), torch.randperm(len(self.keys[b]))
            back = torch.argsort(d)
            operands = (query[..., d], self.keys[b][k][..., d], self.values[b][k][..., d], self.mask(b)[:, k])
            result = reference.attend(*operands, self.case.scale, query.dtype, one_by_one)[..., back].double()
            worst = torch.where((result - exact).abs() > (worst - exact).abs(), result, worst)
        return worst

    def poison_unseen(self) -> None:
        """Makes NaN every cache row and block row that no query of its request may see."""
        for b, r in enumerate(self.case.requests):
            if r.slot < 0:
                continue
            seen = self.mask(b).any(dim=0)
            for position in (~seen).nonzero().flatten().tolist():
                row = position % self.case.capacity
                if r.prefix - self.case.capacity <= position < r.prefix:
                    self.prefix_key[r.slot, row] = NAN
                    self.prefix_value[r.slot, row] = NAN

    def check(self, result: torch.Tensor, outside: float = 0.0) -> None:
        dtype = self.query.dtype
        for b, r in enumerate(self.case.requests):
            rows = r.rows if r.slot >= 0 else 0
            assert bool((result[b, rows:] == outside).all()), f"rows without a query of request {b} were written"
            if rows:
                exact = self.wanted(b)
                assert_close(result[b, :rows], exact, dtype, self.in_low_precision(b, exact))


def check(case: Case, dtype: torch.dtype) -> None:
    built = Built(case, dtype)
    built.poison_unseen()
    built.check(built.run())
    if BACKEND == "cpu":
        built.check(built.run(block_attention_plain))


W = 24  # the window of most cases
CANVAS_CASES = {
    "no_prefix": Case([Request(0, 16)], window=W, capacity=W - 1),
    "no_prefix_no_cache": Case([Request(0, 5)], window=1, capacity=0),
    "one_token": Case([Request(1, 1)], window=W, capacity=W - 1),
    **{f"prefix_{p}": Case([Request(p, 16)], window=W, capacity=W - 1) for p in (1, W - 2, W - 1, W, W + 1)},
    "ring_wrapped": Case([Request(5 * W + 7, 16)], window=W, capacity=W - 1),
    "capacity_above_window": Case([Request(100, 16)], window=W, capacity=W + 13),
    "no_window": Case([Request(200, 16)], capacity=256),
    "several_tiles": Case([Request(300, 70)], capacity=512, query_heads=8),
    "window_one": Case([Request(9, 4)], window=1, capacity=4),
    "ragged": Case(
        [Request(3, 7, 2), Request(60, 16, 0), Request(9, 5, -1), Request(0, 1, 3), Request(31, 0, 1)],
        window=W,
        capacity=W - 1,
        block=20,
    ),
    "same_slot_read_twice": Case([Request(8, 5, -1), Request(8, 4, 0)], capacity=8),
    "scaled": Case([Request(40, 9)], capacity=64, scale=0.125),
}
CAUSAL_CASES = {
    "no_prefix": Case([Request(0, 40)], window=W, capacity=W - 1),
    **{f"prefix_{p}": Case([Request(p, 16)], window=W, capacity=W - 1) for p in (1, W - 2, W - 1, W, W + 1)},
    "one_row": Case([Request(50, 1)], window=W, capacity=W - 1),
    "block_beyond_window": Case([Request(70, 3 * W)], window=W, capacity=W - 1),
    "no_window": Case([Request(150, 150)], capacity=300),
    "window_one": Case([Request(9, 4)], window=1, capacity=1),
    "ragged": Case([Request(3, 7, 1), Request(60, 16, 0), Request(9, 5, -1)], window=W, capacity=W + 3, block=30),
    "span_in_block": Case([Request(10, 30, 0, [(15, 31)])], window=W, capacity=W - 1),
    "spans": Case(
        [Request(10, 30, 0, [(0, 4), (12, 15), (15, 16), (30, 37)]), Request(40, 8, 1, [(44, 44), (45, 90)])],
        window=W,
        capacity=W - 1,
    ),
    "span_into_prefix": Case([Request(20, 10, 0, [(12, 26)])], window=6, capacity=15),
    "span_that_left_the_ring": Case([Request(40, 10, 0, [(12, 46)])], window=6, capacity=11),
    "overlapping_spans": Case([Request(5, 20, 0, [(7, 14), (10, 22)])], window=3, capacity=2),
    "span_without_window": Case([Request(5, 200, 0, [(30, 190)])], capacity=5),
}
HEADS = {
    "group_1": {"query_heads": 3, "key_heads": 3},
    "group_2": {"query_heads": 4, "key_heads": 2},
    "group_8": {"query_heads": 8, "key_heads": 1},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CANVAS_CASES)
def test_canvas(name: str, dtype: torch.dtype, cpu_variant: str) -> None:
    check(CANVAS_CASES[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CAUSAL_CASES)
def test_causal(name: str, dtype: torch.dtype, cpu_variant: str) -> None:
    case = CAUSAL_CASES[name]
    case.causal = True
    check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 20, 33, 256, 512] if BACKEND == "cpu" else [16, 64, 128, 256, 512])
@pytest.mark.parametrize("heads", HEADS)
def test_heads_and_dimensions(heads: str, head_dim: int, dtype: torch.dtype, cpu_variant: str) -> None:
    shape = {**HEADS[heads], "head_dim": head_dim, "window": 100, "capacity": 99}
    check(Case([Request(90, 21, 1), Request(400, 35, 0)], **shape), dtype)
    check(Case([Request(130, 35, 0, [(135, 160)])], causal=True, **shape), dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("variant", VARIANTS)
def test_random_shapes(variant: str, data: st.DataObject) -> None:
    draw = data.draw
    causal, window = draw(st.booleans()), draw(st.integers(0, 40))
    slots = draw(st.permutations(range(3)))
    requests = []
    for slot in slots[: draw(st.integers(1, 3))]:
        prefix, rows = draw(st.integers(0, 150)), draw(st.integers(0, 40))
        edges = st.integers(max(0, prefix - 30), prefix + rows + 10)
        spans = [tuple(sorted(draw(st.tuples(edges, edges)))) for _ in range(draw(st.integers(0, 3)))]
        requests.append(Request(prefix, rows, draw(st.sampled_from([slot, slot, slot, -1])), spans if causal else []))
    needed = max([r.prefix if window == 0 else min(r.prefix, window - 1) for r in requests])
    key_heads = draw(st.integers(1, 3))
    case = Case(
        requests,
        query_heads=key_heads * draw(st.integers(1, 4)),
        key_heads=key_heads,
        head_dim=draw(st.integers(1, 70) if BACKEND == "cpu" else st.sampled_from([16, 32, 64])),
        window=window,
        capacity=max(1, needed) + draw(st.integers(0, 20)),
        block=draw(st.integers(1, 45)),
        causal=causal,
        scale=draw(st.sampled_from([1.0, 0.25])),
    )
    # The global bound is on a mean square; with fewer elements one rounding error may exceed it.
    values = [r.rows * case.query_heads * case.head_dim for r in requests if r.slot >= 0]
    assume(all(count == 0 or count >= 64 for count in values))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    with pytest.MonkeyPatch.context() as patch:
        if BACKEND == "cpu":
            patch.setenv("DGEMMA_CPU", variant)
        check(case, draw(st.sampled_from(DTYPES)))


def test_true_heads_at_a_long_prefix(cpu_variant: str) -> None:
    """One key head with its queries of each layer type of the model, above the window of 1,024."""
    if cpu_variant == "scalar":
        check(Case([Request(1100, 2)], query_heads=2, key_heads=1, head_dim=256, window=1024, capacity=1023), DTYPES[1])
        return
    sliding = {"query_heads": 2, "key_heads": 1, "head_dim": 256, "window": 1024, "capacity": 1023}
    full = {"query_heads": 8, "key_heads": 1, "head_dim": 512, "capacity": 1500}
    for dtype in DTYPES:
        check(Case([Request(1500, 80)], **sliding), dtype)
        check(Case([Request(1500, 40)], causal=True, **sliding), dtype)
        check(Case([Request(1400, 33)], **full), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_bits_alone_in_a_batch_and_over_threads(causal: bool, dtype: torch.dtype, cpu_variant: str) -> None:
    requests = [Request(70, 40, 0), Request(200, 70, 1), Request(0, 3, 2), Request(31, 12, -1)]
    shape: dict[str, Any] = {"query_heads": 8, "window": 50, "capacity": 49, "causal": causal}
    built = Built(Case(requests, block=75, **shape), dtype)
    together = built.run()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(built.run(), together)
    finally:
        torch.set_num_threads(threads)
    for b, r in enumerate(requests[:3]):
        alone = Built(Case([Request(r.prefix, r.rows, 0)], **shape), dtype)
        alone.query[0], alone.key[0], alone.value[0] = (x[b, : r.rows] for x in (built.query, built.key, built.value))
        alone.prefix_key[0], alone.prefix_value[0] = built.prefix_key[r.slot], built.prefix_value[r.slot]
        assert torch.equal(alone.run()[0], together[b, : r.rows])


@pytest.mark.parametrize("head_dim", [32, 512])
@pytest.mark.parametrize("causal", [False, True])
def test_bits_alone_and_in_a_batch_where_keys_are_split(causal: bool, head_dim: int, cpu_variant: str) -> None:
    """Over 512 visible keys a GPU splits them; each request into its own number of parts."""
    requests = [Request(530, 5, 1), Request(20, 3, 2), Request(900, 9, 0)]
    shape: dict[str, Any] = {"query_heads": 2, "key_heads": 1, "head_dim": head_dim, "capacity": 950, "causal": causal}
    built = Built(Case(requests, block=11, **shape), torch.bfloat16)
    together = built.run()
    built.check(together)
    for b, r in enumerate(requests):
        alone = Built(Case([Request(r.prefix, r.rows, 0)], **shape), torch.bfloat16)
        alone.query[0], alone.key[0], alone.value[0] = (x[b, : r.rows] for x in (built.query, built.key, built.value))
        alone.prefix_key[0], alone.prefix_value[0] = built.prefix_key[r.slot], built.prefix_value[r.slot]
        assert torch.equal(alone.run()[0], together[b, : r.rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("given_workspace", [False, True])
def test_out_writes_only_rows_of_queries(
    given_workspace: bool, causal: bool, dtype: torch.dtype, cpu_variant: str
) -> None:
    built = Built(Case([Request(30, 6, 0), Request(4, 9, 1), Request(4, 9, -1)], block=12, causal=causal), dtype)
    out = torch.full_like(built.query, SENTINEL)
    workspace = block_attention.attention_workspace(built.query, built.key) if given_workspace else None
    if workspace is not None:
        workspace.fill_(255)  # NaN in either type
    function = block_attention.causal_attention if causal else block_attention.canvas_attention
    assert function(*built.operands(), out=out, workspace=workspace) is out
    built.check(out, outside=SENTINEL)
    plain = block_attention_plain.causal_attention_out if causal else block_attention_plain.canvas_attention_out
    out.fill_(SENTINEL)
    plain(*built.operands(), out=out, workspace=torch.empty(0))
    built.check(out, outside=SENTINEL)


@cpu_only
def test_a_workspace_at_any_address(cpu_variant: str) -> None:
    built = Built(Case([Request(30, 6)]), torch.bfloat16)
    size = block_attention.attention_workspace(built.query, built.key).numel()
    for offset in (0, 1, 63):
        out = torch.full_like(built.query, NAN)
        workspace = torch.full((offset + size,), 255, dtype=torch.uint8)[offset:]
        block_attention.canvas_attention(*built.operands(), out=out, workspace=workspace)
        built.check(out)


def test_nan_and_infinity_are_kept(cpu_variant: str) -> None:
    """A NaN in a key, and infinite scores, reach the rows that see them and no other."""
    case = Case([Request(10, 8)], query_heads=1, key_heads=1, causal=True)
    for poison in (NAN, float("inf")):
        built = Built(case, DTYPES[0])
        built.query[0].abs_()
        built.key[0, 5] = poison
        result = built.run()[0]
        assert bool(torch.isfinite(result[:5]).all())
        assert bool(torch.isnan(result[5:]).all())


def test_large_scores_do_not_overflow(cpu_variant: str) -> None:
    built = Built(Case([Request(200, 8)], capacity=200), DTYPES[0])
    built.query *= 1e4
    result = built.run()
    assert bool(torch.isfinite(result).all())
    # One key holds all the mass of a row.
    winner = built.wanted(0)
    bound = 1e-5 if DTYPES[0] == torch.float32 else 2.0**-8
    assert float((result[0].double() - winner).abs().max()) < bound * float(winner.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spans", [[], [(50, 58)]])
@pytest.mark.parametrize("chunk", [1, W - 2, W - 1, W, W + 1, 2 * W + 3, 100])
def test_chunked_encode(chunk: int, spans: Spans, dtype: torch.dtype, cpu_variant: str) -> None:
    """Encoding in chunks through a ring gives what one block gives. A span lies in one chunk."""
    if spans and spans[0][0] // chunk != (spans[0][1] - 1) // chunk:
        spans = []
    total, heads, dim, capacity = 100, 2, 32, W - 1
    whole = Built(Case([Request(0, total, 0, spans)], window=W, capacity=capacity, causal=True), dtype)
    cache_key = torch.full((1, capacity, heads, dim), NAN, dtype=dtype)
    cache_value = cache_key.clone()
    slot = torch.zeros(1, dtype=torch.int32)
    results = []
    for start in range(0, total, chunk):
        query, key, value = (x[:, start : start + chunk].contiguous() for x in (whole.query, whole.key, whole.value))
        place = (cache_key, cache_value, slot, torch.tensor([start], dtype=torch.int32))
        results.append(block_attention.causal_attention(query, key, value, *place, spans=whole.spans, window=W))
        block_attention.append_to_cache(key, value, *place)
    whole.check(torch.cat(results, dim=1))
    whole.check(whole.run())


APPENDS = {
    "empty_cache": Case([Request(0, 10)], capacity=16),
    "wraps": Case([Request(13, 10)], capacity=16),
    "wrapped_often": Case([Request(1000, 16)], capacity=16),
    "longer_than_capacity": Case([Request(5, 70)], capacity=16),
    "much_longer": Case([Request(3, 200)], capacity=130),
    "capacity_one": Case([Request(3, 5)], capacity=1),
    "ragged": Case([Request(5, 9, 2), Request(30, 2, 0), Request(9, 5, -1), Request(7, 0, 1)], capacity=16, block=12),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("append", [block_attention.append_to_cache, block_attention_plain.append_to_cache])
@pytest.mark.parametrize("name", APPENDS)
def test_append(name: str, append: Callable[..., None], dtype: torch.dtype) -> None:
    case = APPENDS[name]
    built = Built(case, dtype)
    wanted_key, wanted_value = built.prefix_key.clone(), built.prefix_value.clone()
    for b, r in enumerate(case.requests):
        for position in range(r.prefix, r.prefix + r.rows if r.slot >= 0 else 0):
            wanted_key[r.slot, position % case.capacity] = built.keys[b][position]
            wanted_value[r.slot, position % case.capacity] = built.values[b][position]
    place = (built.prefix_key, built.prefix_value, built.slot, built.prefix_length)
    append(built.key, built.value, *place, built.length)
    assert torch.equal(built.prefix_key.nan_to_num(SENTINEL), wanted_key.nan_to_num(SENTINEL))
    assert torch.equal(built.prefix_value.nan_to_num(SENTINEL), wanted_value.nan_to_num(SENTINEL))


PARALLEL_FOR = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int64, ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64), ctypes.c_void_p
)


class CpuContext(ctypes.Structure):
    """struct dgemma_cpu."""

    _fields_ = (
        ("parallel_for", PARALLEL_FOR),
        ("pool", ctypes.c_void_p),
        ("variant", ctypes.c_int),
        ("message", ctypes.c_char * 256),
    )


class AppendOperation(ctypes.Structure):
    """struct dgemma_append_to_cache."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "block_length", "key_heads", "head_dim", "slots", "capacity")),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("key", "value", "prefix_key", "prefix_value")),
        *((name, ctypes.c_void_p) for name in ("slot", "prefix_length", "length")),
    )


@cpu_only
@pytest.mark.parametrize("backwards", [False, True])
def test_append_in_any_order_of_tasks(backwards: bool) -> None:
    """A host may run the tasks of one call in any order: no two may write the same row."""

    @PARALLEL_FOR
    def parallel_for(pool: Any, tasks: int, task: Any, state: Any) -> None:
        for i in reversed(range(tasks)) if backwards else range(tasks):
            task(state, i)

    case = Case([Request(3, 200)], capacity=70)
    built = Built(case, torch.float32)
    tensors = (built.key, built.value, built.prefix_key, built.prefix_value, built.slot, built.prefix_length)
    pointers = [tensor.data_ptr() for tensor in tensors]
    operation = AppendOperation(1, 200, case.key_heads, case.head_dim, 1, 70, 0, *pointers, None)
    context = CpuContext(parallel_for, None, -1, b"")
    library = ctypes.CDLL(_C.__file__)
    assert library.dgemma_cpu_append_to_cache(ctypes.byref(operation), ctypes.byref(context)) == 0, context.message
    for position in range(203 - 70, 203):
        assert torch.equal(built.prefix_key[0, position % 70], built.keys[0][position])
        assert torch.equal(built.prefix_value[0, position % 70], built.values[0][position])


@cpu_only
def test_empty_batch_and_empty_block() -> None:
    for batch, block in ((0, 4), (2, 0)):
        query, key = torch.zeros(batch, block, 4, 8), torch.zeros(batch, block, 2, 8)
        cache, numbers = torch.zeros(2, 6, 2, 8), torch.arange(batch, dtype=torch.int32)
        for module in (block_attention, block_attention_plain):
            assert module.canvas_attention(query, key, key, cache, cache, numbers, numbers).shape == query.shape
            assert module.causal_attention(query, key, key, cache, cache, numbers, numbers).shape == query.shape
            module.append_to_cache(key, key, cache, cache, numbers, numbers)
        assert bool((cache == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    canvas = Built(Case([Request(10, 4, 1), Request(3, 5, 0)], window=W, capacity=W - 1), dtype)
    spans = [(11, 13)]
    causal = Built(Case([Request(10, 4, 1, spans), Request(3, 5, 0)], capacity=16, causal=True), dtype)
    for built, op in ((canvas, torch.ops.dgemma.canvas_attention), (causal, torch.ops.dgemma.causal_attention)):
        for tensor in (built.query, built.key, built.value, built.prefix_key, built.prefix_value):
            tensor.nan_to_num_(0.0)  # opcheck compares tensors with NaN as unequal
        torch.library.opcheck(op.default, built.operands())
        given = {
            "out": torch.zeros_like(built.query),
            "workspace": block_attention.attention_workspace(built.query, built.key),
        }
        given["workspace"].zero_()
        torch.library.opcheck(op.out, built.operands(), given)
    place = (causal.prefix_key, causal.prefix_value, causal.slot, causal.prefix_length, causal.length)
    torch.library.opcheck(torch.ops.dgemma.append_to_cache.default, (causal.key, causal.value, *place))


def good_arguments() -> dict[str, Any]:
    """Arguments of causal_attention that are all right: 2 requests of 5 rows, 3 slots of 9 rows."""
    ids = [torch.tensor(x, dtype=torch.int32) for x in ([2, 0], [9, 4], [5, 3])]
    return {
        "query": torch.zeros(2, 5, 4, 8),
        "key": torch.zeros(2, 5, 2, 8),
        "value": torch.zeros(2, 5, 2, 8),
        "prefix_key": torch.zeros(3, 9, 2, 8),
        "prefix_value": torch.zeros(3, 9, 2, 8),
        "slot": ids[0],
        "prefix_length": ids[1],
        "length": ids[2],
        "spans": torch.tensor([[[9, 11]], [[0, 0]]], dtype=torch.int32),
        "window": 0,
        "scale": 1.0,
    }


def ints(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD: list[tuple[str, Any]] = [
    ("query", torch.zeros(2, 5, 4, 8, dtype=torch.float16)),
    ("query", torch.zeros(2, 5, 4, 8, dtype=torch.bfloat16)),
    ("query", torch.zeros(2, 5, 32)),
    ("query", torch.zeros(2, 5, 3, 8)),
    ("query", torch.zeros(2, 5, 0, 8)),
    ("query", torch.zeros(2, 4, 4, 8)),
    ("query", torch.zeros(2, 4, 5, 8).transpose(1, 2)),
    ("query", torch.zeros(2, 5, 4, 8, device="meta")),
    ("key", torch.zeros(2, 5, 8)),
    ("key", torch.zeros(2, 5, 2, 8, dtype=torch.float64)),
    ("value", torch.zeros(2, 5, 2, 7)),
    ("value", torch.zeros(2, 5, 1, 8).expand(2, 5, 2, 8)),
    ("prefix_key", torch.zeros(3, 2, 8)),
    ("prefix_key", torch.zeros(3, 9, 2, 8, dtype=torch.bfloat16)),
    ("prefix_value", torch.zeros(3, 8, 2, 8)),
    ("slot", torch.zeros(2, dtype=torch.int64)),
    ("slot", ints(0)),
    ("slot", ints(0, 3)),
    ("slot", ints(-2, 0)),
    ("prefix_length", ints(3, -1)),
    ("prefix_length", ints(10, 0)),  # ten positions in nine rows, and no window
    ("prefix_length", ints(2**31 - 1, 0)),
    ("length", ints(6, 5)),
    ("length", ints(-1, 5)),
    ("length", ints([5, 5])),
    ("spans", ints([9, 11], [0, 0])),
    ("spans", ints([[9, 8]], [[0, 0]])),
    ("spans", ints([[-1, 3]], [[0, 0]])),
    ("spans", ints([[1, 2]])),
    ("spans", torch.zeros(2, 1, 2)),
    ("window", -1),
    ("scale", NAN),
]
BAD_IDS = [f"{name}_{i}" for i, (name, _) in enumerate(BAD)]
NUMBERS = ("query", "key", "value")


def named(name: str) -> str:
    """A pattern for messages about an argument, or about one number in it."""
    return rf"(^|: )({name})(\[[\d, ]+\])?: got .*, wants "


@cpu_only
@pytest.mark.parametrize(("name", "bad"), BAD, ids=BAD_IDS)
def test_bad_input(name: str, bad: Any) -> None:
    """The wrapper names the argument in a ValueError; the raw op refuses it too."""
    arguments = good_arguments()
    block_attention.causal_attention(**arguments)
    arguments[name] = bad
    canvas = {k: v for k, v in arguments.items() if k != "spans"}
    # A block tensor of another type or shape than its peers is named by whichever is looked at second.
    pattern = named("|".join(("query", "key", "value", "prefix_key")) if name in NUMBERS else name)
    with pytest.raises(ValueError, match=pattern):
        block_attention.causal_attention(**arguments)
    on_meta = isinstance(bad, torch.Tensor) and bad.is_meta  # the raw op then only works out a shape
    if not on_meta:
        with pytest.raises(RAW_ERRORS):
            torch.ops.dgemma.causal_attention(*arguments.values())
    if name != "spans":
        with pytest.raises(ValueError, match=pattern):
            block_attention.canvas_attention(**canvas)
        if not on_meta:
            with pytest.raises(RAW_ERRORS):
                torch.ops.dgemma.canvas_attention(*canvas.values())


@cpu_only
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("key", torch.zeros(2, 5, 2, 8, dtype=torch.int32)),
        ("key", torch.zeros(2, 5, 2, 4)),
        ("value", torch.zeros(2, 5, 2, 8, dtype=torch.bfloat16)),
        ("prefix_value", torch.zeros(3, 2, 9, 8).transpose(1, 2)),
        ("slot", ints(1, 1)),
        ("slot", ints(3, 1)),
        ("prefix_length", ints(-5, 0)),
        ("prefix_length", ints(2**31 - 3, 0)),
        ("length", ints(6, 0)),
    ],
)
def test_bad_append(name: str, bad: torch.Tensor) -> None:
    arguments = {k: v for k, v in good_arguments().items() if k not in ("query", "spans", "window", "scale")}
    block_attention.append_to_cache(**arguments)
    arguments[name] = bad
    with pytest.raises(ValueError, match=named("key|value|prefix_key" if name == "key" else name)):
        block_attention.append_to_cache(**arguments)
    with pytest.raises(RAW_ERRORS):
        torch.ops.dgemma.append_to_cache(*arguments.values())


@cpu_only
def test_bad_out_and_workspace() -> None:
    arguments = good_arguments()
    query, size = arguments["query"], block_attention.attention_workspace(arguments["query"], arguments["key"]).numel()
    good = {"out": torch.zeros_like(query), "workspace": torch.zeros(size, dtype=torch.uint8)}
    block_attention.causal_attention(**arguments, **good)
    for name, bad in (
        ("out", torch.zeros(2, 5, 4, 9)),
        ("out", torch.zeros_like(query, dtype=torch.bfloat16)),
        ("out", torch.zeros(2, 4, 5, 8).transpose(1, 2)),
        ("workspace", torch.zeros(size - 1, dtype=torch.uint8)),
        ("workspace", torch.zeros(0, dtype=torch.uint8)),
        ("workspace", torch.zeros(size)),
        ("workspace", torch.zeros(2 * size, dtype=torch.uint8)[::2]),
    ):
        with pytest.raises(ValueError, match=named(name)):
            block_attention.causal_attention(**arguments, **{**good, name: bad})
        with pytest.raises(RAW_ERRORS, match=name):
            torch.ops.dgemma.causal_attention.out(*arguments.values(), **{**good, name: bad})


@cpu_only
def test_unknown_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGEMMA_CPU", "mmx")
    with pytest.raises(ValueError, match="DGEMMA_CPU"):
        block_attention.causal_attention(**good_arguments())
