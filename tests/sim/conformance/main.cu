// Runs the whole table, or serves it case by case to the suite.
#include "conformance.h"

namespace {

const std::vector<conformance::Case>& all_cases() {
  static const std::vector<conformance::Case> cases = [] {
    std::vector<conformance::Case> all;
    for (const auto& part : {conformance::warp_cases(), conformance::copy_cases(),
                             conformance::tensor_copy_cases(), conformance::wgmma_cases()})
      all.insert(all.end(), part.begin(), part.end());
    return all;
  }();
  return cases;
}

std::string last_message;

}  // namespace

#define ENTRY extern "C" __attribute__((visibility("default")))
ENTRY int conformance_count() { return static_cast<int>(all_cases().size()); }
ENTRY const char* conformance_name(int number) {
  return all_cases()[static_cast<size_t>(number)].name;
}
ENTRY const char* conformance_run(int number) {
  last_message = all_cases()[static_cast<size_t>(number)].run();
  return last_message.empty() ? nullptr : last_message.c_str();
}

int main() {
  int architecture = 90;
#ifndef DGEMMA_SIM
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess) {
    std::puts("no GPU");
    return 2;
  }
  architecture = properties.major * 10 + properties.minor;
  std::printf("%s, compute capability %d\n", properties.name, architecture);
#endif
  int failures = 0, skipped = 0;
  for (const conformance::Case& one : all_cases()) {
    // A case that needs 9.0 is Hopper's own (wgmma) or compiled for 90a.
    if (one.architecture > architecture || (one.architecture == 90 && architecture != 90)) {
      ++skipped;
      continue;
    }
    const std::string problem = one.run();
    failures += !problem.empty();
    std::printf("%-32s %s\n", one.name, problem.empty() ? "ok" : problem.c_str());
  }
  std::printf("%zu cases, %d failed, %d skipped\n", all_cases().size(), failures, skipped);
  return failures != 0;
}
