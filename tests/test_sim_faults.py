"""Every misuse of a device wrapper that the test bed claims to report is reported, with thread, line and reason."""

from __future__ import annotations

import ctypes
import re

import pytest

from sim.build import SIM, SUPPORTED, sim_library

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")

PARTED, OTHERS = r"deadlock: lanes part: this one is in ", r"of the same mask in \w+(, barrier)?, at faults\.cu:\d+"

# Misuses by the kernel's name in tests/sim/kernels/faults.cu.
REPORTS = {
    "part_at_syncthreads": r"ends while others wait at __syncthreads|only \d+ of the block have not ended",
    "shuffle_with_ended_lane": r"lanes 0x00000020 of the mask have ended|ends while other lanes .* __shfl_xor_sync",
    "lanes_part": r"lanes part: this one is in __(ballot|any)_sync, lanes 0x[0-9a-f]+ of the same mask in __",
    "lane_outside_its_mask": r"lane \d+ is not in its own mask 0x0000ffff",
    "shuffle_from_outside_the_mask": r"lane \d+ reads lane \d+, which is not in the mask",
    # Patterns that kernels once had: a deadlock on a GPU.
    "warp_index_of_one_lane": rf"{PARTED}__(shfl_sync|syncthreads, barrier), lanes 0x[0-9a-f]+ {OTHERS}",
    "warpgroup_index_of_one_lane": rf"{PARTED}__(shfl_sync|syncthreads, barrier), lanes 0x[0-9a-f]+ {OTHERS}",
    "elect_in_a_branch": rf"{PARTED}(elect_one|__syncthreads, barrier), lanes 0x[0-9a-f]+ {OTHERS}",
    "same_shuffle_in_two_places": rf"{PARTED}__shfl_xor_sync, lanes 0x[0-9a-f]+ {OTHERS}",
    "load_tiles_in_two_places": rf"{PARTED}load_tiles, lanes 0x[0-9a-f]+ {OTHERS}",
    "mma_of_some_lanes": rf"{PARTED}(mma_m16n8k16|__syncwarp), lanes 0x[0-9a-f]+ {OTHERS}",
    "barrier_of_some_lanes": rf"{PARTED}(named_barrier_sync|__syncwarp), lanes 0x[0-9a-f]+ {OTHERS}",
    "barriers_of_two_numbers": r"named_barrier_sync [12] of 64 threads: lane \d+ of the warp calls barrier [12] of 64",
    "syncthreads_in_two_places": rf"{PARTED}__syncthreads, barrier, lanes 0x[0-9a-f]+ {OTHERS}",
    "cluster_arrive_of_some_lanes": rf"{PARTED}cluster_(arrive|wait), lanes 0x[0-9a-f]+ {OTHERS}",
    "wgmma_fence_of_some_lanes": r"wgmma without wgmma_fence\(\)",
    "wgmma_in_two_places": r"wgmma: threads of the warpgroup issue different ones \(the other at faults\.cu:\d+\)",
    "wgmma_commit_of_one_lane": rf"{PARTED}wgmma_(commit|wait), lanes 0x[0-9a-f]+ {OTHERS}",
    "wgmma_wait_of_some_lanes": r"ends (before wgmma_wait|while other lanes .* wgmma_wait)|lanes 0x00000080 .* ended",
    # What the head once asked for: a block of 384 threads owns 384 x 168, not 65,536.
    "more_registers_than_the_block_has": r"deadlock: (.|\n)*waits in setmaxnreg for 768 registers of its warp; "
    r"of the block's 64512, 512 are free, at faults\.cu:\d+",
    "registers_of_some_lanes": r"while other lanes .* setmaxnreg\.dec, at f|setmaxnreg\.dec: lanes 0x80000000 .* ended",
    "registers_of_some_warps": r"without the setmaxnreg that warp \d+ |setmaxnreg\.dec: warp (2|6|10) .* has ended",
    "registers_of_two_counts": r"setmaxnreg\.dec: (40|48) registers, but warp \d+ of the warpgroup asks for (40|48)",
    "increase_to_fewer_registers": r"setmaxnreg\.inc: from 168 registers to 160",
    "arrive_too_often": r"mbarrier at offset 4096: one arrival more than the 1 .* still waits for 16 bytes",
    "too_many_bytes": r"mbarrier at offset 4096: 16 bytes more have come than were expected in phase 0",
    "too_few_bytes": r"thread 0: waits for .* phase 0: 0 of 1 arrivals and 16 bytes are missing",
    "initialise_twice": r"the mbarrier at offset 4096 is initialised already",
    "never_initialise": r"no mbarrier at offset 4096",
    "overwrite_mbarrier": r"no mbarrier at offset 4096 in shared memory \(never initialised, or overwritten\)",
    "no_mbarrier_fence": r"used by a copy without fence_mbarrier_init\(\)",
    "wait_for_nobody": r"threads 0-127: waits for parity 0 .* in phase 0: 1 of 2 arrivals and 0 bytes",
    "misaligned_tile": r"tma_load: offset 64 in shared memory is not a multiple of 128",
    "misaligned_swizzle": r"tma_load: offset 128 in shared memory is not a multiple of 1024",
    "end_before_the_copy": r"ends as the last of its block, while copies to or from the block's shared memory",
    "no_proxy_fence": r"bulk_store reads shared memory at offset \d+, written by ordinary stores .* no fence_proxy",
    "end_before_the_store_is_read": r"ends without bulk_wait_read for a store that it started \(faults\.cu:\d+\)",
    "odd_bulk_size": r"bulk_store: 100 bytes; must be a multiple of 16",
    "touch_past_the_end": r"touched shared memory at offset 8192; the block has 5120 bytes",
    "copy_past_the_end": r"cp\.async: (16 bytes at offset 5120 reach past|.* is not in shared memory)",
    "misaligned_cp_async": r"cp\.async: offset 8 in shared memory is not a multiple of 16",
    "misaligned_ldmatrix": r"load_tiles: offset 8 in shared memory is not a multiple of 16",
    "end_before_cp_async": r"ends without cp_async_wait for a copy that it started \(faults\.cu:\d+\)",
    "wgmma_without_fence": r"wgmma without wgmma_fence\(\)",
    "wgmma_outside_shared_memory": r"wgmma: row \d+, k \d+ of B lies at shared address \d+, outside the block's",
    "wgmma_misaligned_swizzle": r"wgmma: B begins at shared address 1280, not in the first line of a swizzle period",
    "end_before_wgmma": r"ends before wgmma_wait for its last wgmma",
    "wgmma_no_proxy_fence": r"wgmma reads .* thread \d+ wrote \(faults\.cu:\d+\).* no fence_proxy_async\(\)",
    "wgmma_differs_by_thread": r"wgmma: threads of the warpgroup issue different ones",
    "wgmma_descriptor_bits": r"wgmma: a matrix descriptor \([0-9a-f]{16}\) has bits where none may be",
    "wgmma_registers_changed": r"wgmma_wait: registers of A were changed before it \(the product at .*faults\.cu:\d+\)",
    "barrier_counts_differ": r"named_barrier_sync 1: expects \d+ threads, but others of this round expect \d+|"
    r"waits at named barrier 1: 64 of 96 threads have come, at f",
    "barrier_twice": r"named_barrier_arrive 1: this warp has already come in this round",
    "barrier_of_odd_count": r"named_barrier_sync 1: 100 threads; must be a multiple of 32",
    "wait_for_a_flag": r"deadlock: threads look again .*\n.*\n.*threads 0-127: looks at a flag in global memory, at f",
    "cluster_arrive_twice": r"cluster_arrive twice without cluster_wait",
    "fill_the_stack": r"its stack is full",
    "struct_too_large": r"the shared-memory struct has 100000 bytes, the launch asks for 5120",
    "end_before_own_cp_async": r"ends without cp_async_wait for a copy that it started \(faults\.cu:\d+\)",
    "two_phases_behind": r"waits two phases behind: for the end of phase 1 of the mbarrier at offset 4096",
    "initialise_unseen": r"race: .* (reads|writes) shared memory at offset 4096, which thread \d+ (wrote|read) ",
    "some_forget_the_proxy_fence": r"bulk store reads .* which thread \d+ wrote .*faults.* no fence_proxy_async\(\)",
    "copy_over_what_was_read": r"bulk_load writes .* which thread \d+ read \(faults.*with no fence_proxy_async\(\)",
    "write_without_barrier": r"race: .* shared memory at offset \d+, which thread \d+ (wrote|read) \(faults\.cu:\d+\)",
    "write_within_a_warp": r"race: .* shared memory at offset \d+, which thread \d+ (wrote|read) \(faults\.cu:\d+\)",
    "write_what_others_read": r"race: .* shared memory at offset 0, which thread \d+ (wrote|read) \(faults\.cu:\d+\)",
    "read_before_the_copy": r"race: .* shared memory at offset \d+, which (a copy that an mbarrier|thread 32 read)",
    "write_before_the_store_is_read": r"race: .*writes .* offset 3, which a copy still under way read \(faults\.cu:\d+",
    "read_anothers_cp_async": r"race: .*reads .* which (a copy still under way|thread \d+) wrote \(faults\.cu:\d+\)",
    "atomic_beside_ordinary": r"race: .* shared memory at offset 0, which thread \d+ wrote \(faults\.cu:\d+\)",
    "wgmma_tile_rewritten": r"race: .* shared memory at offset \d+, which (a wgmma read|thread \d+ wrote) \(faults",
    "read_before_the_wait": r"reads global memory that the kernel in front writes, without wait_for_previous_kernel",
    "noncoherent_after_the_wait": r"reads past the coherent caches \(ld\.global\.nc\) what the kernel in front writes",
    "copy_before_the_wait": r"reads global memory that the kernel in front writes, without wait_for_previous_kernel",
    "read_two_kernels_back": r"reads global memory that the kernel in front writes, without wait_for_previous_kernel",
    "prefetch_by_too_few_coordinates": r"tma_prefetch_to_l2: 3 coordinates for a tensor map of rank 2",
}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    # -O1, so that the recursion that overflows a stack stays a recursion.
    library = sim_library("faults", [SIM / "kernels" / "faults.cu"], ["-O1"])
    library.fault_name.restype = ctypes.c_char_p
    library.run_fault.restype = ctypes.c_char_p
    library.launch_with.restype = ctypes.c_char_p
    library.load_by_tma.restype = ctypes.c_char_p
    library.encode.restype = ctypes.c_char_p
    return library


def test_every_fault_has_a_report(library: ctypes.CDLL) -> None:
    assert {library.fault_name(i).decode() for i in range(library.fault_count())} == set(REPORTS)


# Copies that land early hide these, so they are reported in some orders only.
BY_LUCK_UNSEEN: set[str] = set()


@pytest.mark.parametrize("fault", REPORTS)
def test_fault_is_reported(library: ctypes.CDLL, fault: str) -> None:
    number = next(i for i in range(library.fault_count()) if library.fault_name(i).decode() == fault)
    seeds = range(1, 9)
    seen = 0
    for seed in seeds:
        library.sim_set_seed(ctypes.c_uint64(seed))
        message = library.run_fault(number)
        if message is None:
            continue
        seen += 1
        text = message.decode()
        assert re.search(REPORTS[fault], text), text
        assert re.search(r"block \(0, 0, 0\)( thread \d+|:)", text), text
        assert re.search(r"faults\.cu:\d+", text) or re.search(r" ends | touched |stack is full", text), text
    assert seen >= (2 if fault in BY_LUCK_UNSEEN else len(seeds)), f"reported in {seen} of {len(seeds)} orders"


# The most shared memory of a block, in KB: CUDA C++ Programming Guide, "Compute Capabilities".
@pytest.mark.parametrize(("capability", "most"), [(80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)])
def test_shared_memory_has_a_limit(library: ctypes.CDLL, capability: int, most: int) -> None:
    library.sim_set_gpu(capability, 3)
    try:
        assert library.launch_with(most * 1024) is None
        assert b"more shared memory than a block of this GPU may have" in library.launch_with(most * 1024 + 1)
    finally:
        library.sim_set_gpu(90, 3)


def test_an_older_gpu_has_no_tma(library: ctypes.CDLL) -> None:
    library.sim_set_gpu(89, 3)
    try:
        assert re.search(rb"faults\.cu:\d+: tma_load: needs compute capability 9\.0", library.load_by_tma())
    finally:
        library.sim_set_gpu(90, 3)


# CUDA Driver API, cuTensorMapEncodeTiled.
@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("base", 8, "base must be a multiple of 16 bytes"),
        ("rank", 6, "rank must be 1 to 5"),
        ("size", 0, "size must be 1 to 2^32"),
        ("size", 2**32 + 1, "size must be 1 to 2^32"),
        ("stride", 136, "strides must be multiples of 16 bytes"),
        ("stride", 2**40, "strides must be below 2^40 bytes"),
        ("box", 257, "box must be 1 to 256"),
        ("box", 0, "box must be 1 to 256"),
        ("inner box", 60, "the box's innermost extent must be a multiple of 16 bytes"),
        ("inner box", 72, "the box's innermost extent must fit a row of the swizzle"),
        ("swizzle", 2, "the box's innermost extent must fit a row of the swizzle"),
        ("swizzle", 0, None),
        ("box", 256, None),
    ],
)
def test_tensor_map_keeps_the_rules(library: ctypes.CDLL, what: str, value: int, message: str | None) -> None:
    found = library.encode(what.encode(), ctypes.c_uint64(value))
    assert (found.decode() if found else None) == message
