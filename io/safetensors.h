// safetensors: named arrays in one file, or in the shards of a Hugging Face checkpoint.
// Source: https://huggingface.co/docs/safetensors, whose safety rules are enforced to the letter.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <expar/error.h>
#include <expar/tensor.h>

#include "io/file.h"

namespace expar::io {

using Metadata = std::map<std::string, std::string>;

/// A tensor in a file that was opened. Valid as long as its SafetensorsFile or Checkpoint.
class StoredTensor {
 public:
  const std::string& name() const { return name_; }
  /// As the format writes it: "BF16". It may be one that expar has not ("F64"): the tensor can be looked at, not used.
  std::string_view dtype_name() const;
  const std::vector<std::int64_t>& extents() const { return extents_; }
  std::string str() const;  // "BF16 [8, 64]"
  const std::string& path() const { return file_->path(); }
  /// In the mapping: read when touched.
  std::span<const std::byte> bytes() const { return file_->bytes().subspan(offset_, size_); }

  /// Throws Error: unsupported (expar has no such dtype), naming tensor and file.
  DType dtype() const;
  /// Throws Error: unsupported (more than four axes).
  Shape shape() const;
  /// The tensor where it lies in the mapping; its rows() are slices that cost nothing.
  /// Throws Error: unsupported (dtype, axes, or not aligned for its dtype, which the format allows: read() copies).
  ConstTensor view() const;

  /// Copies rows [first, first + out.size(0)) of the outermost axis to `out`, converted to its dtype where both are
  /// floating point. Reads these rows only.
  ///   out : [count, the tensor's other extents]
  /// Throws Error: io, unsupported (dtype, axes), bad_argument (rows or shape do not fit; no such conversion).
  void read_rows(std::int64_t first, Tensor out) const;
  /// A copy of the whole. Throws Error: io, unsupported, no_memory.
  Array read() const;

 private:
  friend class SafetensorsFile;
  Error failure(ErrorCode code, const std::string& text) const;

  std::string name_;
  std::size_t dtype_ = 0;  // a row of the format's table
  std::vector<std::int64_t> extents_;
  std::size_t offset_ = 0;  // of the file
  std::size_t size_ = 0;
  const MappedFile* file_ = nullptr;
};

/// One file.
class SafetensorsFile {
 public:
  /// Reads the header only.
  /// Throws Error: io (cannot be read; breaks a rule of the format, in one sentence that says which and where).
  /// Stricter than the reference implementation in two points: each key once, and no keys that the format has not.
  /// Cost: time and memory proportional to the header, which has at most 100 MB and is checked against the file first.
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return file_->path(); }
  const Metadata& metadata() const { return metadata_; }
  /// By name.
  std::span<const StoredTensor> tensors() const { return tensors_; }
  /// Null where there is none.
  const StoredTensor* find(std::string_view name) const;
  /// Throws Error: io (naming tensor and file).
  const StoredTensor& at(std::string_view name) const;

 private:
  std::unique_ptr<const MappedFile> file_;
  Metadata metadata_;
  std::vector<StoredTensor> tensors_;
};

/// A directory with model.safetensors, or with model.safetensors.index.json and the shards that it names.
class Checkpoint {
 public:
  /// Reads the index and the headers only.
  ///   path : the directory, or one file of the format
  /// Throws Error: io (as SafetensorsFile; an index that names a file outside of the directory, or a tensor that its
  /// shard lacks; a tensor in two shards).
  explicit Checkpoint(const std::string& path);

  /// As it was given.
  const std::string& path() const { return path_; }
  std::span<const SafetensorsFile> files() const { return files_; }
  const StoredTensor* find(std::string_view name) const;
  /// Throws Error: io (naming tensor and checkpoint).
  const StoredTensor& at(std::string_view name) const;

 private:
  void read_shards(const std::string& index);

  std::string path_;
  std::vector<SafetensorsFile> files_;
};

/// What a file will hold.
struct TensorSpec {
  std::string name;
  DType dtype = DType::f32;
  Shape shape;
};

/// Writes a file piece by piece, so that no rank ever needs the whole of it in memory. The bytes depend on names,
/// dtypes, shapes, metadata and contents alone, not on their order: they are those of Python's safetensors. The file
/// appears when it is complete (see AtomicFile).
///   metadata : transformers wants {"format": "pt"}
class SafetensorsWriter {
 public:
  /// Throws Error: bad_argument (a name twice, empty, reserved or not UTF-8; a header beyond 100 MB), io.
  SafetensorsWriter(const std::string& path, std::span<const TensorSpec> tensors, const Metadata& metadata = {});
  ~SafetensorsWriter();
  SafetensorsWriter(SafetensorsWriter&&) noexcept;

  /// Appends `rows`, the next ones of the outermost axis, to a tensor; or all of it in one call.
  /// Throws Error: bad_argument (no such tensor; dtype, shape or number of rows do not fit), io.
  void write(std::string_view name, ConstTensor rows);
  /// Throws Error: bad_argument (a tensor is not complete, by name), io.
  void commit();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

struct NamedTensor {
  std::string name;
  ConstTensor value;
};

/// The same for tensors that are at hand.
void write_safetensors(const std::string& path, std::span<const NamedTensor> tensors, const Metadata& metadata = {});

}  // namespace expar::io
