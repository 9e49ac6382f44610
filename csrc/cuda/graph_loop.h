// The denoising loop of a batch of canvases as one launch: a captured step, repeated on the device
// until a canvas is finished.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace dgemma {

// The flags that decide after a step, in device memory.
struct LoopFlags {
  const uint8_t* active;  // [rows]: cleared by the step that finishes a row's canvas
  const int32_t* slot;    // [rows]: -1 where no request is, which stops nothing
  int32_t rows;
  int32_t* steps_left;  // [1]: set before a launch, at least 1; counted down
};

class GraphLoop {
 public:
  // step: a cudaGraph_t whose nodes are kernels, copies and sets. It is copied into the loop; the
  // memory that it works on must stay. Null, with the error's text in `error`, where this GPU or
  // its driver has no loops in graphs.
  static std::unique_ptr<GraphLoop> make(void* step, const LoopFlags& flags, std::string* error);
  virtual ~GraphLoop() = default;

  // Enqueues steps, at least one, until a row with a request is not active or none are left.
  // Returns null or the error's text.
  virtual const char* launch(void* stream) = 0;
};

}  // namespace dgemma
