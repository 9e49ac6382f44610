// The C entry points that read logits: checks, and what each task is.
#include <cinttypes>
#include <cmath>

#include "common/ceil_divide.h"
#include "cpu/dispatch.h"
#include "cpu/entry.h"
#include "denoise/cpu/checks.h"
#include "denoise/cpu/kernels.h"

namespace dgemma {
namespace {

// Calls kernel(work, i) for every i in [0, tasks) on the host's threads.
template <typename Work>
void run(dgemma_cpu* cpu, int64_t tasks, void (*kernel)(const Work&, int64_t), const Work& work) {
  run_tasks(cpu, tasks, [&](int64_t i) { kernel(work, i); });
}

// The workspace does not depend on the variant, which may differ between the two calls.
size_t carve(const dgemma_soft_embedding& op, char* base, SoftEmbeddingWork* work) {
  const int64_t rows = op.logits.batch * op.logits.length;
  Carver carver = {base};
  work->op = &op;
  work->padded_hidden = ceil_divide(op.hidden_size, kStripColumns) * kStripColumns;
  work->rows = carver.take<SoftEmbeddingRow>(rows);
  work->dense_rows = carver.take<int64_t>(rows);
  const int64_t block = (rows < kDenseRows ? rows : kDenseRows) * kProbabilityStride;
  work->probabilities = carver.take<float>(block);
  work->next_probabilities = carver.take<float>(block);
  work->sums = carver.take<float>(rows * work->padded_hidden);
  return carver.used;
}

dgemma_status check(const dgemma_soft_embedding& op, dgemma_cpu* cpu) {
  if (const auto status = check_logits(op.logits, cpu)) return status;
  if (op.hidden_size < 1 || op.hidden_size > INT32_MAX)
    return fail(cpu, DGEMMA_INVALID_ARGUMENT, "hidden_size: got %" PRId64 ", wants 1 to %d",
                op.hidden_size, INT32_MAX);
  if (!std::isfinite(op.embedding_scale))
    return fail(cpu, DGEMMA_INVALID_ARGUMENT, "embedding_scale: got %g, wants a finite number",
                op.embedding_scale);
  if (!(op.tolerance >= 0.0f && op.tolerance < 1.0f))
    return fail(cpu, DGEMMA_INVALID_ARGUMENT, "tolerance: got %g, wants 0 (dense) or less than 1",
                op.tolerance);
  if (!(op.max_embedding_norm >= 0.0f))
    return fail(cpu, DGEMMA_INVALID_ARGUMENT, "max_embedding_norm: got %g, wants at least 0",
                op.max_embedding_norm);
  const OperandList operands = operands_of(op);
  if (const auto status = check_operands(operands, cpu)) return status;
  if (const auto status = check_workspace(operands, op.workspace, op.workspace_bytes,
                                          dgemma_cpu_soft_embedding_workspace(&op), cpu))
    return status;
  return check_requests(op.logits, cpu);
}

// Moves on to the next block; its probabilities overwrite those of the block before the current
// one.
SoftEmbeddingWork next_block(const SoftEmbeddingWork& work) {
  SoftEmbeddingWork next = work;
  next.first_token = work.first_token + work.tokens;
  const int64_t left = work.op->logits.vocabulary - next.first_token;
  next.tokens = left < kProbabilityBlock ? left : kProbabilityBlock;
  next.probabilities = work.next_probabilities;
  next.next_probabilities = work.probabilities;
  return next;
}

// The products of the dense rows of this pass. While a block of the vocabulary is multiplied, the
// next one's probabilities are computed: both are tasks of one parallel call, so that threads wait
// for each other once per block.
void multiply_densely(const SoftEmbeddingWork& pass, const DenoiseKernels& kernels,
                      dgemma_cpu* cpu) {
  const dgemma_dtype dtype = pass.op->logits.dtype;
  SoftEmbeddingWork present = pass;
  present.first_token = present.tokens = 0;
  while (present.first_token < pass.op->logits.vocabulary) {
    const SoftEmbeddingWork next = next_block(present);
    const int64_t strips = present.tokens > 0 ? present.padded_hidden / kStripColumns : 0;
    run_tasks(cpu, strips + (next.tokens > 0 ? next.dense_count : 0), [&](int64_t i) {
      if (i < strips)
        kernels.soft_strip[dtype](present, i);
      else
        kernels.soft_probabilities[dtype](next, i - strips);
    });
    present = next;
  }
}

void write_dense_row(const SoftEmbeddingWork& work, const DenoiseKernels& kernels, int64_t index) {
  kernels.soft_write[work.op->logits.dtype](work, work.dense_rows[index]);
}

void soft_embedding(const dgemma_soft_embedding& op, const DenoiseKernels& kernels,
                    dgemma_cpu* cpu) {
  SoftEmbeddingWork work = {};
  carve(op, static_cast<char*>(op.workspace), &work);
  const int64_t rows = op.logits.batch * op.logits.length;
  run(cpu, rows, kernels.soft_sparse[op.logits.dtype], work);
  int64_t dense = 0;
  for (int64_t row = 0; row < rows; ++row)
    if (work.rows[row].needs_dense != 0) work.dense_rows[dense++] = row;
  for (work.first_dense = 0; work.first_dense < dense; work.first_dense += kDenseRows) {
    const int64_t left = dense - work.first_dense;
    work.dense_count = left < kDenseRows ? left : kDenseRows;
    multiply_densely(work, kernels, cpu);
  }
  for (int64_t i = 0; i < dense; ++i) write_dense_row(work, kernels, i);
}

}  // namespace
}  // namespace dgemma

dgemma_status dgemma_cpu_vocabulary_statistics(const dgemma_vocabulary_statistics* op,
                                               dgemma_cpu* cpu) {
  dgemma_status status = dgemma::check_call(op, cpu);
  if (status == DGEMMA_OK) status = dgemma::check_logits(op->logits, cpu);
  if (status == DGEMMA_OK) status = dgemma::check_operands(dgemma::operands_of(*op), cpu);
  if (status == DGEMMA_OK) status = dgemma::check_requests(op->logits, cpu);
  dgemma_cpu_variant variant;
  if (status == DGEMMA_OK) status = dgemma::resolve_cpu_variant(cpu, &variant);
  if (status != DGEMMA_OK) return status;
  dgemma::run(cpu, op->logits.batch * op->logits.length,
              DGEMMA_TABLE_OF(variant, denoise_kernels).statistics[op->logits.dtype], *op);
  return DGEMMA_OK;
}

dgemma_status dgemma_cpu_sample(const dgemma_sample* op, dgemma_cpu* cpu) {
  dgemma_status status = dgemma::check_call(op, cpu);
  if (status != DGEMMA_OK) return status;
  const dgemma_logits& logits = op->logits;
  status = dgemma::check_logits(logits, cpu);
  if (status == DGEMMA_OK) status = dgemma::check_operands(dgemma::operands_of(*op), cpu);
  if (status == DGEMMA_OK) status = dgemma::check_requests(logits, cpu);
  if (status == DGEMMA_OK)
    status = dgemma::check_uniforms(op->uniforms, logits.batch, logits.length, logits.active, cpu);
  dgemma_cpu_variant variant;
  if (status == DGEMMA_OK) status = dgemma::resolve_cpu_variant(cpu, &variant);
  if (status != DGEMMA_OK) return status;
  dgemma::run(cpu, logits.batch * logits.length,
              DGEMMA_TABLE_OF(variant, denoise_kernels).sample[logits.dtype], *op);
  return DGEMMA_OK;
}

size_t dgemma_cpu_soft_embedding_workspace(const dgemma_soft_embedding* op) {
  if (op == nullptr) return 0;  // the call itself reports what is wrong
  dgemma::SoftEmbeddingWork work = {};
  return dgemma::carve(*op, nullptr, &work);
}

dgemma_status dgemma_cpu_soft_embedding(const dgemma_soft_embedding* op, dgemma_cpu* cpu) {
  dgemma_status status = dgemma::check_call(op, cpu);
  if (status == DGEMMA_OK) status = dgemma::check(*op, cpu);
  dgemma_cpu_variant variant;
  if (status == DGEMMA_OK) status = dgemma::resolve_cpu_variant(cpu, &variant);
  if (status != DGEMMA_OK) return status;
  dgemma::soft_embedding(*op, DGEMMA_TABLE_OF(variant, denoise_kernels), cpu);
  return DGEMMA_OK;
}
