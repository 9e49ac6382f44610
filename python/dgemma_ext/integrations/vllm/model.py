"""vLLM's model class with a state and a sampler of ours. Loading, layers and cache are vLLM's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.models import diffusion_gemma as theirs
from vllm.utils.torch_utils import async_tensor_h2d

from dgemma_ext.integrations.vllm.admission import limits_of
from dgemma_ext.integrations.vllm.requests import Requests
from dgemma_ext.integrations.vllm.sampler import Sampler
from dgemma_ext.integrations.vllm.vocabulary import Vocabulary
from dgemma_ext.model.network import SOFT_EMBEDDING_TOLERANCE, largest_row_norm


class DiffusionGemma(theirs.DiffusionGemmaForConditionalGeneration):  # type: ignore[misc]
    """The sampler makes the logits: their statistics are made with them, and they are stored once, in the model's
    dtype. So `compute_logits` gives it the hidden states as they are."""

    @staticmethod
    def get_model_state_cls() -> type:
        return State

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class State(theirs.DiffusionGemmaModelState):  # type: ignore[misc]
    """vLLM's state of its requests, and ours beside it (requests.py)."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.requests = Requests(self.max_num_reqs, limits_of(vllm_config), self.model_config.model, device)
        # In the model's dtype, which is what the self-conditioning reads, in place of fp32.
        states = self.diffusion_states
        states.self_conditioning_embeds = states.self_conditioning_embeds.to(self.model_config.dtype)

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:
        made: Any = super().custom_sampler(sampler)  # refuses another kind of sampler in generation_config.json
        return Sampler(self.requests, made[0], self._vocabulary()), None

    def _vocabulary(self) -> Vocabulary:
        """This rank's part of the embedding, which is the head too."""
        table, softcap = self.model.model.embed_tokens, self.model.final_logit_softcapping
        shard, group = table.shard_indices, get_tp_group()
        embedding = table.weight.detach()[: shard.num_org_elements]
        return Vocabulary(
            size=self.requests.limits.vocabulary,
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
        room = self.max_model_len - len(prompt)
        self.requests.place(
            req_index,
            request_id=new_req_data.req_id,
            prompt=prompt,
            answered=list(new_req_data.prefill_token_ids or [])[len(prompt) :],
            extra_args=None if params is None else params.extra_args,
            max_tokens=room if params is None or params.max_tokens is None else params.max_tokens,
        )

    def remove_request(self, req_id: str) -> None:
        slot = self._req_id_to_index.get(req_id)
        super().remove_request(req_id)
        if slot is not None:
            self.requests.clear(slot)

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
        soft, embeds = sc_embeds.flatten(0, 1).index_select(0, source), inputs_embeds.index_select(0, at)
        is_encoded = self.diffusion_states.is_encoder_phase.index_select(0, source // length)
        conditioned = self.model.self_conditioning(embeds, soft)
        inputs_embeds.index_copy_(0, at, torch.where(is_encoded[:, None], embeds, conditioned))


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
