// The reader of safetensors: files, shards, rows.
#include "io/safetensors.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <filesystem>
#include <set>

#include <expar/error.h>

#include "io/json.h"
#include "io/safetensors_header.h"

namespace expar::io {
namespace {

/// That of the largest open models is 15 MB.
constexpr std::uint64_t kMaxIndex = 64'000'000;
constexpr std::size_t kLengthBytes = sizeof(std::uint64_t);

std::uint64_t header_length(const MappedFile& file) {
  if (file.size() < kLengthBytes) {
    throw Error(ErrorCode::io, file.path() + " is cut short: it has " + std::to_string(file.size()) +
                                   " bytes, and a safetensors file has at least 8");
  }
  std::array<std::byte, kLengthBytes> bytes{};
  file.read(0, bytes);
  std::uint64_t length = 0;
  for (std::size_t i = 0; i < kLengthBytes; ++i) length |= static_cast<std::uint64_t>(bytes[i]) << (8 * i);
  if (length > kMaxHeader) {
    throw Error(ErrorCode::io, file.path() + ": its header of " + std::to_string(length) +
                                   " bytes is beyond the limit of " + std::to_string(kMaxHeader));
  }
  if (length > file.size() - kLengthBytes) {
    throw Error(ErrorCode::io, file.path() + " is cut short: it has " + std::to_string(file.size()) +
                                   " bytes, and its header alone has " + std::to_string(length));
  }
  return length;
}

template <class To, class From>
void convert(const std::byte* from, std::byte* to, std::size_t count) {
  const auto* in = reinterpret_cast<const From*>(from);
  auto* out = reinterpret_cast<To*>(to);
  for (std::size_t i = 0; i < count; ++i) out[i] = To(static_cast<float>(in[i]));
}

template <class To>
void convert_to(DType dtype, const std::byte* from, std::byte* to, std::size_t count) {
  switch (dtype) {
    case DType::f32:
      return convert<To, float>(from, to, count);
    case DType::bf16:
      return convert<To, bf16>(from, to, count);
    case DType::f16:
      return convert<To, f16>(from, to, count);
    case DType::fp8_e5m2:
      return convert<To, fp8_e5m2>(from, to, count);
    default:
      return convert<To, fp8_e4m3>(from, to, count);
  }
}

bool is_floating(DType dtype) {
  return dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16 || dtype == DType::fp8_e4m3 ||
         dtype == DType::fp8_e5m2;
}

void convert(DType from_dtype, const std::byte* from, DType to_dtype, std::byte* to, std::size_t count) {
  switch (to_dtype) {
    case DType::f32:
      return convert_to<float>(from_dtype, from, to, count);
    case DType::bf16:
      return convert_to<bf16>(from_dtype, from, to, count);
    case DType::f16:
      return convert_to<f16>(from_dtype, from, to, count);
    case DType::fp8_e5m2:
      return convert_to<fp8_e5m2>(from_dtype, from, to, count);
    default:
      return convert_to<fp8_e4m3>(from_dtype, from, to, count);
  }
}

Shape shape_of(const std::vector<std::int64_t>& extents) {
  switch (extents.size()) {
    case 0:
      return {};
    case 1:
      return {extents[0]};
    case 2:
      return {extents[0], extents[1]};
    case 3:
      return {extents[0], extents[1], extents[2]};
    default:
      return {extents[0], extents[1], extents[2], extents[3]};
  }
}

}  // namespace

std::string_view StoredTensor::dtype_name() const { return stored_dtypes()[dtype_].name; }

std::string StoredTensor::str() const {
  std::string text = std::string(dtype_name()) + " [";
  for (std::size_t i = 0; i < extents_.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(extents_[i]);
  return text + "]";
}

Error StoredTensor::failure(ErrorCode code, const std::string& text) const {
  return {code, path() + ": tensor " + in_quotes(name_) + " " + text};
}

DType StoredTensor::dtype() const {
  const StoredDType& stored = stored_dtypes()[dtype_];
  if (!stored.dtype) {
    throw failure(
        ErrorCode::unsupported,
        "is " + std::string(stored.name) + "; expar uses F32, BF16, F16, F8_E4M3, F8_E5M2, F8_E8M0, I8, I32 and I64");
  }
  return *stored.dtype;
}

Shape StoredTensor::shape() const {
  if (extents_.size() > static_cast<std::size_t>(Shape::kMaxRank)) {
    throw failure(ErrorCode::unsupported, "has " + std::to_string(extents_.size()) + " axes; expar uses up to " +
                                              std::to_string(Shape::kMaxRank));
  }
  try {
    return shape_of(extents_);
  } catch (const Error&) {  // an empty tensor with an absurd extent
    throw failure(ErrorCode::unsupported, "is " + str() + ", whose extents are beyond what expar can address");
  }
}

ConstTensor StoredTensor::view() const {
  const DType type = dtype();
  const Shape extents = shape();
  const std::byte* data = bytes().data();
  if (size_ > 0 && reinterpret_cast<std::uintptr_t>(data) % size_of(type) != 0) {
    throw failure(ErrorCode::unsupported, "begins at byte " + std::to_string(offset_) +
                                              ", which is not aligned for its dtype; write the file anew to align it");
  }
  return {data, type, extents};
}

void StoredTensor::read_rows(std::int64_t first, Tensor out) const {
  const DType type = dtype();
  const Shape extents = shape();
  if (extents.rank() == 0) throw failure(ErrorCode::bad_argument, "is a scalar and has no rows");
  bool fits = out.shape().rank() == extents.rank();
  for (int axis = 1; fits && axis < extents.rank(); ++axis) fits = out.size(axis) == extents[axis];
  if (!fits) throw failure(ErrorCode::bad_argument, "is " + str() + ", whose rows do not fit " + out.shape().str());
  const std::int64_t count = out.size(0);
  if (first < 0 || first > extents[0] || count > extents[0] - first) {
    throw failure(ErrorCode::bad_argument,
                  "is " + str() + " and has no " + std::to_string(count) + " rows from row " + std::to_string(first));
  }
  if (type != out.dtype() && !(is_floating(type) && is_floating(out.dtype()))) {
    throw failure(ErrorCode::bad_argument, "is " + std::string(dtype_name()) + " and cannot be read as " +
                                               std::string(expar::name(out.dtype())));
  }
  const auto elements = static_cast<std::size_t>(out.elements());
  if (elements == 0) return;
  const std::size_t row_bytes = size_ / static_cast<std::size_t>(extents[0]);
  const std::size_t begin = offset_ + static_cast<std::size_t>(first) * row_bytes;
  if (type == out.dtype()) return file_->read(begin, {out.bytes(), out.byte_size()});

  constexpr std::size_t kPiece = std::size_t{1} << 18;  // elements: what stays in a cache
  std::vector<std::byte> piece(std::min(elements, kPiece) * size_of(type));
  for (std::size_t i = 0; i < elements; i += kPiece) {
    const std::size_t n = std::min(elements - i, kPiece);
    file_->read(begin + i * size_of(type), std::span(piece).first(n * size_of(type)));
    convert(type, piece.data(), out.dtype(), out.bytes() + i * size_of(out.dtype()), n);
  }
}

Array StoredTensor::read() const {
  Array copy(dtype(), shape());
  file_->read(offset_, {copy.view().bytes(), size_});
  return copy;
}

SafetensorsFile::SafetensorsFile(const std::string& path) : file_(std::make_unique<const MappedFile>(path)) {
  const std::uint64_t length = header_length(*file_);
  std::string text(static_cast<std::size_t>(length), '\0');
  file_->read(kLengthBytes, std::as_writable_bytes(std::span(text)));
  const std::uint64_t data = kLengthBytes + length;
  Header header = parse_header(text, file_->size() - data, path);
  metadata_ = std::move(header.metadata);
  tensors_.resize(header.entries.size());
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    HeaderEntry& entry = header.entries[i];
    StoredTensor& tensor = tensors_[i];
    tensor.name_ = std::move(entry.name);
    tensor.dtype_ = entry.dtype;
    tensor.extents_ = std::move(entry.extents);
    tensor.offset_ = static_cast<std::size_t>(data + entry.begin);
    tensor.size_ = static_cast<std::size_t>(entry.end - entry.begin);
    tensor.file_ = file_.get();
  }
}

const StoredTensor* SafetensorsFile::find(std::string_view name) const {
  const auto found = std::lower_bound(tensors_.begin(), tensors_.end(), name,
                                      [](const StoredTensor& a, std::string_view b) { return a.name() < b; });
  return found != tensors_.end() && found->name() == name ? &*found : nullptr;
}

const StoredTensor& SafetensorsFile::at(std::string_view name) const {
  if (const StoredTensor* found = find(name)) return *found;
  throw Error(ErrorCode::io, path() + " has no tensor " + in_quotes(name));
}

Checkpoint::Checkpoint(const std::string& path) : path_(path) {
  namespace fs = std::filesystem;
  std::error_code error;
  if (!fs::is_directory(path, error)) {
    files_.emplace_back(path);
    return;
  }
  const std::string single = (fs::path(path) / "model.safetensors").string();
  const std::string index = (fs::path(path) / "model.safetensors.index.json").string();
  if (fs::exists(single, error)) {
    files_.emplace_back(single);
  } else if (fs::exists(index, error)) {
    read_shards(index);
  } else {
    throw Error(ErrorCode::io, path + " has neither model.safetensors nor model.safetensors.index.json");
  }
}

void Checkpoint::read_shards(const std::string& index) {
  const auto fail = [&](const std::string& text) { throw Error(ErrorCode::io, index + ": " + text); };
  const nlohmann::json json = parse_json(read_text(index, kMaxIndex), index);
  const auto map = json.is_object() ? json.find("weight_map") : json.end();
  if (map == json.end() || !map->is_object()) fail("it has no object 'weight_map'");

  std::set<std::string> names;
  for (const auto& [tensor, file] : map->items()) {
    if (!file.is_string()) fail("the file of tensor " + in_quotes(tensor) + " is not a string");
    const auto& name = file.get_ref<const std::string&>();
    // Links are followed, as the Hugging Face cache needs; a path in the index is not.
    if (name.empty() || name == "." || name == ".." ||
        name.find_first_of(std::string_view("/\0", 2)) != std::string::npos) {
      fail("the file " + in_quotes(name) + " of tensor " + in_quotes(tensor) + " is not a file of this directory");
    }
    names.insert(name);
  }
  const std::filesystem::path directory = std::filesystem::path(index).parent_path();
  std::map<std::string, const SafetensorsFile*> shards;
  files_.reserve(names.size());
  for (const std::string& name : names) shards[name] = &files_.emplace_back((directory / name).string());

  std::map<std::string_view, const SafetensorsFile*> owners;
  for (const SafetensorsFile& file : files_) {
    for (const StoredTensor& tensor : file.tensors()) {
      const auto [owner, is_new] = owners.emplace(tensor.name(), &file);
      if (!is_new)
        fail("tensor " + in_quotes(tensor.name()) + " is in " + owner->second->path() + " and in " + file.path());
    }
  }
  for (const auto& [tensor, file] : map->items()) {
    const SafetensorsFile& shard = *shards[file.get_ref<const std::string&>()];
    if (shard.find(tensor) == nullptr) fail("tensor " + in_quotes(tensor) + " is not in " + shard.path());
  }
}

const StoredTensor* Checkpoint::find(std::string_view name) const {
  for (const SafetensorsFile& file : files_) {
    if (const StoredTensor* found = file.find(name)) return found;
  }
  return nullptr;
}

const StoredTensor& Checkpoint::at(std::string_view name) const {
  if (const StoredTensor* found = find(name)) return *found;
  throw Error(ErrorCode::io, (files_.size() == 1 ? files_[0].path() : path_) + " has no tensor " + in_quotes(name));
}

}  // namespace expar::io
