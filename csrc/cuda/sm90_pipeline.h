// A pipeline of stages in shared memory on sm_90. Producer warps fill a stage, by TMA or by
// cp.async, and consumer warps multiply it by wgmma; the stages are used in turn, as in CUTLASS's
// warp-specialised pipelines.
//
// Every stage has two mbarriers. `full` completes a phase when all that the producers bring has
// landed, `empty` when all consumers have released the stage. The phases of a barrier have the
// parities 0, 1, 0, ...: a PipelineState is a stage and the parity of its current phase.
#pragma once

#include "cuda/limits.h"
#include "device/mbarrier.h"
#include "device/registers.h"
#include "device/warp.h"

namespace dgemma::sm90 {

// Two warpgroups consume: warps 0 to 7.
constexpr uint32_t kConsumerWarps = 8;
// The registers of a kernel whose other warpgroup does no more than load: a consumer keeps 128
// accumulators of the largest tile.
using Registers = device::RegisterPlan<32 * kConsumerWarps, 232, 128, 40>;

template <uint32_t kStages>
struct PipelineState {
  uint32_t stage = 0, phase = 0;

  DGEMMA_DEVICE void advance() {
    if (++stage < kStages) return;
    stage = 0;
    phase ^= 1;
  }
  // Passes over `stages` at once, at most kStages of them.
  DGEMMA_DEVICE void advance(uint32_t stages) {
    stage += stages;
    if (stage < kStages) return;
    stage -= kStages;
    phase ^= 1;
  }
};

// The barriers of the stages; their memory belongs to the kernel.
template <uint32_t kStages>
struct Pipeline {
  using State = PipelineState<kStages>;

  device::Mbarrier full[kStages];
  device::Mbarrier empty[kStages];

  // One thread calls this; fence_mbarrier_init and a barrier of all threads follow. So many
  // arrivals complete a phase, beside the bytes that TMA brings.
  DGEMMA_DEVICE void initialise(uint32_t full_arrivals, uint32_t empty_arrivals) {
    for (uint32_t i = 0; i < kStages; ++i) {
      device::mbarrier_init(&full[i], full_arrivals);
      device::mbarrier_init(&empty[i], empty_arrivals);
    }
  }

  // Waits until the consumers have released the stage (all stages begin released), and returns the
  // barrier that its copies arrive at.
  DGEMMA_DEVICE device::Mbarrier* producer_acquire(State at) {
    device::mbarrier_wait(&empty[at.stage], at.phase ^ 1);
    return &full[at.stage];
  }

  // Waits until the stage is full.
  DGEMMA_DEVICE void consumer_wait(State at) { device::mbarrier_wait(&full[at.stage], at.phase); }

  // A warp has done with the stage.
  DGEMMA_DEVICE void consumer_release(State at) {
    if (device::lane_index() == 0) device::mbarrier_arrive(&empty[at.stage]);
  }
  // The same where TMA multicast fills the stages of all blocks of a cluster: lane l tells block l.
  template <uint32_t kBlocks>
  DGEMMA_DEVICE void consumer_release_in_cluster(State at) {
    const uint32_t lane = device::lane_index();
    if (lane < kBlocks) device::mbarrier_arrive_at_block(&empty[at.stage], lane);
  }
};

}  // namespace dgemma::sm90
