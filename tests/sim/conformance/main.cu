// Runs the table, or one case of it, and serves it case by case to the suite.
//
//   conformance         every case, a line each
//   conformance 12      case 12 alone, because one that hangs or faults ends its process
//   conformance list    numbers and names; needs no GPU
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

namespace {

int print_list() {
  for (size_t number = 0; number < all_cases().size(); ++number)
    std::printf("%zu %s\n", number, all_cases()[number].name);
  return 0;
}

// The GPU's compute capability, 90 for 9.0; 0 without a GPU.
int architecture_of_gpu() {
#ifdef DGEMMA_SIM
  return 90;
#else
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, 0);
  if (error != cudaSuccess) {
    std::printf("no GPU: %s\n", cudaGetErrorString(error));
    return 0;
  }
  std::printf("%s, compute capability %d.%d\n", properties.name, properties.major,
              properties.minor);
  return properties.major * 10 + properties.minor;
#endif
}

// What needs 9.0 here is Hopper's own (wgmma) or compiled for 90a.
bool serves(int architecture, const conformance::Case& one) {
  return one.architecture <= architecture && (one.architecture != 90 || architecture == 90);
}

}  // namespace

int main(int count, char** words) {
  // A line is out before the next case begins, whatever that case does.
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string word = count > 1 ? words[1] : "";
  if (word == "list") return print_list();
  const size_t cases = all_cases().size();
  size_t first = 0, last = cases;
  if (!word.empty()) {
    if (word.size() > 4 || word.find_first_not_of("0123456789") != std::string::npos ||
        (first = std::stoul(word)) >= cases) {
      std::printf("got %s, wants list or a number from 0 to %zu\n", word.c_str(), cases - 1);
      return 2;
    }
    last = first + 1;
  }
  const int architecture = architecture_of_gpu();
  if (architecture == 0) return 2;
  int failures = 0, skipped = 0;
  for (size_t number = first; number < last; ++number) {
    const conformance::Case& one = all_cases()[number];
    if (!serves(architecture, one)) {
      std::printf("%2zu %-32s skipped\n", number, one.name);
      ++skipped;
      continue;
    }
    const std::string problem = one.run();
    failures += !problem.empty();
    std::printf("%2zu %-32s %s\n", number, one.name, problem.empty() ? "ok" : problem.c_str());
  }
  if (last - first > 1)
    std::printf("%zu cases, %d failed, %d skipped\n", last - first, failures, skipped);
  return failures != 0;
}
