"""The public class: a network with the tokenizer and sampler defaults of its checkpoint, and the engine over them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from dgemma_ext import arguments
from dgemma_ext.checkpoint import (
    Adapter,
    GenerationDefaults,
    Merge,
    ModelConfig,
    Tokenizer,
    inspect_checkpoint,
    read_soft_tokens,
    resolve_checkpoint,
    resolve_weights,
)
from dgemma_ext.engine import (
    Chat,
    Choices,
    Commit,
    Draft,
    Generation,
    Prompt,
    PromptOptions,
    Scheduler,
    check_adapter_memory,
    check_memory,
    decide,
    mapped_bytes,
    memory_plan,
)
from dgemma_ext.environment import check_environment
from dgemma_ext.model import (
    BASE,
    DEFAULT,
    ENCODE_CHUNK,
    IMAGE_ATTENTION,
    Cache,
    LoadedAdapter,
    ModelWeights,
    Network,
    load_weights,
    resolve_activations,
    resolve_device,
    resolve_dtype,
    resolve_matmul,
)
from dgemma_ext.model.vision import Vision, load_tower, resolve_images
from dgemma_ext.sampling import Canvas, CompiledGrammar, Grammar, SamplerConfig, compile_grammar
from dgemma_ext.torch_state import in_own_torch_state

# A folder, a hub id, or an adapter that was read or made before.
AdapterSource = str | os.PathLike[str] | Adapter


class DiffusionGemma:
    """A DiffusionGemma; `from_pretrained` makes one.

    Attributes: `network` (weights and passes), `tokenizer` (None where the checkpoint has none), `defaults`
    (generation_config.json), `vision` (the vision tower, None without one), and the network's `config`, `weights`,
    `dtype` and `device`.
    """

    def __init__(
        self,
        network: Network,
        defaults: GenerationDefaults,
        tokenizer: Tokenizer | None,
        vision: Vision | None = None,
    ) -> None:
        self.network = network
        self.defaults = defaults
        self.tokenizer = tokenizer
        self.vision = vision
        # On a GPU `generate` keeps a scheduler (cache, buffers, graphs) from call to call. None gives the memory back.
        self.kept_scheduler: Scheduler | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, by copy.deepcopy or pickle, has weights of its own and keeps no scheduler."""
        return {**vars(self), "kept_scheduler": None}

    @classmethod
    @in_own_torch_state
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        weights: str = "auto",
        batch_invariant: bool = False,
        activations: str | None = None,
        images: str | bool = "auto",
        image_attention: str = "sliding",
        adapter: AdapterSource | None = None,
        adapters: Mapping[str, AdapterSource] | None = None,
        passes: str | None = None,
        merge: bool = False,
    ) -> DiffusionGemma:
        """Loads a checkpoint folder, a GGUF file where gguf is installed, or a hub id where huggingface_hub is.

        `device`: "auto" is the first CUDA GPU where torch sees one, else the CPU.
        `dtype`: "auto" is the checkpoint's; otherwise "bfloat16" or "float32" (or the torch dtype).
        `weights`: "auto" keeps weights as stored. "fp8", "int8", "int4" (groups of 32), "int4-64", "int4-128" and
        "nvfp4" quantize unquantized weights while loading, those that the published checkpoints of the format quantize.
        int8 also rounds what goes into the products.
        "unquantized" converts quantized weights to `dtype`.
        `batch_invariant`: a request's tokens are bit-identical alone and in any batch on a GPU too, because dense
        products run on our own kernels in place of torch's. On the CPU they always are.
        `activations`: "fp8" also rounds the inputs of the experts' products to FP8, with a scale for each token, where
        their weights are fp8; this changes tokens. It needs a GPU of compute capability 8.9, 9.0 or 12.x; the CPU makes
        the same roundings, slowly.
        `images`: whether the vision tower is loaded; "auto" loads it where the checkpoint has one. The published one
        takes 1.1 GB.
        `image_attention`: on which layers the tokens of an image see each other: "sliding", as in Google's own code, or
        "all", as in transformers' DiffusionGemma; see docs/guide.md.
        `adapter`: the folder or hub id of one that PEFT has written, which every request has that names none ("default"
        is its name). `adapters`: further ones by the names that requests give. `passes`: as in `load_adapter`.
        `merge`: adds `adapter` to the weights, before they are quantized, in place of running it beside them. It needs
        weights that are stored unquantized, and changes that are equal in both passes.

        Raises dg.CheckpointError naming the file and the tensor, ValueError for an unknown device, dtype or format, for
        activations that do not go with the weights or the device and for an environment variable of this package with
        a value that it does not know, and dg.NotEnoughMemory, before anything is loaded, with a table of what the model
        would take.
        """
        check_environment()
        path = Path(resolve_checkpoint(path_or_hub_id))
        config = ModelConfig.from_file(path)
        wanted = resolve_weights(weights)
        resolved, place = resolve_dtype(dtype, config), resolve_device(device)
        matmul = resolve_matmul(arguments.flag("batch_invariant", batch_invariant), place, resolved)
        info = inspect_checkpoint(path, config)
        vision_config = resolve_images(images, info, config)
        soft_tokens = 0 if vision_config is None else read_soft_tokens(path)
        read = _adapters_given(adapter, adapters, config, passes)
        merged = _merged(read, adapter) if arguments.flag("merge", merge) else None
        loading = (config, info, wanted, resolved, place)
        beside = list(read.values())
        plan = memory_plan(*loading, activations=activations, vision=vision_config, adapters=beside)
        changed = () if merged is None else merged.attributes
        mapped = mapped_bytes(config, info, wanted, resolved, vision_config, changed) if place.type == "cpu" else 0
        check_memory(plan, mapped, place)
        rounded = resolve_activations(activations, plan.weights["experts"][0], config, place, resolved)
        arguments.choice("image_attention", image_attention, IMAGE_ATTENTION)
        loaded = load_weights(path, config, resolved, place, weights=wanted, info=info, merge=merged)
        network = Network(config, loaded, matmul, rounded, image_attention)
        tokenizer = Tokenizer.from_directory(path) if (path / "tokenizer.json").exists() else None
        defaults = GenerationDefaults.from_file(path, config)
        tower = None if vision_config is None else load_tower(info, config, resolved, place)
        vision = None if tower is None else Vision(tower, soft_tokens)
        for name, one in read.items():
            network.load_adapter(name, one)
        network.adapters.default = DEFAULT if DEFAULT in network.adapters else None
        return cls(network, defaults, tokenizer, vision)

    @in_own_torch_state
    def load_adapter(self, name: str, adapter: AdapterSource, passes: str | None = None) -> LoadedAdapter:
        """Loads an adapter, which requests then name. Its factors stand beside the weights, whatever format those have,
        and requests with different adapters, and with none, run in one batch.

        adapter: a folder that PEFT or NeMo AutoModel has written, a hub id, or a dg.Adapter. passes: "both" where a
        file with the names of one pass alone means both of them, "stored" where it means that one; such a file is
        refused without it.

        Raises ValueError for a name that is taken, dg.CheckpointError naming the file and the tensor or field, and
        dg.NotEnoughMemory.
        """
        self.network.adapters.check_new(name)
        read = _read_adapter(adapter, self.config, passes)
        check_adapter_memory(self.network, read)
        return self.network.load_adapter(name, read)

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter; requests that have it keep it until they end. Raises ValueError for an unknown name."""
        arguments.choice("name", name, self.adapters)
        self.network.adapters.remove(name)

    @property
    def adapters(self) -> Mapping[str, LoadedAdapter]:
        """The loaded adapters by name: rank, scale, modules, passes, nbytes, base and digest of each."""
        return MappingProxyType(self.network.adapters)

    @property
    def config(self) -> ModelConfig:
        return self.network.config

    @property
    def weights(self) -> ModelWeights:
        return self.network.weights

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def device(self) -> torch.device:
        return self.network.device

    def new_cache(self, slots: int, max_length: int) -> Cache:
        """An empty cache for `slots` requests of up to `max_length` positions each (prompt and committed canvases)."""
        return self.network.new_cache(slots, max_length)

    def encode(
        self,
        ids: torch.Tensor,
        cache: Cache,
        slots: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        bidirectional_spans: Sequence[Sequence[tuple[int, int]]] | None = None,
        chunk: int = ENCODE_CHUNK,
        images: Sequence[Sequence[tuple[int, torch.Tensor]]] | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> None:
        """Appends tokens, integer [B, T], to the cache; see Network.encode."""
        self.network.encode(ids, cache, slots, lengths, bidirectional_spans, chunk, images, adapter)

    def denoise(
        self,
        canvas: torch.Tensor,
        cache: Cache,
        slots: Sequence[int] | None = None,
        self_conditioning: torch.Tensor | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> torch.Tensor:
        """Soft-capped logits of one denoising pass, fp32 [B, L, vocabulary]; see Network.denoise."""
        return self.network.denoise(canvas, cache, slots, self_conditioning, adapter)

    def compile(self, grammar: Grammar, enable_thinking: bool = False) -> CompiledGrammar:
        """The automaton of a grammar over this model's tokens: its states, arcs, bytes, and the tokens of its shortest
        text. The last 64 are kept. enable_thinking: whether it is for prompts that let the model think.

        Raises ValueError where the checkpoint has no tokenizer, and dg.GrammarError naming what cannot be followed.
        """
        arguments.instance("grammar", grammar, Grammar, "a dg.Regex, dg.JsonSchema, dg.Choice or dg.ToolCalls")
        if self.tokenizer is None:
            raise ValueError("a grammar needs a checkpoint with tokenizer.json")
        ends, pad, thinks = self.defaults.eos_token_ids, self.defaults.pad_token_id, enable_thinking
        return compile_grammar(grammar, self.tokenizer, self.config.vocab_size, ends, pad, thinks)

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int | None = None,
        sampler: SamplerConfig | None = None,
        seed: int | Sequence[int] = 0,
        canvas: Canvas | Sequence[Canvas | None] | None = None,
        on_draft: Callable[[Draft], None] | None = None,
        tools: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]] | None] | None = None,
        enable_thinking: bool | Sequence[bool | None] | None = None,
        chat_template_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        special_tokens: str | Sequence[str] = "text",
        logprobs: int | Sequence[int | None] | None = None,
        deadline: float | Sequence[float | None] | None = None,
        grammar: Grammar | Sequence[Grammar | None] | None = None,
        images: Sequence[Any] | Sequence[Sequence[Any] | None] | None = None,
        image_tokens: int | Sequence[int | None] | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> Any:
        """Answers a prompt, or each of a list of prompts.

        prompt: a string, a chat (role/content dicts), token ids, or a list of any of these. max_new_tokens: default the
        checkpoint's. seed: one number, or one per prompt; on the CPU the same seed and prompt give the same bits in any
        batch. canvas: what the first canvases begin with, one for all prompts or one per prompt. on_draft: called after
        every denoising step, which makes the host wait for each.

        For the chat template, each one for all prompts or a list of one per prompt: tools: JSON schemas of the
        functions that the model may call. enable_thinking: whether it thinks before it answers, default what the
        template does. chat_template_kwargs: other variables of the template. special_tokens: whether special tokens
        that are spelled in a prompt are "text", the default, or "tokens"; see Tokenizer.encode.

        logprobs: how many alternatives, 0 to 20, Output.logprobs and Commit.logprobs give for each token beside its own
        log-probability; None gives neither. They are those of the model's distribution at temperature 1 in the step
        that gave the token: at its position, given the whole canvas as that step saw it. deadline: seconds; when they
        are over, after one step at least, the draft of the canvas under work is taken as it is and ends the answer,
        with finish_reason "deadline".

        grammar: a dg.Regex, dg.JsonSchema, dg.Choice or dg.ToolCalls that the answer matches, and every draft on the
        way to it; see docs/structured.md.

        adapter: the name of a loaded adapter, one for all prompts or a list of one per prompt. None is the one that
        from_pretrained was given as `adapter`, if any; "base" is the model without one. See docs/adapters.md.

        images: of a prompt that is text: a list of paths, bytes of files, data URLs and Pillow images, which stand
        before the text in this order; in a batch one such list or None per prompt. Chats have them as parts of their
        messages; see docs/guide.md. image_tokens: the most soft tokens that an image becomes, 70, 140, 280, 560 or
        1120, default the checkpoint's; one for all prompts or one per prompt.

        On a GPU the model keeps the cache, buffers and graphs of the call for the next one; `kept_scheduler = None`
        frees their memory.

        Returns an Output, or a list of them for a list of prompts. Raises ValueError naming the argument, and
        dg.NonFiniteError naming the request and the step.
        """
        if on_draft is not None and not callable(on_draft):
            raise arguments.refusal("on_draft", "a function or None", on_draft)
        of_template = (tools, enable_thinking, chat_template_kwargs, special_tokens)
        more = (*of_template, logprobs, deadline, grammar, images, image_tokens, adapter)
        return Generation(self, prompt, max_new_tokens, sampler, seed, canvas, *more).outputs(on_draft)

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int | None = None,
        sampler: SamplerConfig | None = None,
        seed: int | Sequence[int] = 0,
        canvas: Canvas | Sequence[Canvas | None] | None = None,
        tools: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]] | None] | None = None,
        enable_thinking: bool | Sequence[bool | None] | None = None,
        chat_template_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        special_tokens: str | Sequence[str] = "text",
        logprobs: int | Sequence[int | None] | None = None,
        deadline: float | Sequence[float | None] | None = None,
        grammar: Grammar | Sequence[Grammar | None] | None = None,
        images: Sequence[Any] | Sequence[Sequence[Any] | None] | None = None,
        image_tokens: int | Sequence[int | None] | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> Iterator[Draft | Commit]:
        """`generate` as a stream: yields a Draft at every denoising step and a Commit for every finished canvas.

        In a batch `event.request.number` is the index of the prompt.
        """
        of_template = (tools, enable_thinking, chat_template_kwargs, special_tokens)
        more = (*of_template, logprobs, deadline, grammar, images, image_tokens, adapter)
        yield from Generation(self, prompt, max_new_tokens, sampler, seed, canvas, *more).events()

    def decide(
        self,
        prompt: Prompt | Sequence[Prompt],
        choices: Choices | Sequence[Choices],
        template: str = "{}",
        canvas_length: int | None = None,
        seed: int | Sequence[int] = 0,
        tools: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]] | None] | None = None,
        enable_thinking: bool | Sequence[bool | None] | None = None,
        chat_template_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        special_tokens: str | Sequence[str] = "text",
        images: Sequence[Any] | Sequence[Sequence[Any] | None] | None = None,
        image_tokens: int | Sequence[int | None] | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> Any:
        """Which of some choices answers a prompt, or each of a list of prompts, read in one denoising step.

        choices: texts that are one token each, with or without a space before it; or a mapping from choices to such
        labels ({"yes": ["yes", "Yes"], "no": "no"}), whose tokens are added up; one for all prompts or a list of one
        per prompt. template: the text of the answer, with {} where the label stands. It is pinned in the canvas, with
        the end of the turn and padding behind it. canvas_length: default the least of 32, 64, 128, ... that has room.
        seed: of the noise at the label's position. prompt and the rest: as in `generate`.

        A probability is that of the model at temperature 1, given the prompt, the template, and that the answer is one
        of the choices; see docs/structured.md on when it can be trusted. The same seed and prompt give the same bits
        alone and in any batch on the CPU.

        Returns a dg.Decision, or a list of them for a list of prompts. Raises ValueError naming the argument.
        """
        options = {
            "tools": tools,
            "enable_thinking": enable_thinking,
            "chat_template_kwargs": chat_template_kwargs,
            "special_tokens": special_tokens,
            "images": images,
            "image_tokens": image_tokens,
            "adapter": adapter,
        }
        return decide(self, prompt, choices, template, canvas_length, seed, **options)

    def chat(
        self,
        system: str | None = None,
        max_length: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        special_tokens: str = "text",
        image_tokens: int | None = None,
        adapter: str | None = None,
    ) -> Chat:
        """A conversation that keeps its cache from turn to turn; arguments as in `generate`."""
        options = PromptOptions(tools, enable_thinking, chat_template_kwargs, special_tokens, image_tokens)
        return Chat(self, system=system, max_length=max_length, options=options, adapter=adapter)


def _adapters_given(
    adapter: AdapterSource | None, adapters: Any, config: ModelConfig, passes: str | None
) -> dict[str, Adapter]:
    """The adapters of from_pretrained by name, read before anything is loaded."""
    if adapters is not None and not isinstance(adapters, Mapping):
        raise arguments.refusal("adapters", "a mapping of names to adapters", adapters)
    sources = {} if adapter is None else {DEFAULT: adapter}
    for name, source in (adapters or {}).items():
        if name in (DEFAULT, BASE):
            raise ValueError(f"adapters has the name {name!r}, which means something else")
        sources[arguments.text("a name of adapters", name)] = source
    return {name: _read_adapter(source, config, passes) for name, source in sources.items()}


def _merged(read: dict[str, Adapter], adapter: AdapterSource | None) -> Merge:
    """The adapter that is added to the weights; it is taken out of those that stand beside them."""
    if adapter is None or len(read) > 1:
        raise ValueError("merge adds one adapter to the weights; wanted: adapter, and no adapters")
    return Merge(read.pop(DEFAULT))


def _read_adapter(source: AdapterSource, config: ModelConfig, passes: str | None) -> Adapter:
    if isinstance(source, Adapter):
        if passes is not None:
            raise ValueError("passes is given, and a dg.Adapter has them already")
        return source
    return Adapter.from_folder(source, config, passes)
