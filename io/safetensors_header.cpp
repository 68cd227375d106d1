// Header text to entries and back.
#include "io/safetensors_header.h"

#include <algorithm>
#include <array>
#include <bit>
#include <utility>

#include <nlohmann/json.hpp>

#include <expar/error.h>

#include "io/json.h"

namespace expar::io {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is little endian, and so must the machine be");

// The order is that of the enumeration in the reference implementation.
constexpr StoredDType kStored[] = {
    {"BOOL", 8, {}},
    {"F4", 4, {}},
    {"F6_E2M3", 6, {}},
    {"F6_E3M2", 6, {}},
    {"U8", 8, {}},
    {"I8", 8, DType::int8},
    {"F8_E5M2", 8, DType::fp8_e5m2},
    {"F8_E4M3", 8, DType::fp8_e4m3},
    {"F8_E8M0", 8, DType::fp8_e8m0},
    {"F8_E4M3FNUZ", 8, {}},
    {"F8_E5M2FNUZ", 8, {}},
    {"I16", 16, {}},
    {"U16", 16, {}},
    {"F16", 16, DType::f16},
    {"BF16", 16, DType::bf16},
    {"I32", 32, DType::int32},
    {"U32", 32, {}},
    {"F32", 32, DType::f32},
    {"C64", 64, {}},
    {"F64", 64, {}},
    {"I64", 64, DType::int64},
    {"U64", 64, {}},
};

/// Takes the parser's events in the only order that makes a header; nothing nests deeper than that.
class HeaderReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  HeaderReader(Header& header, const std::string& path) : header_(header), path_(path) {}

  bool null() override { unexpected(); }
  bool boolean(bool) override { unexpected(); }
  bool number_integer(number_integer_t) override { unexpected(); }
  bool number_float(number_float_t, const string_t&) override { unexpected(); }
  bool binary(binary_t&) override { unexpected(); }

  bool number_unsigned(number_unsigned_t value) override {
    if (place_ == Place::extents && value <= INT64_MAX) {
      entry().extents.push_back(static_cast<std::int64_t>(value));
      return true;
    }
    if (place_ != Place::offsets || offsets_ == 2) unexpected();
    (offsets_++ == 0 ? entry().begin : entry().end) = value;
    return true;
  }

  bool string(string_t& value) override {
    if (place_ == Place::note) {
      if (!header_.metadata.emplace(note_, value).second)
        fail("'__metadata__' has the key " + in_quotes(note_) + " twice");
      place_ = Place::metadata;
      return true;
    }
    if (place_ != Place::dtype) unexpected();
    const auto* row = std::find_if(std::begin(kStored), std::end(kStored),
                                   [&](const StoredDType& stored) { return stored.name == value; });
    if (row == std::end(kStored)) fail(tensor() + " has dtype " + in_quotes(value) + ", which the format has not");
    entry().dtype = static_cast<std::size_t>(row - std::begin(kStored));
    place_ = Place::tensor;
    return true;
  }

  bool start_object(std::size_t) override {
    if (place_ == Place::before) {
      place_ = Place::top;
    } else if (place_ == Place::value) {
      place_ = is_metadata_ ? Place::metadata : Place::tensor;
    } else {
      unexpected();
    }
    return true;
  }

  bool key(string_t& key) override {
    if (place_ == Place::top) {
      is_metadata_ = key == "__metadata__";
      if (is_metadata_ && std::exchange(has_metadata_, true)) fail("its header has '__metadata__' twice");
      if (!is_metadata_) header_.entries.emplace_back().name = std::move(key);
      has_ = {};
      place_ = Place::value;
    } else if (place_ == Place::metadata) {
      note_ = std::move(key);
      place_ = Place::note;
    } else {
      const auto* found = std::find(std::begin(kKeys), std::end(kKeys), key);
      if (found == std::end(kKeys)) fail(tensor() + " has the unknown key " + in_quotes(key));
      const auto number = static_cast<std::size_t>(found - std::begin(kKeys));
      if (std::exchange(has_[number], true)) fail(tensor() + " has '" + key + "' twice");
      constexpr Place kPlaces[] = {Place::dtype, Place::extents_start, Place::offsets_start};
      place_ = kPlaces[number];
    }
    return true;
  }

  bool end_object() override {
    if (place_ == Place::tensor) {
      for (std::size_t i = 0; i < has_.size(); ++i) {
        if (!has_[i]) fail(tensor() + " has no '" + std::string(kKeys[i]) + "'");
      }
    }
    place_ = place_ == Place::top ? Place::after : Place::top;
    return true;
  }

  bool start_array(std::size_t) override {
    if (place_ == Place::extents_start) {
      place_ = Place::extents;
    } else if (place_ == Place::offsets_start) {
      place_ = Place::offsets;
      offsets_ = 0;
    } else {
      unexpected();
    }
    return true;
  }

  bool end_array() override {
    if (place_ == Place::offsets && offsets_ != 2) unexpected();
    place_ = Place::tensor;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&) override {
    fail("its header is not valid JSON at byte " + std::to_string(position));
  }

 private:
  /// What comes next.
  enum class Place {
    before,
    top,     // a name
    value,   // the object of a name
    tensor,  // a key of a tensor
    dtype,
    extents_start,
    extents,
    offsets_start,
    offsets,
    metadata,  // a key of __metadata__
    note,      // its value
    after,
  };
  static constexpr std::string_view kKeys[] = {"dtype", "shape", "data_offsets"};

  HeaderEntry& entry() { return header_.entries.back(); }
  std::string tensor() { return "tensor " + in_quotes(entry().name); }
  [[noreturn]] void fail(const std::string& text) { throw Error(ErrorCode::io, path_ + ": " + text); }

  [[noreturn]] void unexpected() {
    switch (place_) {
      case Place::value:
        fail(is_metadata_ ? "'__metadata__' is not an object" : tensor() + " is not described by an object");
      case Place::dtype:
        fail(tensor() + ": its dtype is not a string");
      case Place::extents_start:
      case Place::extents:
        fail(tensor() + ": its shape is not a list of whole numbers from 0 to 2^63 - 1");
      case Place::offsets_start:
      case Place::offsets:
        fail(tensor() + ": its data_offsets are not two whole numbers from 0 to 2^64 - 1");
      case Place::note:
        fail("the value of " + in_quotes(note_) + " in '__metadata__' is not a string");
      default:
        fail("its header is not an object of tensors");
    }
  }

  Header& header_;
  const std::string& path_;
  Place place_ = Place::before;
  bool is_metadata_ = false, has_metadata_ = false;
  std::array<bool, 3> has_{};  // of kKeys
  int offsets_ = 0;            // seen
  std::string note_;
};

std::string shown_shape(const HeaderEntry& entry) {
  constexpr std::size_t kMaxShown = 8;
  std::string text = std::string(kStored[entry.dtype].name) + " [";
  for (std::size_t i = 0; i < entry.extents.size(); ++i) {
    if (i == kMaxShown) return text + ", ...]";
    text += (i > 0 ? ", " : "") + std::to_string(entry.extents[i]);
  }
  return text + "]";
}

/// Where a tensor's dtype, shape and offsets contradict each other; empty if nowhere.
std::string check_size(const HeaderEntry& entry) {
  if (entry.begin > entry.end) {
    return "its data_offsets [" + std::to_string(entry.begin) + ", " + std::to_string(entry.end) + "] run backwards";
  }
  std::uint64_t bits = kStored[entry.dtype].bits;
  for (const std::int64_t extent : entry.extents) {
    if (__builtin_mul_overflow(bits, static_cast<std::uint64_t>(extent), &bits)) {
      return shown_shape(entry) + " has more elements than any file can hold";
    }
  }
  if (bits % 8 != 0) return shown_shape(entry) + " does not fill whole bytes";
  if (entry.end - entry.begin != bits / 8) {
    return shown_shape(entry) + " takes " + std::to_string(bits / 8) + " bytes, but its data_offsets hold " +
           std::to_string(entry.end - entry.begin);
  }
  return {};
}

/// Every byte of the data belongs to exactly one tensor.
void check_layout(const std::vector<HeaderEntry>& entries, std::uint64_t data_bytes, const std::string& path) {
  const auto fail = [&](const std::string& text) { throw Error(ErrorCode::io, path + ": " + text); };
  std::vector<const HeaderEntry*> order;
  order.reserve(entries.size());
  for (const HeaderEntry& entry : entries) order.push_back(&entry);
  std::sort(order.begin(), order.end(), [](const HeaderEntry* a, const HeaderEntry* b) {
    return a->begin != b->begin ? a->begin < b->begin : a->end < b->end;
  });
  std::uint64_t covered = 0;
  for (const HeaderEntry* entry : order) {
    const std::string tensor = "tensor " + in_quotes(entry->name);
    if (const std::string wrong = check_size(*entry); !wrong.empty()) fail(tensor + ": " + wrong);
    if (entry->end > data_bytes) {
      fail(tensor + " ends at byte " + std::to_string(entry->end) + " of the data, which has only " +
           std::to_string(data_bytes));
    }
    if (entry->begin < covered) {
      fail(tensor + " begins at byte " + std::to_string(entry->begin) + " of the data, inside another that ends at " +
           std::to_string(covered));
    }
    if (entry->begin > covered) {
      fail("bytes " + std::to_string(covered) + " to " + std::to_string(entry->begin) +
           " of the data belong to no tensor");
    }
    covered = entry->end;
  }
  if (covered < data_bytes) {
    fail("its last " + std::to_string(data_bytes - covered) + " bytes belong to no tensor");
  }
}

}  // namespace

std::span<const StoredDType> stored_dtypes() { return kStored; }

std::size_t stored_dtype(DType dtype) {
  const auto* row = std::find_if(std::begin(kStored), std::end(kStored),
                                 [&](const StoredDType& stored) { return stored.dtype == dtype; });
  return static_cast<std::size_t>(row - std::begin(kStored));
}

Header parse_header(std::string_view text, std::uint64_t data_bytes, const std::string& path) {
  const auto fail = [&](const std::string& what) { throw Error(ErrorCode::io, path + ": " + what); };
  if (!text.starts_with('{')) fail("its header does not begin with '{'");
  // The parser takes a zero byte for the end.
  if (const std::size_t zero = text.find('\0'); zero != std::string_view::npos) {
    fail("its header is not valid JSON at byte " + std::to_string(zero + 1));
  }
  Header header;
  HeaderReader reader(header, path);
  nlohmann::json::sax_parse(text, &reader);
  std::sort(header.entries.begin(), header.entries.end(),
            [](const HeaderEntry& a, const HeaderEntry& b) { return a.name < b.name; });
  const auto twice = std::adjacent_find(header.entries.begin(), header.entries.end(),
                                        [](const HeaderEntry& a, const HeaderEntry& b) { return a.name == b.name; });
  if (twice != header.entries.end()) fail("its header has tensor " + in_quotes(twice->name) + " twice");
  check_layout(header.entries, data_bytes, path);
  return header;
}

std::string format_header(std::span<const HeaderEntry> entries, const std::map<std::string, std::string>& metadata) {
  const auto json_string = [](const std::string& text) { return nlohmann::json(text).dump(); };
  std::string text(sizeof(std::uint64_t), '\0');
  text += '{';
  if (!metadata.empty()) text += "\"__metadata__\":" + nlohmann::json(metadata).dump() + ",";
  for (const HeaderEntry& entry : entries) {
    std::string shape;
    for (const std::int64_t extent : entry.extents) shape += (shape.empty() ? "" : ",") + std::to_string(extent);
    text += json_string(entry.name) + ":{\"dtype\":\"" + std::string(kStored[entry.dtype].name) + "\",\"shape\":[" +
            shape + "],\"data_offsets\":[" + std::to_string(entry.begin) + "," + std::to_string(entry.end) + "]},";
  }
  if (text.back() == ',') text.pop_back();
  text += '}';
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const std::uint64_t length = text.size() - sizeof(length);
  for (std::size_t i = 0; i < sizeof(length); ++i) text[i] = static_cast<char>(length >> (8 * i));
  return text;
}

}  // namespace expar::io
