"""This package's kernels inside vLLM, as a plugin that vLLM finds by its entry point (the extra `vllm`).

    DGEMMA_VLLM=1 vllm serve google/diffusiongemma-26B-A4B-it

vLLM loads the entry point (dgemma_vllm) in each of its processes, and that calls `register` here where DGEMMA_VLLM is 1
or VLLM_PLUGINS names `dgemma`. It does nothing beside a release of vLLM that it does not know (versions.py). Otherwise
it hands vLLM the parts that are on (settings.py), each by the extension points of vLLM's own, without changing a
function of it:

- sampler: the model's class with a state and a sampler of ours: vocabulary head with statistics, sampling, update and
  soft embedding for all canvases of a step together (model.py, sampler.py), and a check of a request's settings before
  it is admitted (admission.py, request_options.py);
- experts: grouped GEMM as vLLM's modular kernel of experts (experts.py), over quantized checkpoints by configurations
  and a method of our own (quantization.py, quantized_experts.py);
- attention: a backend over vLLM's paged cache (attention.py);
- rows: the norms on a CPU, as an implementation of vLLM's operator (rows.py).

The router, rotations and dense products are inside vLLM's layers, which have no place for others, but for quantized
dense products (quantized_linear.py).

Nothing of vLLM is imported before a part is on. docs/vllm.md has how to install, serve and ask.
"""

from __future__ import annotations

from dgemma_ext.integrations.vllm.register import register

__all__ = ["register"]
