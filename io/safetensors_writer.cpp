// The writer of safetensors.
#include <algorithm>

#include <unordered_map>

#include <nlohmann/json.hpp>

#include <expar/error.h>

#include "io/json.h"
#include "io/safetensors.h"
#include "io/safetensors_header.h"

namespace expar::io {
namespace {

/// Throws where JSON could not hold the text.
void check_text(const std::string& what, const std::string& text) {
  try {
    (void)nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    throw Error(ErrorCode::bad_argument, what + " is not UTF-8, which safetensors needs");
  }
}

std::vector<std::int64_t> extents_of(const Shape& shape) {
  std::vector<std::int64_t> extents;
  for (int axis = 0; axis < shape.rank(); ++axis) extents.push_back(shape[axis]);
  return extents;
}

/// The entries in the order of the file: strictest alignment first, so that all are aligned, then by name.
std::vector<HeaderEntry> lay_out(std::span<const TensorSpec> tensors) {
  std::vector<HeaderEntry> entries;
  for (const TensorSpec& tensor : tensors) {
    check_text("the name of a tensor", tensor.name);
    if (tensor.name.empty() || tensor.name == "__metadata__") {
      throw Error(ErrorCode::bad_argument, "a tensor cannot be called " + in_quotes(tensor.name));
    }
    const auto bytes = static_cast<std::uint64_t>(tensor.shape.elements()) * size_of(tensor.dtype);
    entries.push_back({tensor.name, stored_dtype(tensor.dtype), extents_of(tensor.shape), 0, bytes});
  }
  std::sort(entries.begin(), entries.end(), [](const HeaderEntry& a, const HeaderEntry& b) {
    return a.dtype != b.dtype ? a.dtype > b.dtype : a.name < b.name;
  });
  std::uint64_t offset = 0;
  for (HeaderEntry& entry : entries) {
    entry.begin = offset;
    offset = entry.end += offset;
  }
  return entries;
}

}  // namespace

struct SafetensorsWriter::State {
  struct Row {
    DType dtype;
    Shape shape;
    std::uint64_t next = 0, end = 0;  // bytes of the file
  };

  explicit State(const std::string& file_path) : path(file_path), file(file_path) {}
  Row& at(std::string_view name) {
    const auto found = rows.find(std::string(name));
    if (found == rows.end())
      throw Error(ErrorCode::bad_argument, path + " was not to hold a tensor " + in_quotes(name));
    return found->second;
  }

  std::string path;
  AtomicFile file;
  std::unordered_map<std::string, Row> rows;
};

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::span<const TensorSpec> tensors,
                                     const Metadata& metadata) {
  for (const auto& [key, value] : metadata) {
    check_text("a key of the metadata", key);
    check_text("the value of " + in_quotes(key) + " in the metadata", value);
  }
  const std::vector<HeaderEntry> entries = lay_out(tensors);
  const std::string header = format_header(entries, metadata);
  if (header.size() - sizeof(std::uint64_t) > kMaxHeader) {
    throw Error(ErrorCode::bad_argument, path + ": a header of " + std::to_string(header.size()) +
                                             " bytes is beyond the limit of " + std::to_string(kMaxHeader) +
                                             "; write several files");
  }
  std::unordered_map<std::string, State::Row> rows;
  for (const TensorSpec& tensor : tensors) {
    if (!rows.emplace(tensor.name, State::Row{.dtype = tensor.dtype, .shape = tensor.shape}).second) {
      throw Error(ErrorCode::bad_argument, path + " was to hold tensor " + in_quotes(tensor.name) + " twice");
    }
  }
  for (const HeaderEntry& entry : entries) {
    State::Row& row = rows[entry.name];
    row.next = header.size() + entry.begin;
    row.end = header.size() + entry.end;
  }
  state_ = std::make_unique<State>(path);
  state_->rows = std::move(rows);
  state_->file.write(0, std::as_bytes(std::span(header)));
}

SafetensorsWriter::~SafetensorsWriter() = default;
SafetensorsWriter::SafetensorsWriter(SafetensorsWriter&&) noexcept = default;

void SafetensorsWriter::write(std::string_view name, ConstTensor rows) {
  State::Row& row = state_->at(name);
  bool fits = rows.dtype() == row.dtype && rows.shape().rank() == row.shape.rank();
  for (int axis = 1; fits && axis < row.shape.rank(); ++axis) fits = rows.size(axis) == row.shape[axis];
  if (!fits || rows.byte_size() > row.end - row.next) {
    throw Error(ErrorCode::bad_argument, state_->path + ": tensor " + in_quotes(name) + " is to be " +
                                             std::string(expar::name(row.dtype)) + " " + row.shape.str() + "; " +
                                             std::string(expar::name(rows.dtype())) + " " + rows.shape().str() +
                                             (fits ? " is more than it lacks" : " does not fit"));
  }
  state_->file.write(row.next, {rows.bytes(), rows.byte_size()});
  row.next += rows.byte_size();
}

void SafetensorsWriter::commit() {
  for (const auto& [name, row] : state_->rows) {
    if (row.next == row.end) continue;
    throw Error(ErrorCode::bad_argument, state_->path + ": tensor " + in_quotes(name) + " still lacks " +
                                             std::to_string(row.end - row.next) + " bytes");
  }
  state_->file.commit();
}

void write_safetensors(const std::string& path, std::span<const NamedTensor> tensors, const Metadata& metadata) {
  std::vector<TensorSpec> specs;
  for (const NamedTensor& tensor : tensors) specs.push_back({tensor.name, tensor.value.dtype(), tensor.value.shape()});
  SafetensorsWriter writer(path, specs, metadata);
  for (const NamedTensor& tensor : tensors) writer.write(tensor.name, tensor.value);
  writer.commit();
}

}  // namespace expar::io
