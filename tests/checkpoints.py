"""Checkpoints for tests: small random ones in the published layout, and the published one as sparse files.

Tensor names and shapes of the small ones come from transformers' own model class, so that they are a check on this
package's table and not a copy of it; those of the published one are written out below.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SLIDING = "sliding_attention"
FULL = "full_attention"

# The settings of the published generation_config.json.
GENERATION_CONFIG: dict[str, Any] = {
    "max_denoising_steps": 48,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "t_max": 0.8,
    "t_min": 0.4,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "max_new_tokens": 256,
    "eos_token_id": [1, 106, 50],
    "pad_token_id": 0,
    "transformers_version": "5.8.0.dev0",
}

# Tokens with the ids that they have in the published tokenizer.
SPECIAL_TOKENS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<|tool>": 46,
    "<tool|>": 47,
    "<|tool_call>": 48,
    "<tool_call|>": 49,
    "<|tool_response>": 50,
    "<tool_response|>": 51,
    '<|"|>': 52,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
}

# The format of the published template in short: turns, thoughts since the last question, tools, calls and results.
CHAT_TEMPLATE = """\
{%- macro value_of(value) -%}
    {%- if value is none -%}
        null
    {%- elif value is string -%}
        {{ '<|"|>' + value + '<|"|>' }}
    {%- elif value is boolean -%}
        {{ 'true' if value else 'false' }}
    {%- elif value is mapping -%}
        {{ '{' }}{{ members_of(value) }}{{ '}' }}
    {%- elif value is sequence -%}
        [{% for item in value %}{{ value_of(item) }}{{ ',' if not loop.last }}{% endfor %}]
    {%- else -%}
        {{ value }}
    {%- endif -%}
{%- endmacro -%}
{%- macro members_of(value) -%}
    {%- for key, item in value | dictsort %}{{ key }}:{{ value_of(item) }}{{ ',' if not loop.last }}{% endfor -%}
{%- endmacro -%}
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{ content | trim }}
    {%- else -%}
        {%- for part in content %}{{ part['text'] | trim }}{% endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- set first_is_system = messages and messages[0]['role'] == 'system' -%}
{%- if enable_thinking or tools or first_is_system -%}
    {{ '<|turn>system\\n' }}
    {%- if enable_thinking %}{{ '<|think|>\\n' }}{% endif -%}
    {%- if first_is_system %}{{ text_of(messages[0]['content']) }}{% endif -%}
    {%- for tool in tools or [] -%}
        {{ '<|tool>declaration:' + tool['function']['name'] + '{' + members_of(tool['function']) + '}<tool|>' }}
    {%- endfor -%}
    {{ '<turn|>\\n' }}
{%- endif -%}
{%- set last = namespace(user=-1, role='') -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' %}{% set last.user = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- if not loop.first %}{{ raise_exception('the system message must be the first') }}{% endif -%}
        {%- continue -%}
    {%- elif message['role'] == 'tool' -%}
        {{ '<|tool_response>response:' + message['name'] + '{value:' }}
        {{- value_of(message['content']) + '}<tool_response|>' }}
    {%- else -%}
        {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
        {%- if last.role != 'tool' %}{{ '<|turn>' + role + '\\n' }}{% endif -%}
        {%- if message['reasoning_content'] and loop.index0 > last.user -%}
            {{ '<|channel>thought\\n' + message['reasoning_content'] + '\\n<channel|>' }}
        {%- endif -%}
        {%- for call in message['tool_calls'] or [] -%}
            {{ '<|tool_call>call:' + call['function']['name'] + '{' }}
            {{- members_of(call['function']['arguments']) + '}<tool_call|>' }}
        {%- endfor -%}
        {{ text_of(message['content']) }}
        {%- if not message['tool_calls'] %}{{ '<turn|>\\n' }}{% endif -%}
    {%- endif -%}
    {%- set last.role = message['role'] -%}
{%- endfor -%}
{%- if add_generation_prompt and last.role != 'tool' -%}
    {{ '<|turn>model\\n' }}
{%- elif add_generation_prompt and enable_thinking -%}
    {{ '<|channel>thought\\n' }}
{%- endif -%}
"""


def config_for(
    *,
    layers: int | Sequence[str] = (SLIDING, SLIDING, FULL),
    hidden: int = 64,
    intermediate: int = 96,
    moe_intermediate: int = 32,
    experts: int = 8,
    top_k: int = 2,
    vocabulary: int = 512,
    heads: int = 4,
    kv_heads: int = 2,
    global_kv_heads: int = 1,
    head_dim: int = 16,
    global_head_dim: int = 32,
    window: int = 16,
    canvas: int = 8,
    max_positions: int = 4096,
    softcap: float = 30.0,
    sliding_theta: float = 10_000.0,
    full_theta: float = 1_000_000.0,
    partial_rotary_factor: float = 0.25,
    dialect: str = "flat",
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """A config.json. `layers` is a count (every sixth layer and the last are full) or the list of layer types.

    `dialect` "flat" spells the full layers' heads as the published file does, "per_layer" as transformers writes them.
    """
    if isinstance(layers, int):
        layers = [FULL if (i + 1) % 6 == 0 or i + 1 == layers else SLIDING for i in range(layers)]
    text: dict[str, Any] = {
        "model_type": "diffusion_gemma_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": 1,
        "final_logit_softcapping": softcap,
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "layer_types": list(layers),
        "max_position_embeddings": max_positions,
        "moe_intermediate_size": moe_intermediate,
        "num_attention_heads": heads,
        "num_experts": experts,
        "num_hidden_layers": len(layers),
        "num_key_value_heads": kv_heads,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": sliding_theta},
            FULL: {
                "rope_type": "proportional",
                "rope_theta": full_theta,
                "partial_rotary_factor": partial_rotary_factor,
            },
        },
        "sliding_window": window,
        "tie_word_embeddings": True,
        "top_k_experts": top_k,
        "use_bidirectional_attention": "vision",
        "vocab_size": vocabulary,
    }
    if dialect == "flat":
        text |= {"global_head_dim": global_head_dim, "num_global_key_value_heads": global_kv_heads}
    elif dialect == "per_layer":
        full = {"head_dim": global_head_dim, "num_key_value_heads": global_kv_heads}
        text["per_layer_config"] = {str(i): full for i, layer_type in enumerate(layers) if layer_type == FULL}
    else:
        raise ValueError(f"dialect is {dialect!r}; wanted: flat or per_layer")
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "canvas_length": canvas,
        "dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": [1, 106],
        "boi_token_id": 255_999,
        "eoi_token_id": 258_882,
        "image_token_id": 258_880,
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "position_embedding_size": 64,
            "standardize": True,
        },
        "vision_soft_tokens_per_image": 280,
    }


def make_checkpoint(
    directory: str | Path,
    *,
    shards: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    with_tokenizer: bool = True,
    final_norm_scale: float = 3.0,
    **sizes: Any,
) -> Path:
    """Writes a random checkpoint in the published layout and returns its folder; `sizes` go to `config_for`.

    Every tensor's values depend on `seed` and its name alone. Matrices keep the variance of what they multiply; norms,
    scales and layer scalars spread around 1 (the encoder's scalars differ from the decoder's); `final_norm_scale`
    widens the logits. Drawn in `dtype`, one shard in memory at a time.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = config_for(dtype=dtype, **sizes)
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", GENERATION_CONFIG)
    if with_tokenizer:
        write_tokenizer(directory, config["text_config"]["vocab_size"])

    shapes = published_names(config)
    names = list(shapes)
    files: dict[str, str] = {}
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        tensors = {name: _random_tensor(name, shapes[name], dtype, seed, final_norm_scale) for name in mine}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        files |= dict.fromkeys(mine, file)
    if shards > 1:
        total = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
        _write_json(
            directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files}
        )
    return directory


def published_names(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every stored tensor: transformers' state without what it ties to the decoder."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    with torch.device("meta"):
        model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_dict(config))
    encoder_text = "model.encoder.language_model."
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" and (not name.startswith(encoder_text) or name.endswith("layer_scalar"))
    }


def _random_tensor(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, final_norm_scale: float
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    tensor = torch.empty(shape, dtype=dtype)
    if name.endswith("layer_scalar"):
        return tensor.uniform_(0.5, 1.25, generator=generator)
    if name.endswith("router.proj.weight"):
        # The router's input has length one per token after its 1/sqrt(hidden), so scores spread by two.
        return tensor.normal_(0.0, 2.0, generator=generator)
    if len(shape) == 1 and name.endswith(("q_norm.weight", "k_norm.weight")):
        # Attention has no 1/sqrt(head_dim): the norms' weights set how peaked it is.
        return tensor.normal_(0.6, 0.1, generator=generator)
    if name == "model.decoder.norm.weight":
        return tensor.normal_(final_norm_scale, 0.2 * final_norm_scale, generator=generator)
    if len(shape) == 1:
        return tensor.normal_(1.0, 0.2, generator=generator)
    return tensor.normal_(0.0, shape[-1] ** -0.5, generator=generator)


def load_transformers(
    directory: str | Path,
    dtype: torch.dtype,
    attn_implementation: str = "eager",
    experts_implementation: str = "eager",
    text_only: bool = False,
) -> Any:
    """The checkpoint as transformers' DiffusionGemmaForBlockDiffusion, in evaluation mode, every stored tensor used.

    text_only: the file holds no vision tower, which transformers then makes up.
    """
    from transformers import DiffusionGemmaForBlockDiffusion

    loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(
        directory,
        dtype=dtype,
        attn_implementation=attn_implementation,
        experts_implementation=experts_implementation,
        output_loading_info=True,
    )
    model, loading = loaded
    faults = {kind: set(loading[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if text_only:
        faults["missing_keys"] = {name for name in faults["missing_keys"] if "vision" not in name}
    faults = {kind: names for kind, names in faults.items() if names}
    assert not faults, faults
    return model.eval()


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    """Writes a small tokenizer.json of the published kind (BPE with byte fallback, spaces as ▁) and a chat template.

    Ids: the special tokens where the published tokenizer has them, a newline at 107, 256 bytes, printable ASCII, a few
    words, then unused entries up to `vocabulary`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    ids = dict(SPECIAL_TOKENS)
    ids["\n"] = 107
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁"] + [chr(code) for code in range(33, 127)]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("u", "s"), ("us", "e"), ("use", "r"), ("s", "k"), ("sk", "y")]
    pieces += ["".join(pair) for pair in merges]
    if vocabulary < 108 + len(pieces):
        raise ValueError(f"a tokenizer takes a vocabulary of at least {108 + len(pieces)}, got {vocabulary}")
    ids |= {piece: 108 + i for i, piece in enumerate(pieces)}
    taken = set(ids.values())
    ids |= {f"<unused{i}>": i for i in range(vocabulary) if i not in taken}

    tokenizer = Tokenizer(BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    )


PUBLISHED_PAYLOAD_BYTES = 51_647_562_456
PUBLISHED_CONFIG = config_for(
    layers=30,
    hidden=2816,
    intermediate=2112,
    moe_intermediate=704,
    experts=128,
    top_k=8,
    vocabulary=262_144,
    heads=16,
    kv_heads=8,
    global_kv_heads=2,
    head_dim=256,
    global_head_dim=512,
    window=1024,
    canvas=256,
    max_positions=262_144,
) | {
    "vision_config": {
        "model_type": "gemma4_vision",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 72,
        "standardize": True,
    }
}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """The 1,047 tensors of google/diffusiongemma-26B-A4B-it, as its headers list them."""
    shapes: dict[str, tuple[int, ...]] = {}
    decoder, vision = "model.decoder.", "model.encoder.vision_tower."
    mlp = {"gate_proj": (2112, 2816), "up_proj": (2112, 2816), "down_proj": (2816, 2112)}
    shapes[f"{decoder}embed_tokens.weight"] = (262_144, 2816)
    shapes[f"{decoder}norm.weight"] = shapes[f"{decoder}self_conditioning.pre_norm.weight"] = (2816,)
    shapes |= {f"{decoder}self_conditioning.{name}.weight": shape for name, shape in mlp.items()}
    norms = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
    more_norms = ["post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"]
    for index in range(30):
        full = index % 6 == 5
        layer = f"{decoder}layers.{index}."
        shapes |= {f"{layer}{norm}.weight": (2816,) for norm in norms + more_norms}
        shapes |= {f"{layer}mlp.{name}.weight": shape for name, shape in mlp.items()}
        queries, keys, head_dim = (8192, 1024, 512) if full else (4096, 2048, 256)
        shapes[f"{layer}self_attn.q_proj.weight"] = (queries, 2816)
        shapes[f"{layer}self_attn.k_proj.weight"] = (keys, 2816)
        if not full:
            shapes[f"{layer}self_attn.v_proj.weight"] = (keys, 2816)
        shapes[f"{layer}self_attn.o_proj.weight"] = (2816, queries)
        shapes[f"{layer}self_attn.q_norm.weight"] = shapes[f"{layer}self_attn.k_norm.weight"] = (head_dim,)
        shapes[f"{layer}router.proj.weight"] = (128, 2816)
        shapes[f"{layer}router.scale"] = (2816,)
        shapes[f"{layer}router.per_expert_scale"] = (128,)
        shapes[f"{layer}experts.gate_up_proj"] = (128, 1408, 2816)
        shapes[f"{layer}experts.down_proj"] = (128, 2816, 704)
        shapes[f"{layer}layer_scalar"] = (1,)
        shapes[f"model.encoder.language_model.layers.{index}.layer_scalar"] = (1,)
    shapes["model.encoder.embed_vision.embedding_projection.weight"] = (2816, 1152)
    shapes[f"{vision}patch_embedder.input_proj.weight"] = (1152, 768)
    shapes[f"{vision}patch_embedder.position_embedding_table"] = (2, 10_240, 1152)
    shapes[f"{vision}std_bias"] = shapes[f"{vision}std_scale"] = (1152,)
    for index in range(27):
        layer = f"{vision}encoder.layers.{index}."
        shapes |= {f"{layer}{norm}.weight": (1152,) for norm in norms}
        shapes |= {f"{layer}self_attn.{name}_proj.linear.weight": (1152, 1152) for name in "qkvo"}
        shapes |= {f"{layer}self_attn.{name}_norm.weight": (72,) for name in "qk"}
        shapes |= {f"{layer}mlp.{name}_proj.linear.weight": (4304, 1152) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.linear.weight"] = (1152, 4304)
    return shapes


def write_published_layout(directory: str | Path, shards: int = 11) -> Path:
    """Writes the published checkpoint's configuration, index and shards: true headers over holes, no disk space."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", PUBLISHED_CONFIG)
    _write_json(directory / "generation_config.json", GENERATION_CONFIG)
    shapes = published_shapes()
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}  # two bytes: bfloat16
    total = sum(sizes.values())
    assert (len(shapes), total) == (1047, PUBLISHED_PAYLOAD_BYTES)

    groups: list[list[str]] = [[] for _ in range(shards)]
    placed = 0
    for name, size in sizes.items():
        groups[placed * shards // total].append(name)
        placed += size
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        write_sparse_shard(directory / file, {name: ("BF16", shapes[name], sizes[name]) for name in group})
        weight_map |= dict.fromkeys(group, file)
    _write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )
    return directory


def write_sparse_shard(file: Path, tensors: dict[str, tuple[str, tuple[int, ...], int]]) -> None:
    """A safetensors file of the given dtypes, shapes and byte counts whose payload is a hole (reads as zero)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # the format's own writer pads to eight bytes
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + end)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
