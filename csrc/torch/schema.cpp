// The schema of an operator, from its description.
#include "torch/registration.h"

namespace dgemma {
namespace {

// Tensors that are written get a letter each, as torch wants it.
struct Letters {
  char next = 'a';
  std::string take() { return std::string("(") + next++ + "!)"; }
};

std::string declare(const Argument& argument, Letters& letters) {
  std::string type = "Tensor";
  if (!argument.is_tensor()) type = argument.content == Content::kReal ? "float" : "int";
  if (argument.is_written()) type += letters.take();
  return type + (argument.optional ? "? " : " ") + argument.name;
}

}  // namespace

std::vector<const Operator*>& operators() {
  static std::vector<const Operator*> all;
  return all;
}

std::string schema(const Operator& op, bool out) {
  Letters letters;
  std::string text = std::string(op.name) + (out ? ".out(" : "(");
  const char* separator = "";
  const auto append = [&](const std::string& declaration) {
    text += separator + declaration;
    separator = ", ";
  };
  for (const Argument& argument : op.arguments) append(declare(argument, letters));
  if (out) {
    append("*");
    for (const Argument& output : op.outputs) append(declare(output, letters));
    if (op.operation.workspace.exists()) append("Tensor" + letters.take() + "? workspace=None");
  }
  text += ") -> ";
  if (out || op.outputs.empty()) return text + "()";
  if (op.outputs.size() == 1) return text + "Tensor";
  text += "(";
  for (size_t i = 0; i < op.outputs.size(); ++i) text += i == 0 ? "Tensor" : ", Tensor";
  return text + ")";
}

}  // namespace dgemma
