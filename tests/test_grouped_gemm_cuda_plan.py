"""The launch plans of moe_ffn in CUDA, and the work tiles that blocks take by them: pure host code, walked."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from sim.build import SUPPORTED
from test_grouped_gemm import route
from test_grouped_gemm_cuda import PATHS, describe, library, plan_of, tables_of

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")


@pytest.mark.parametrize("routing", ["distinct", "one expert", "holes", "nothing"])
@pytest.mark.parametrize("tokens", [1, 7, 256, 1024, 4096])
@pytest.mark.parametrize("capability", PATHS)
def test_units_cover_the_model_once(capability: int, tokens: int, routing: str) -> None:
    """At true extents: every weight tile of a hit expert meets every pair of it once, tiles side by side."""
    experts = 128
    op = describe(tokens, 2816, 704, experts, 8)
    plan = plan_of(op, capability)
    ids = route(routing, tokens, experts, 8)
    first, tiles_before, _ = tables_of(ids, experts, plan.token_tile)
    for weight_tiles in (plan.gate_up_weight_tiles, plan.down_weight_tiles):
        units = np.full((int(tiles_before[-1]) * weight_tiles + 1, 4), -7, dtype=np.int32)
        count = ctypes.c_int32()
        assert (
            library().moe_units(
                first.ctypes.data_as(ctypes.c_void_p),
                tiles_before.ctypes.data_as(ctypes.c_void_p),
                experts,
                weight_tiles,
                plan.token_tile,
                units.ctypes.data_as(ctypes.c_void_p),
                ctypes.byref(count),
            )
            is None
        )
        assert count.value == len(units) - 1
        covered = np.zeros((weight_tiles, int(first[-1])), dtype=np.int64)
        for expert, weight_tile, begin, rows in units[:-1]:
            assert 1 <= rows <= plan.token_tile
            assert first[expert] <= begin
            assert begin + rows <= first[expert + 1]
            covered[weight_tile, begin : begin + rows] += 1
        assert (covered == 1).all()
        order = [tuple(unit) for unit in units[:-1, :3].tolist()]
        assert order == sorted(order)
        assert (units[-1] == -7).all()


def work_tiles_of(
    tables: tuple[np.ndarray, np.ndarray], weight_tiles: int, token_tile: int, contiguous: bool, block: int, blocks: int
) -> list[tuple[int, ...]]:
    """(expert, weight tile, first, rows, whether the pairs are new) of a block's work tiles, in its order."""
    first, tiles_before = tables
    out, count = np.zeros((int(tiles_before[-1]) * weight_tiles + 1, 5), dtype=np.int32), ctypes.c_int32()
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (first, tiles_before)]
    numbers = [len(first) - 1, weight_tiles, token_tile, int(contiguous), block, blocks]
    to = out.ctypes.data_as(ctypes.c_void_p)
    assert library().moe_work_tiles_of(*pointers, *numbers, to, ctypes.byref(count)) is None
    return [tuple(row) for row in out[: count.value].tolist()]


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("routing", ["distinct", "one expert", "holes", "nothing"])
@pytest.mark.parametrize(("tokens", "blocks"), [(1, 132), (40, 5), (256, 132), (1024, 132)])
def test_blocks_divide_the_work_tiles(tokens: int, blocks: int, routing: str, contiguous: bool) -> None:
    """Each to one block; evenly; and pairs are said to be new wherever they are not those of the work tile before."""
    experts, weight_tiles, token_tile = 128, 22, 32
    first, tiles_before, _ = tables_of(route(routing, tokens, experts, 8), experts, token_tile)
    taken = [
        work_tiles_of((first, tiles_before), weight_tiles, token_tile, contiguous, block, blocks)
        for block in range(blocks)
    ]
    every = [(expert, weight, begin, rows) for tiles in taken for expert, weight, begin, rows, _ in tiles]
    assert len(set(every)) == len(every) == int(tiles_before[-1]) * weight_tiles
    assert max(map(len, taken)) - min(map(len, taken)) <= 1
    for tiles in taken:
        before = None
        for expert, _, begin, rows, new_pairs in tiles:
            assert new_pairs or before == (expert, begin, rows)
            before = (expert, begin, rows)
    if contiguous:
        assert every == sorted(every, key=lambda tile: (tile[0], tile[1], tile[2]))
        if routing == "distinct" and tokens == 256:  # one token tile for nearly every expert: a run meets few of them
            assert sum(new for tiles in taken for *_, new in tiles) < len(every) / 8


@pytest.mark.parametrize(("weight_tiles", "k_steps", "steps"), [(11, 44, 9), (22, 11, 9), (22, 6, 12), (3, 2, 9)])
def test_likely_steps_are_the_first_where_every_expert_has_one_token_tile(
    weight_tiles: int, k_steps: int, steps: int
) -> None:
    experts, blocks = 128, 132
    first = np.arange(experts + 1, dtype=np.int32) * 5
    tiles_before = np.arange(experts + 1, dtype=np.int32)
    for block in (0, 1, 64, 131):
        tiles = work_tiles_of((first, tiles_before), weight_tiles, 32, True, block, blocks)
        wanted = [(expert, weight, step) for expert, weight, *_ in tiles for step in range(k_steps)][:steps]
        out, count = np.zeros((steps + 1, 3), dtype=np.int32), ctypes.c_int32()
        numbers = [experts, weight_tiles, k_steps, steps, block, blocks]
        assert library().moe_likely_steps(*numbers, out.ctypes.data_as(ctypes.c_void_p), ctypes.byref(count)) is None
        assert [tuple(row) for row in out[: count.value].tolist()] == wanted


@pytest.mark.parametrize(
    ("tokens", "contiguous", "likely_steps"),
    [(1, 1, 0), (127, 1, 0), (128, 1, 9), (256, 1, 9), (1024, 1, 6), (2048, 1, 4), (2049, 0, 0), (4096, 0, 0)],
)
def test_order_follows_the_load(tokens: int, contiguous: int, likely_steps: int) -> None:
    """Runs while an expert mostly has one token tile; weights ahead of the tables once every expert is likely hit."""
    plan = plan_of(describe(tokens, 2816, 704, 128, 8))
    assert (plan.contiguous, plan.likely_steps) == (contiguous, likely_steps)
    assert plan_of(describe(tokens, 2816, 704, 128, 8), 80).contiguous == 0


def test_plan_for_the_model_on_an_h200() -> None:
    plan = plan_of(describe(256, 2816, 704, 128, 8))
    assert plan.text == (
        "pass: 256 tokens\n"
        "gate_up: 132 blocks of 384 threads, 11 weight tiles of 128 rows per expert, 44 steps of 64, "
        "token tiles of 64, 9 stages of 24576 bytes\n"
        "down: 132 blocks of 384 threads, 22 weight tiles of 128 rows per expert, 11 steps of 64, "
        "token tiles of 64, 9 stages of 24576 bytes\n"
        "order: contiguous runs, 9 steps of weights asked for early\n"
        "combine: 704 blocks of 128 threads\n"
        "workspace: 25961984 bytes\n"
    )


def test_plan_for_the_model_on_an_a100() -> None:
    plan = plan_of(describe(256, 2816, 704, 128, 8), 80, 108)
    assert plan.text == (
        "pass: 256 tokens\n"
        "gate_up: 324 blocks of 128 threads, 22 weight tiles of 64 rows per expert, 44 steps of 64, "
        "token tiles of 32, 4 stages of 12288 bytes\n"
        "down: 324 blocks of 128 threads, 44 weight tiles of 64 rows per expert, 11 steps of 64, "
        "token tiles of 32, 4 stages of 12288 bytes\n"
        "combine: 704 blocks of 128 threads\n"
        "workspace: 25961984 bytes\n"
    )


@pytest.mark.parametrize(
    ("capability", "tokens", "blocks"),
    [
        (80, 256, 3),
        (80, 512, 3),
        (80, 4096, 2),
        (86, 256, 2),
        (89, 512, 2),
        (120, 4096, 1),
        (100, 256, 3),
        (100, 4096, 2),
    ],
)
def test_blocks_share_a_multiprocessor(capability: int, tokens: int, blocks: int) -> None:
    assert plan_of(describe(tokens, 2816, 704, 128, 8), capability, 100).down_blocks == 100 * blocks


@pytest.mark.parametrize(
    ("tokens", "token_tile", "stages"),
    [(1, 32, 4), (256, 32, 4), (257, 64, 3), (512, 64, 3), (513, 128, 3), (16384, 128, 3)],
)
def test_token_tile_follows_the_load_on_sm80(tokens: int, token_tile: int, stages: int) -> None:
    plan = plan_of(describe(tokens, 2816, 704, 128, 8), 80)
    assert (plan.token_tile, plan.stages) == (token_tile, stages)


@pytest.mark.parametrize(
    ("tokens", "token_tile", "stages"),
    [(1, 64, 9), (256, 64, 9), (512, 64, 9), (513, 128, 6), (1024, 128, 6), (1025, 256, 4), (16384, 256, 4)],
)
def test_token_tile_follows_the_load(tokens: int, token_tile: int, stages: int) -> None:
    """Twice the mean load of an expert, up to 256."""
    plan = plan_of(describe(tokens, 2816, 704, 128, 8))
    assert (plan.token_tile, plan.stages) == (token_tile, stages)


def test_workspace_stops_growing_with_tokens() -> None:
    """A pass is 4,096 tokens of the model; longer calls take no more."""
    sizes = [plan_of(describe(tokens, 2816, 704, 128, 8)).workspace_bytes for tokens in (256, 4096, 16384)]
    assert sizes[0] < sizes[1] == sizes[2] < 420e6
