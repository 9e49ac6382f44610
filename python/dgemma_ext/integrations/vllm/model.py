"""vLLM's model class with a state and a sampler of ours. Loading, layers and cache are vLLM's."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.models import diffusion_gemma as theirs
from vllm.utils.torch_utils import async_tensor_h2d

from dgemma_ext.engine.matching import Matching, matching_of
from dgemma_ext.integrations.vllm.admission import limits_of, tokenizer_of
from dgemma_ext.integrations.vllm.contents import Contents
from dgemma_ext.integrations.vllm.request_options import check, options_of
from dgemma_ext.integrations.vllm.sampler import Sampler
from dgemma_ext.integrations.vllm.slots import Slots
from dgemma_ext.integrations.vllm.vocabulary import Vocabulary
from dgemma_ext.model.network import SOFT_EMBEDDING_TOLERANCE, largest_row_norm
from dgemma_ext.sampling import Canvas


class DiffusionGemma(theirs.DiffusionGemmaForConditionalGeneration):  # type: ignore[misc]
    """The sampler makes the logits: their statistics are made with them, and they are stored once, in the model's
    dtype. So `compute_logits` gives it the hidden states as they are."""

    @staticmethod
    def get_model_state_cls() -> type:
        return State

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class State(theirs.DiffusionGemmaModelState):  # type: ignore[misc]
    """vLLM's state of its requests, and ours beside it (slots.py, contents.py)."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.limits = limits_of(vllm_config)
        count, length, size = self.max_num_reqs, self.limits.canvas_length, self.limits.vocabulary
        self.slots = Slots(count, length, size, device)
        self.contents = Contents(count, length, size, device)
        self.matchings: dict[int, Matching] = {}  # by slot
        # In the model's dtype, which is what the self-conditioning reads, in place of fp32.
        states = self.diffusion_states
        states.self_conditioning_embeds = states.self_conditioning_embeds.to(self.model_config.dtype)

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:
        made: Any = super().custom_sampler(sampler)  # refuses another kind of sampler in generation_config.json
        return Sampler(self, made[0], self._vocabulary()), None

    def _vocabulary(self) -> Vocabulary:
        """This rank's part of the embedding, which is the head too."""
        table, softcap = self.model.model.embed_tokens, self.model.final_logit_softcapping
        shard, group = table.shard_indices, get_tp_group()
        embedding = table.weight.detach()[: shard.num_org_elements]
        return Vocabulary(
            size=self.limits.vocabulary,
            begin=shard.org_vocab_start_index,
            embedding=embedding,
            softcap=float(softcap or 0.0),
            embedding_scale=float(self.model.model.normalizer.to(embedding.dtype)),
            tolerance=SOFT_EMBEDDING_TOLERANCE[embedding.dtype],
            max_norm=largest_row_norm(embedding),
            ranks=TensorParallelRanks(group) if group.world_size > 1 else None,
        )

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        params, prompt = new_req_data.sampling_params, list(new_req_data.prompt_token_ids or [])
        options = options_of(None if params is None else params.extra_args)
        longest = None if params is None else params.max_tokens
        resolved = check(options, self.limits, longest)
        # After a preemption the prompt comes with the canvases that are finished.
        answered = list(new_req_data.prefill_token_ids or [])[len(prompt) :]
        canvas_index = len(answered) // resolved.canvas_length
        seed = seed_of(new_req_data.req_id) if options.seed is None else options.seed
        content = options.canvas or Canvas()
        self.matchings.pop(req_index, None)
        if options.grammar is not None:
            matching = matching_of(
                options.grammar,
                tokenizer_of(self.model_config.model),
                self.limits.vocabulary,
                self.limits.defaults.pad_token_id,
                prompt,
                resolved,
                longest or self.max_model_len - len(prompt),
                options.canvas,
            )
            matching.follow(answered)
            self.matchings[req_index], content = matching, matching.content
        self.slots.place(req_index, resolved, seed, canvas_index, content)
        self.contents.place(req_index, content)

    def remove_request(self, req_id: str) -> None:
        slot = self._req_id_to_index.get(req_id)
        super().remove_request(req_id)
        if slot is not None:
            self.slots.clear(slot)
            self.contents.clear(slot)
            self.matchings.pop(slot, None)

    def _apply_self_conditioning(
        self,
        decode_slots_np: np.ndarray[Any, Any],
        decode_idx_np: np.ndarray[Any, Any],
        query_start_loc_np: np.ndarray[Any, Any],
        inputs_embeds: Tensor,
        sc_embeds: Tensor,
    ) -> None:
        """The self-conditioning of all canvases in one product, where vLLM's own goes from request to request."""
        length = sc_embeds.shape[1]
        rows, sources = [], []
        for slot, index in zip(decode_slots_np.tolist(), decode_idx_np.tolist(), strict=True):
            begin, end = int(query_start_loc_np[index]), int(query_start_loc_np[index + 1])
            rows.append(np.arange(begin, end))
            sources.append(slot * length + np.arange(end - begin))
        if not rows:
            return
        at = async_tensor_h2d(np.concatenate(rows), device=inputs_embeds.device)
        source = async_tensor_h2d(np.concatenate(sources), device=inputs_embeds.device)
        soft = sc_embeds.flatten(0, 1).index_select(0, source)
        inputs_embeds.index_copy_(0, at, self.model.self_conditioning(inputs_embeds.index_select(0, at), soft))


class TensorParallelRanks:
    """The ranks of vLLM's tensor parallel group (vocabulary.Ranks)."""

    def __init__(self, group: Any) -> None:
        self._group, self.rank, self.count = group, group.rank_in_group, group.world_size

    def gather(self, tensor: Tensor) -> Tensor:
        gathered: Tensor = self._group.all_gather(tensor.contiguous(), dim=0)
        return gathered.view(self.count, *tensor.shape)

    def sum(self, tensor: Tensor) -> Tensor:
        summed: Tensor = self._group.all_reduce(tensor)
        return summed


def seed_of(request_id: str) -> int:
    """A seed for a request that names none: all ranks come to the same one by themselves."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "big") >> 1
