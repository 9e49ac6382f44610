"""Every misuse of a device wrapper that the test bed claims to report is reported, with thread, line and reason."""

from __future__ import annotations

import ctypes
import re

import pytest

from sim.build import SIM, SUPPORTED, sim_library

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")

PARTED, OTHERS = (
    r"deadlock: lanes part: this one is in ",
    r"of the same mask in \w+(, barrier)?, at \w+\.cu:\d+",
)

OF_ANOTHER_BLOCK = r"\d+, which thread \d+ of block \(\d, 0, 0\) (wrote|read) \(global_memory\.cu:\d+\)"
OF_THE_FRONT = r"global memory that the kernel in front writes \(run\.cu:\d+\)"

# Misuses by the kernel's name in tests/sim/kernels/faults.
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
    "wgmma_in_two_places": r"wgmma: threads of the warpgroup issue different ones \(the other at matrices\.cu:\d+\)",
    "wgmma_commit_of_one_lane": rf"{PARTED}wgmma_(commit|wait), lanes 0x[0-9a-f]+ {OTHERS}",
    "wgmma_wait_of_some_lanes": r"ends (before wgmma_wait|while other lanes .* wgmma_wait)|lanes 0x00000080 .* ended",
    # What the head once asked for: a block of 384 threads owns 384 x 168, not 65,536.
    "more_registers_than_the_block_has": r"deadlock: (.|\n)*waits in setmaxnreg for 768 registers of its warp; "
    r"of the block's 64512, 512 are free, at collectives\.cu:\d+",
    "registers_of_some_lanes": r"while other lanes .* setmaxnreg\.dec, at c|setmaxnreg\.dec: lanes 0x80000000 .* ended",
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
    "end_before_the_store_is_read": r"ends without bulk_wait_read for a store that it started \(\w+\.cu:\d+\)",
    "odd_bulk_size": r"bulk_store: 100 bytes; must be a multiple of 16",
    "touch_past_the_end": r"touched shared memory at offset 8192; the block has 5120 bytes",
    "copy_past_the_end": r"cp\.async: (16 bytes at offset 5120 reach past|.* is not in shared memory)",
    "misaligned_cp_async": r"cp\.async: offset 8 in shared memory is not a multiple of 16",
    "misaligned_ldmatrix": r"load_tiles: offset 8 in shared memory is not a multiple of 16",
    "end_before_cp_async": r"ends without cp_async_wait for a copy that it started \(\w+\.cu:\d+\)",
    "wgmma_without_fence": r"wgmma without wgmma_fence\(\)",
    "wgmma_outside_shared_memory": r"wgmma: row \d+, k \d+ of B lies at shared address \d+, outside the block's",
    "wgmma_misaligned_swizzle": r"wgmma: B begins at shared address 1280, not in the first line of a swizzle period",
    "end_before_wgmma": r"ends before wgmma_wait for its last wgmma",
    "wgmma_no_proxy_fence": r"wgmma reads .* thread \d+ wrote \(matrices\.cu:\d+\).* no fence_proxy_async\(\)",
    "wgmma_differs_by_thread": r"wgmma: threads of the warpgroup issue different ones",
    "wgmma_descriptor_bits": r"wgmma: a matrix descriptor \([0-9a-f]{16}\) has bits where none may be",
    "wgmma_registers_changed": r"wgmma_wait: registers of A were changed before it \(the product at matrices\.cu:\d+\)",
    "barrier_counts_differ": r"named_barrier_sync 1: expects \d+ threads, but others of this round expect \d+|"
    r"waits at named barrier 1: 64 of 96 threads have come, at b",
    "barrier_twice": r"named_barrier_arrive 1: this warp has already come in this round",
    "barrier_of_odd_count": r"named_barrier_sync 1: 100 threads; must be a multiple of 32",
    "wait_for_a_flag": r"deadlock: threads look again .*\n.*\n.*threads 0-127: looks at a flag in global memory, at g",
    "cluster_arrive_twice": r"cluster_arrive twice without cluster_wait",
    "fill_the_stack": r"its stack is full",
    "struct_too_large": r"the shared-memory struct has 100000 bytes, the launch asks for 5120",
    "end_before_own_cp_async": r"ends without cp_async_wait for a copy that it started \(\w+\.cu:\d+\)",
    "two_phases_behind": r"waits two phases behind: for the end of phase 1 of the mbarrier at offset 4096",
    "initialise_unseen": r"race: .* (reads|writes) shared memory at offset 4096, which thread \d+ (wrote|read) ",
    "some_forget_the_proxy_fence": r"bulk store reads .* which thread \d+ wrote .* no fence_proxy_async\(\)",
    "copy_over_what_was_read": r"bulk_load writes .* which thread \d+ read .*with no fence_proxy_async\(\)",
    "write_without_barrier": r"race: .* shared memory at offset \d+, which thread \d+ (wrote|read) \(\w+\.cu:\d+\)",
    "write_within_a_warp": r"race: .* shared memory at offset \d+, which thread \d+ (wrote|read) \(\w+\.cu:\d+\)",
    "write_what_others_read": r"race: .* shared memory at offset 0, which thread \d+ (wrote|read) \(\w+\.cu:\d+\)",
    "read_before_the_copy": r"race: .* shared memory at offset \d+, which (a copy that an mbarrier|thread 32 read)",
    "write_before_the_store_is_read": r"race: .*writes .* offset 3, which a copy still under way read \(\w+\.cu:\d+",
    "read_anothers_cp_async": r"race: .*reads .* which (a copy still under way|thread \d+) wrote \(\w+\.cu:\d+\)",
    "atomic_beside_ordinary": r"race: .* shared memory at offset 0, which thread \d+ wrote \(\w+\.cu:\d+\)",
    "wgmma_tile_rewritten": r"race: .* shared memory at offset \d+, which (a wgmma read|thread \d+ wrote) \(matrices",
    "arrive_times_too_often": r"mbarrier at offset 4096: one arrival more than the 3 .* still waits for 16 bytes",
    "expect_too_many_bytes": r"mbarrier at offset 4096: more than 1048575 bytes expected",
    "initialise_for_nobody": r"mbarrier_init: 0 arrivals; must be 1 to 1048575",
    "invalidate_under_a_waiter": r"mbarrier_invalidate: threads wait for the mbarrier at offset 4096",
    "use_after_its_end": r"no mbarrier at offset 4096",
    "cluster_wait_alone": r"cluster_wait without cluster_arrive",
    "cluster_sync_of_one_block": r"cluster_arrive: 128 threads of the cluster have ended",
    "leave_between_arrive_and_wait": r"ends between cluster_arrive \(clusters\.cu:\d+\) and cluster_wait|have ended",
    "touch_a_block_that_left": r"mapa: block 1 of the cluster has ended",
    "leave_while_others_touch": r"not knowing that thread 0 of block 0 of the cluster is|block 1 .* has ended",
    "block_outside_the_cluster": r"mapa: block 2 of a cluster of 2",
    "arrive_at_a_block_that_left": r"mapa: block 1 of the cluster has ended",
    "write_and_arrive_at_another_block": r"race: this thread reads .* thread 0 of block 1 wrote \(clusters\.cu:\d+\)",
    "leave_before_the_copy_to_a_block": r"last of its block, while copies .* \(clusters\.cu:\d+\)",
    "multicast_outside_the_cluster": r"tma_load_multicast: blocks 0x5 of a cluster of 2",
    "multicast_to_a_block_that_left": r"tma_load_multicast: block 1 has ended",
    "misaligned_bulk_load": r"bulk_load: the address in global memory is not a multiple of 16",
    "no_proxy_fence_before_tma_store": r"tma_store reads .* at offset \d+, written by ordinary .* no fence_proxy",
    "misaligned_tma_store": r"tma_store: offset 512 in shared memory is not a multiple of 1024",
    "stored_twice_by_tma": r"race: tma_store writes global .* a copy still under way wrote \(copies",
    "forget_bulk_commit": r"ends without bulk_wait_read for a store that it started \(copies\.cu:\d+\)",
    "read_what_a_bulk_store_writes": r"race: this thread reads global .* a copy still under way wrote \(copies",
    "forget_cp_async_commit": r"race: this thread reads shared .* a copy still under way wrote \(copies",
    "misaligned_stmatrix": r"store_tiles: offset \d+ in shared memory is not a multiple of 16",
    "load_tiles_of_another_warp": r"race: (load|store)_tiles (reads|writes) .* thread \d+ (wrote|read) \(matrices",
    "load_tiles_transposed_too_early": r"race: .* which thread \d+ (wrote|read) \(matrices\.cu:\d+\)",
    "store_tiles_of_two_warps": r"race: store_tiles writes .* which thread \d+ wrote \(matrices\.cu:\d+\)",
    "mma_e4m3_of_some_lanes": rf"{PARTED}(mma_m16n8k32_e4m3|__syncwarp), lanes 0x[0-9a-f]+ {OTHERS}",
    "mma_int8_of_some_lanes": rf"{PARTED}(mma_m16n8k32_int8|__syncwarp), lanes 0x[0-9a-f]+ {OTHERS}",
    "wgmma_e4m3_without_fence": r"wgmma without wgmma_fence\(\)",
    "misaligned_load_once": r"load_once: 0x[0-9a-f]+ is not a multiple of 16",
    "misaligned_store_once": r"store_once: 0x[0-9a-f]+ is not a multiple of 16",
    "copy_over_what_others_copied": r"race: this thread writes global memory at \d+, which thread \d+ wrote \(global",
    "write_the_same_word": r"race: this thread writes global memory at \d+, which thread \d+ wrote \(global_memory",
    "read_what_another_block_writes": rf"race: .* global memory at {OF_ANOTHER_BLOCK}",
    "store_once_over_what_others_read": rf"race: .* global memory at {OF_ANOTHER_BLOCK}",
    "flag_without_release": rf"race: .* global memory at {OF_ANOTHER_BLOCK}",
    "flag_before_the_data": rf"race: .* global memory at {OF_ANOTHER_BLOCK}",
    "last_block_by_a_plain_atomic": rf"race: .* global memory at {OF_ANOTHER_BLOCK}",
    "last_block_without_a_barrier": r"race: .* global memory at .* thread \d+ (of block .*)?(wrote|read) \(global",
    "store_past_the_end": r"touched address 0x[0-9a-f]+, where there is nothing",
    "copy_from_past_the_end": r"a copy, global_memory\.cu:\d+: touched address 0x[0-9a-f]+, where there is nothing",
    "read_before_the_wait": rf"reads {OF_THE_FRONT}, without wait_for_previous_kernel\(\) before",
    "noncoherent_after_the_wait": r"past the coherent caches \(ld\.global\.nc\) what the kernel in front writes \(",
    "copy_before_the_wait": rf"reads {OF_THE_FRONT}, without wait_for_previous_kernel\(\) before",
    "write_before_the_wait": r"writes global memory that the kernel in front reads \(run\.cu:\d+\), without wait_",
    "misaligned_load": r"0x[0-9a-f]+ is not a multiple of 8, as '.*float2' wants",
    "misaligned_store": r"0x[0-9a-f]+ is not a multiple of 16, as '.*uint4' wants",
    "offset_in_32_bits": r"a product overflows its type, 'int'",
    "divide_by_zero": r"a division by zero, or one that overflows",
    "shift_too_far": r"a shift of 'int' by \d+",
    "index_past_an_array": r"index 4103 of an array of type '(uint8_t|unsigned char) \[4096\]'",
    "prefetch_by_too_few_coordinates": r"tma_prefetch_to_l2: 3 coordinates for a tensor map of rank 2",
    "read_two_kernels_back": rf"reads {OF_THE_FRONT}, without wait_for_previous_kernel\(\) before",
}


FAULT_FILES = sorted((SIM / "kernels" / "faults").glob("*.cu"))


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    # -O1, so that the recursion that overflows a stack stays a recursion.
    library = sim_library("faults", FAULT_FILES, ["-O1"])
    library.fault_name.restype = ctypes.c_char_p
    library.run_fault.restype = ctypes.c_char_p
    library.launch_with.restype = ctypes.c_char_p
    library.run_fault_named.restype = ctypes.c_char_p
    library.run_fault_in_a_tensor.restype = ctypes.c_char_p
    library.encode.restype = ctypes.c_char_p
    return library


def test_every_fault_has_a_report(library: ctypes.CDLL) -> None:
    assert {library.fault_name(i).decode() for i in range(library.fault_count())} == set(REPORTS)


def places_of_faults() -> dict[str, set[str]]:
    """The lines of each fault, as "copies.cu:12": of its kernel, and of what that calls in its file."""
    places = {}
    for path in FAULT_FILES:
        text = path.read_text()
        functions, name = dict[str, list[int]](), ""
        for number, line in enumerate(text.splitlines(), 1):
            if begin := re.match(r"void (\w+)\(", line):
                name = begin.group(1)
            if name:
                functions.setdefault(name, []).append(number)
            if line.endswith("}") and (begin or line == "}"):
                name = ""
        lines = text.splitlines()
        for match in re.finditer(r'FAULT\((\w+)\)|\{"(\w+)",\s*(\w+)', text.split("std::vector<Fault>")[-1]):
            fault, kernel = match.group(1) or match.group(2), match.group(1) or match.group(3)
            body = " ".join(lines[number - 1] for number in functions[kernel])
            numbers = [n for other, ns in functions.items() if re.search(rf"\b{other}\(", body) for n in ns]
            places[fault] = {f"{path.name}:{number}" for number in numbers + functions[kernel]}
    return places


PLACES = places_of_faults()


@pytest.mark.parametrize("fault", REPORTS)
def test_fault_is_reported(library: ctypes.CDLL, fault: str) -> None:
    """In any order: the kernel's name, the block, and a line of the fault."""
    number = next(i for i in range(library.fault_count()) if library.fault_name(i).decode() == fault)
    for seed in range(1, 9):
        library.sim_set_seed(ctypes.c_uint64(seed))
        message = library.run_fault(number)
        assert message is not None, f"not reported with seed {seed}"
        text = message.decode()
        assert re.search(REPORTS[fault], text), text
        assert re.match(r"kernel \w+(<\d+>)?, ", text), text
        assert re.search(r"block \([01234], 0, 0\)( thread \d+|:)|a copy, ", text), text
        assert PLACES[fault] & set(re.findall(r"\w+\.cu:\d+", text)), text


def test_a_tensor_ends_where_it_ends(library: ctypes.CDLL) -> None:
    """The front kernel writes the 128 bytes from 4,096 on."""
    library.sim_set_seed(ctypes.c_uint64(1))
    name = b"write_without_barrier"
    inside = library.run_fault_in_a_tensor(name, 8192 - 4224, 0)
    assert re.search(rb"shared_memory\.cu:\d+: race: ", inside), inside
    outside = library.run_fault_in_a_tensor(name, 8192 - 4223, 0).decode()
    assert re.fullmatch(
        r"kernel front_kernel, block \(0, 0, 0\) thread 127, run\.cu:\d+: "
        r"this thread writes 1 bytes at byte 4223 of a tensor's memory of 4223 bytes",
        outside,
    ), outside
    far = library.run_fault_in_a_tensor(name, 8192 - 1024, 0).decode()
    assert re.search(r"this thread writes 1 bytes at 0x[0-9a-f]+, which is in no tensor's memory", far), far
    copied = library.run_fault_in_a_tensor(b"copy_from_past_the_end", 0, 0).decode()
    assert re.search(r"bulk_load reads 32 bytes at byte 8192 of a tensor's memory of 8192 bytes", copied), copied


def test_memory_that_was_freed_is_not_the_kernels_in_front(library: ctypes.CDLL) -> None:
    for fault in (b"read_before_the_wait", b"noncoherent_after_the_wait"):
        library.sim_set_seed(ctypes.c_uint64(1))
        assert b"the kernel in front" in library.run_fault_in_a_tensor(fault, 0, 0)
        assert library.run_fault_in_a_tensor(fault, 0, 1) is None


def line_of(function: str, statement: str) -> str:
    """The line of run.cu, as "run.cu:12", that holds the statement, in the function behind this one's name."""
    text = (SIM / "kernels" / "faults" / "run.cu").read_text()
    return f"run.cu:{text[: text.index(statement, text.index(f'SIM_ENTRY {function}('))].count(chr(10)) + 1}"


# The most shared memory of a block, in KB: CUDA C++ Programming Guide, "Compute Capabilities".
@pytest.mark.parametrize(("capability", "most"), [(80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)])
def test_shared_memory_has_a_limit(library: ctypes.CDLL, capability: int, most: int) -> None:
    place = line_of("launch_with", "return launch(")
    library.sim_set_gpu(capability, 3)
    try:
        assert library.launch_with(most * 1024, 32, 1, None) is None
        refusal = library.launch_with(most * 1024 + 1, 32, 1, None).decode()
        assert re.fullmatch(
            rf"kernel front_kernel, {place}: launch: more shared memory than a block of this GPU may have", refusal
        ), refusal
    finally:
        library.sim_set_gpu(90, 3)


@pytest.mark.parametrize(
    ("threads", "blocks", "stream", "message"),
    [
        (128, 1, None, None),
        (160, 1, None, "more threads than the kernel's launch bounds allow"),
        (32, 65536, None, "a grid has at most 2^31 - 1 blocks along x, 65,535 along y and z"),
        (32, 1, 1, "in another stream than the caller's"),
    ],
)
def test_launches_keep_the_rules(
    library: ctypes.CDLL, threads: int, blocks: int, stream: int | None, message: str | None
) -> None:
    said = library.launch_with(0, threads, blocks, ctypes.c_void_p(stream))
    assert (said.decode().split("launch: ")[-1] if said else None) == message


def test_an_older_gpu_has_no_tma(library: ctypes.CDLL) -> None:
    library.sim_set_gpu(89, 3)
    try:
        assert re.search(
            rb"copies\.cu:\d+: tma_load: needs compute capability 9\.0", library.run_fault_named(b"misaligned_tile")
        )
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
    wanted = message and f"{line_of('encode', 'return encode_tensor_map(')}: tensor map: {message}"
    assert (found.decode() if found else None) == wanted
