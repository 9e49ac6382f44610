from typing import Any

VOCABULARY_TILE: int

def version() -> str: ...
def cpu_variant() -> str: ...
def cpu_variants() -> list[str]: ...
def has_cuda() -> bool: ...
def operators() -> list[dict[str, Any]]:
    """The description of every operator; ops/description.py reads it."""

def workspace(name: str, /, *, bfloat16: bool, cuda: bool, **sizes: int) -> int: ...
def moe_ffn_plan(expert_ids: list[list[int]], experts: int) -> str: ...
def byte_automaton(pattern: bytes) -> dict[str, Any]:
    """csrc/automaton/byte_automaton.h; arrays are bytes. Raises RuntimeError naming the limit that is exceeded."""

def token_automaton(
    states: int,
    start: int,
    byte_class: bytes,
    next: bytes,
    accepting: bytes,
    strings: bytes,
    offset: bytes,
    most_states: int,
    most_classes: int,
    most_arcs: int,
) -> dict[str, Any]:
    """csrc/automaton/token_automaton.h; arrays are bytes. Raises RuntimeError naming the limit that is exceeded."""

def philox4x32_10(
    counter0: int, counter1: int, counter2: int, counter3: int, key0: int, key1: int
) -> tuple[int, int, int, int]: ...

class GraphLoop:
    """There in a build with CUDA kernels. Takes addresses; csrc/cuda/graph_loop.h."""
    def __init__(self, step: int, active: int, slot: int, rows: int, steps_left: int) -> None: ...
    def launch(self, stream: int) -> None: ...
