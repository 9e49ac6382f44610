// An operator, described once: its arguments in the schema's order, and which field of the C
// interface's struct each one fills. The schema (schema.cpp), the checks and the words of a refusal
// (operands.cpp), the call (registration.h), the size of its workspace (workspace.cpp) and the form
// without data (description.cpp, ops/description.py) are all read from here.
//
// The struct is the description's other half: what a tensor holds, whether it is written, and what
// type an extent or a number has follow from the field's type, so none of them stands here again.
// That is why a description is a table of constants in C++ and not the input of a generator: the
// compiler knows the struct, refuses a field that is not there or a function that takes another
// struct, and one loop reads all tables at run time.
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>

#include "dgemma/grouped_gemm.h"

namespace dgemma {

// What a field of the struct holds, or points to.
enum class Content : uint8_t {
  kNone,
  kNumbers,  // float32 or bfloat16: the dtype of the call, for all such tensors
  kFloat32,
  kFloat64,
  kInt32,
  kInt64,
  kBool,     // one byte, 0 or 1
  kBytes,    // torch.uint8: codes of quantized weights, or a workspace
  kScales,   // of groups of columns: what the weights' format stores (quantized.h)
  kInteger,  // not a tensor: int64_t
  kChoice,   // not a tensor: an enumerator or int32_t
  kReal,     // not a tensor: float
  kStruct,
};

template <typename T>
consteval Content content_of() {
  using Value = std::remove_cv_t<std::remove_pointer_t<T>>;
  if constexpr (std::is_pointer_v<T>) {
    if constexpr (std::is_void_v<Value>) return Content::kNumbers;
    if constexpr (std::same_as<Value, float>) return Content::kFloat32;
    if constexpr (std::same_as<Value, double>) return Content::kFloat64;
    if constexpr (std::same_as<Value, int32_t>) return Content::kInt32;
    if constexpr (std::same_as<Value, int64_t>) return Content::kInt64;
    if constexpr (std::same_as<Value, uint8_t>) return Content::kBool;
  } else {
    if constexpr (std::is_class_v<T>) return Content::kStruct;
    if constexpr (std::is_enum_v<T> || std::same_as<T, int32_t>) return Content::kChoice;
    if constexpr (std::same_as<T, float>) return Content::kReal;
    if constexpr (std::same_as<T, int64_t> || std::same_as<T, size_t>) return Content::kInteger;
  }
}

struct Field {
  const char* name = "";  // of the innermost member
  uint16_t offset = 0;
  Content content = Content::kNone;
  bool written = false;  // it points to what is not const

  constexpr bool exists() const { return content != Content::kNone; }
};

template <typename T>
consteval Field make_field(const char* path, size_t offset) {
  const char* name = path;
  for (const char* at = path; *at != '\0'; ++at)
    if (*at == '.') name = at + 1;
  const bool written = std::is_pointer_v<T> && !std::is_const_v<std::remove_pointer_t<T>>;
  return {name, static_cast<uint16_t>(offset), content_of<T>(), written};
}

// A field of the struct that is called `Struct` where this stands: AT(query), AT(logits.batch).
#define AT(path) \
  ::dgemma::make_field<decltype(std::declval<Struct&>().path)>(#path, offsetof(Struct, path))

// An extent of a tensor: a field, a number, or what follows from a field.
struct Extent {
  Field field = {};   // without one: `times` itself
  int64_t times = 1;  // kAnyExtent: whatever the tensor has
  int64_t per = 1;    // times * field / per, rounded up
  int64_t more = 0;   // and then this much more
  int64_t least = 0;
  Field multiple_of = {};  // another extent

  constexpr Extent() = default;
  constexpr Extent(Field at) : field(at) {}            // NOLINT: an extent is a field
  constexpr Extent(int64_t number) : times(number) {}  // NOLINT: or a number

  // Whether a tensor of this extent tells the field's value.
  constexpr bool tells() const { return field.exists() && per == 1 && more == 0; }
};

constexpr int64_t kAnyExtent = -1;

constexpr Extent positive(Extent extent) {
  extent.least = 1;
  return extent;
}
constexpr Extent multiple(Extent extent, Field of) {
  extent.least = 1;
  extent.multiple_of = of;
  return extent;
}
constexpr Extent twice(Extent extent) {
  extent.times = 2;
  return extent;
}
constexpr Extent one_more(Extent extent) {
  extent.more = 1;
  return extent;
}
constexpr Extent ceil_divide(Extent extent, int64_t per) {
  extent.per = per;
  return extent;
}

// What an integer or a number may be.
struct Range {
  int64_t least = std::numeric_limits<int64_t>::min();
  int64_t most = std::numeric_limits<int64_t>::max();
  Field most_of = {};   // at most this extent
  bool finite = false;  // of a float
};

enum class Kind : uint8_t {
  kTensor,
  kNumber,
  // One quantized matrix of the struct takes four arguments: its format, codes, scales of groups of
  // columns and scales of rows; `field` is the dgemma_quantized, `extents` are the matrix's.
  kFormat,
  kCodes,
  kGroupScales,
  kRowScales,
};

struct Argument {
  const char* name = "";
  Kind kind = Kind::kTensor;
  Content content = Content::kNone;
  Field field = {};
  std::array<Extent, 4> extents = {};
  uint8_t dimensions = 0;
  bool optional = false;
  bool with_previous = false;  // given where the argument before is, and only there
  // Fields that take the strides of all dimensions but the last, whose elements are contiguous.
  std::array<Field, 3> strides = {};
  bool any_shape = false;  // one shape for all such tensors; extents[0] is its number of elements
  dgemma_weight_format format = {};  // of codes that are always in this one
  // How a refusal names a part of a quantized matrix, which is one argument in Python: as its
  // codes.
  const char* matrix = "";
  Range range = {};

  constexpr bool is_tensor() const { return kind != Kind::kNumber && kind != Kind::kFormat; }
  constexpr bool is_written() const { return kind == Kind::kTensor && field.written; }
  constexpr bool is_strided() const { return strides[0].exists(); }
  constexpr std::span<const Extent> shape() const { return {extents.data(), dimensions}; }
};

constexpr Argument tensor(const char* name, Field field, std::initializer_list<Extent> shape) {
  Argument argument = {.name = name, .content = field.content, .field = field};
  for (const Extent& extent : shape) argument.extents[argument.dimensions++] = extent;
  return argument;
}
constexpr Argument optional(const char* name, Field field, std::initializer_list<Extent> shape) {
  Argument argument = tensor(name, field, shape);
  argument.optional = true;
  return argument;
}
// Both this one and the one before it, or neither.
constexpr Argument with_previous(const char* name, Field field,
                                 std::initializer_list<Extent> shape) {
  Argument argument = optional(name, field, shape);
  argument.with_previous = true;
  return argument;
}
// Of four dimensions, with any strides but of the last.
constexpr Argument strided(const char* name, Field field, std::initializer_list<Extent> shape,
                           std::array<Field, 3> strides) {
  Argument argument = tensor(name, field, shape);
  argument.strides = strides;
  return argument;
}
// Numbers of one byte, where the type of the field would say flags.
constexpr Argument bytes(const char* name, Field field, std::initializer_list<Extent> shape) {
  Argument argument = tensor(name, field, shape);
  argument.content = Content::kBytes;
  return argument;
}
// Of any shape, which all such tensors of an operator share; `elements` is the field for how many.
constexpr Argument of_any_shape(const char* name, Field field, Field elements) {
  Argument argument = tensor(name, field, {elements});
  argument.any_shape = true;
  return argument;
}
constexpr Argument number(const char* name, Field field, Range range = {}) {
  return {.name = name,
          .kind = Kind::kNumber,
          .content = field.content,
          .field = field,
          .range = range};
}
// The four arguments of a matrix in `names`: format, codes, scales of groups, scales of rows.
constexpr std::array<Argument, 4> matrix(std::array<const char*, 4> names, Field field,
                                         std::initializer_list<Extent> shape) {
  Argument codes = tensor(names[1], field, shape);
  codes.kind = Kind::kCodes;
  codes.content = Content::kBytes;
  codes.matrix = names[1];
  Argument format = {
      .name = names[0], .kind = Kind::kFormat, .content = Content::kChoice, .field = field};
  Argument groups = codes, rows = codes;
  groups.name = names[2];
  groups.kind = Kind::kGroupScales;
  groups.content = Content::kScales;
  rows.name = names[3];
  rows.kind = Kind::kRowScales;
  rows.content = Content::kFloat32;
  groups.optional = rows.optional = true;
  return {format, codes, groups, rows};
}
// The two arguments of a matrix of FP8: codes and scales of rows.
constexpr std::array<Argument, 2> fp8_matrix(std::array<const char*, 2> names, Field field,
                                             std::initializer_list<Extent> shape) {
  auto [format, codes, groups, rows] = matrix({"", names[0], "", names[1]}, field, shape);
  codes.format = DGEMMA_WEIGHTS_FP8;
  return {codes, rows};
}

// Arguments that were described for a struct which is a member of another.
template <size_t count>
constexpr std::array<Argument, count> within(Field outer, std::array<Argument, count> arguments) {
  const auto move = [&](Field& field) {
    if (field.exists()) field.offset = static_cast<uint16_t>(field.offset + outer.offset);
  };
  for (Argument& argument : arguments) {
    move(argument.field);
    move(argument.range.most_of);
    for (Field& stride : argument.strides) move(stride);
    for (Extent& extent : argument.extents) {
      move(extent.field);
      move(extent.multiple_of);
    }
  }
  return arguments;
}

template <size_t first, size_t... others>
constexpr auto join(const std::array<Argument, first>& head,
                    const std::array<Argument, others>&... tails) {
  std::array<Argument, (first + ... + others)> all = {};
  size_t count = 0;
  for (const Argument& argument : head) all[count++] = argument;
  const auto append = [&](const auto& tail) {
    for (const Argument& argument : tail) all[count++] = argument;
  };
  (append(tails), ...);
  return all;
}

// Its address stands for a struct of the C interface.
template <typename Struct>
constexpr char kTypeOf = 0;

// A function of the C interface for one place, and the one that tells its workspace. `run` is NULL
// where the library is built without that place, or where torch's operators serve it (ops/plain).
struct Entry {
  const char* operation = nullptr;
  dgemma_status (*run)(const void* operation, void* context) = nullptr;
  size_t (*workspace)(const void* operation) = nullptr;
};

template <typename Function>
struct Signature;
template <typename S, typename C>
struct Signature<dgemma_status (*)(const S*, C*)> {
  using Struct = S;
  using Context = C;
};

template <auto run, auto workspace = nullptr>
consteval Entry entry() {
  using Struct = typename Signature<decltype(run)>::Struct;
  using Context = typename Signature<decltype(run)>::Context;
  Entry made = {.operation = &kTypeOf<Struct>};
  made.run = [](const void* operation, void* context) {
    return run(static_cast<const Struct*>(operation), static_cast<Context*>(context));
  };
  if constexpr (!std::is_null_pointer_v<decltype(workspace)>)
    made.workspace = [](const void* operation) {
      return workspace(static_cast<const Struct*>(operation));
    };
  return made;
}

#if defined(DGEMMA_WITH_CUDA)
#define ON_CUDA(...) ::dgemma::entry<__VA_ARGS__>()
#else
#define ON_CUDA(...) \
  ::dgemma::Entry {}
#endif

// Which forms of an operator there are. kInPlace: it returns nothing and writes its arguments.
// kNew: it returns new tensors. kNewAndOut: and `name.out` writes into given ones.
enum class Form : uint8_t { kInPlace, kNew, kNewAndOut };

// Tensors and numbers of any operator at most, its outputs and workspace among them.
constexpr size_t kMostArguments = 32;
constexpr size_t kMostStructBytes = 512;

// The struct that an operator fills, and the fields of it that no argument names.
struct Operation {
  const char* type;
  size_t bytes;
  Field dtype = {};      // the dtype of the call
  Field workspace = {};  // where there is one; the form `out` takes it as its last keyword
  Field workspace_bytes = {};
};

template <typename Struct>
consteval Operation operation(Field dtype = {}, Field workspace = {}, Field bytes = {}) {
  return {&kTypeOf<Struct>, sizeof(Struct), dtype, workspace, bytes};
}

struct Operator {
  const char* name;
  Operation operation;
  std::span<const Argument> arguments;
  std::span<const Argument> outputs = {};  // what is returned, or the keywords of `name.out`
  Form form = Form::kInPlace;
  bool zeroed = false;  // new outputs are zero where the kernel writes nothing
  Entry cpu = {}, cuda = {};

  // Whether the functions that are called take the struct that is filled.
  constexpr bool fits() const {
    return (cpu.run == nullptr || cpu.operation == operation.type) &&
           (cuda.run == nullptr || cuda.operation == operation.type) &&
           operation.bytes <= kMostStructBytes &&
           arguments.size() + outputs.size() + 1 <= kMostArguments;
  }
};

}  // namespace dgemma
