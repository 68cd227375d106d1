// Files that break one rule each: every one is refused at once, in one sentence that says which rule and where.
#include <sys/resource.h>

#include <chrono>
#include <string>
#include <vector>

#include "io/safetensors.h"
#include "safetensors_testing.h"

namespace expar {
namespace {

struct Malformed {
  std::string what;  // a name for the file
  std::string bytes;
  std::string refusal;  // after "io: FILE"
};

/// A header of one tensor with this dtype, shape and offsets, and as many bytes of data.
std::string tensor(const std::string& dtype, const std::string& shape, const std::string& offsets, std::size_t data) {
  return file_of("{\"a\":{\"dtype\":" + dtype + ",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}}", data);
}

/// Headers of two tensors of 8 bytes each.
std::string two(const std::string& first_offsets, const std::string& second_offsets, std::size_t data) {
  return file_of("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":" + first_offsets +
                     "},\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":" + second_offsets + "}}",
                 data);
}

/// A length and what stands in the place of the header.
std::string with_length(std::uint64_t length, const std::string& rest) {
  std::string file;
  for (std::size_t i = 0; i < 8; ++i) file += static_cast<char>(length >> (8 * i));
  return file + rest;
}

const std::string kNotWhole = ": tensor 'a': its shape is not a list of whole numbers from 0 to 2^63 - 1";
const std::string kNotOffsets = ": tensor 'a': its data_offsets are not two whole numbers from 0 to 2^64 - 1";

std::vector<Malformed> corpus() {
  const std::string good = R"("dtype":"F32","shape":[2],"data_offsets":[0,8])";
  return {
      // The frame.
      {"empty", "", " is cut short: it has 0 bytes, and a safetensors file has at least 8"},
      {"seven bytes", "1234567", " is cut short: it has 7 bytes, and a safetensors file has at least 8"},
      {"no header", with_length(0, ""), ": its header does not begin with '{'"},
      {"header beyond the file", with_length(100, "{}"),
       " is cut short: it has 10 bytes, and its header alone has 100"},
      {"header of 2^60 bytes", with_length(std::uint64_t{1} << 60, "{}"),
       ": its header of 1152921504606846976 bytes is beyond the limit of 100000000"},
      {"header of 2^64 - 1 bytes", with_length(UINT64_MAX, "{}"),
       ": its header of 18446744073709551615 bytes is beyond the limit of 100000000"},
      {"header of the limit and one", with_length(100'000'001, "{}"),
       ": its header of 100000001 bytes is beyond the limit of 100000000"},
      {"header of the limit", with_length(100'000'000, "{}"),
       " is cut short: it has 10 bytes, and its header alone has 100000000"},
      {"length cut short", tensor("\"F32\"", "[2]", "[0,8]", 8).substr(0, 20),
       " is cut short: it has 20 bytes, and its header alone has 54"},
      {"data cut short", tensor("\"F32\"", "[2]", "[0,8]", 7),
       ": tensor 'a' ends at byte 8 of the data, which has only 7"},
      {"trailing bytes", tensor("\"F32\"", "[2]", "[0,8]", 11), ": its last 3 bytes belong to no tensor"},
      {"data without tensors", file_of("{}", 1), ": its last 1 bytes belong to no tensor"},
      // JSON.
      {"leading space", file_of(" {}", 0), ": its header does not begin with '{'"},
      {"byte order mark", file_of("\xef\xbb\xbf{}", 0), ": its header does not begin with '{'"},
      {"an array", file_of("[]", 0), ": its header does not begin with '{'"},
      {"unclosed", file_of("{\"a\":{" + good + "}", 8), ": its header is not valid JSON at byte 54"},
      {"trailing comma", file_of("{\"a\":{" + good + "},}", 8), ": its header is not valid JSON at byte 55"},
      {"second object", file_of("{\"a\":{" + good + "}} {}", 8), ": its header is not valid JSON at byte 56"},
      {"zero byte", file_of(std::string("{}\0{}", 5), 0), ": its header is not valid JSON at byte 3"},
      {"zero padding", file_of(std::string("{}\0\0", 4), 0), ": its header is not valid JSON at byte 3"},
      {"comment", file_of("{/**/}", 0), ": its header is not valid JSON at byte 2"},
      {"not UTF-8", file_of("{\"\xff\":{" + good + "}}", 8), ": its header is not valid JSON at byte 3"},
      {"half a surrogate", file_of(R"({"\ud800":{)" + good + "}}", 8), ": its header is not valid JSON at byte 9"},
      {"control character", file_of("{\"a\nb\":{" + good + "}}", 8), ": its header is not valid JSON at byte 4"},
      {"NaN", tensor("\"F32\"", "[NaN]", "[0,8]", 8), ": its header is not valid JSON at byte 30"},
      {"infinite", tensor("\"F32\"", "[1e999]", "[0,8]", 8), ": its header is not valid JSON at byte 34"},
      // What stands where.
      {"tensor is a number", file_of("{\"a\":1}", 0), ": tensor 'a' is not described by an object"},
      {"tensor is null", file_of("{\"a\":null}", 0), ": tensor 'a' is not described by an object"},
      {"deep nesting", file_of("{\"a\":" + std::string(5'000'000, '['), 0),
       ": tensor 'a' is not described by an object"},
      {"deep objects",
       file_of(
           [] {
             std::string text;
             for (int i = 0; i < 1'000'000; ++i) text += "{\"a\":";
             return text;
           }(),
           0),
       ": tensor 'a' has the unknown key 'a'"},
      {"deep shape", tensor("\"F32\"", std::string(1'000'000, '['), "[0,8]", 8), kNotWhole},
      {"no dtype", file_of(R"({"a":{"shape":[2],"data_offsets":[0,8]}})", 8), ": tensor 'a' has no 'dtype'"},
      {"no shape", file_of(R"({"a":{"dtype":"F32","data_offsets":[0,8]}})", 8), ": tensor 'a' has no 'shape'"},
      {"no offsets", file_of(R"({"a":{"dtype":"F32","shape":[2]}})", 8), ": tensor 'a' has no 'data_offsets'"},
      {"unknown key", file_of("{\"a\":{" + good + ",\"stride\":[1]}}", 8), ": tensor 'a' has the unknown key 'stride'"},
      {"dtype is a number", tensor("32", "[2]", "[0,8]", 8), ": tensor 'a': its dtype is not a string"},
      {"unknown dtype", tensor("\"F31\"", "[2]", "[0,8]", 8), ": tensor 'a' has dtype 'F31', which the format has not"},
      {"dtype in lower case", tensor("\"f32\"", "[2]", "[0,8]", 8),
       ": tensor 'a' has dtype 'f32', which the format has not"},
      {"shape is a number", tensor("\"F32\"", "2", "[0,8]", 8), kNotWhole},
      {"extent is a string", tensor("\"F32\"", "[\"2\"]", "[0,8]", 8), kNotWhole},
      {"extent is a fraction", tensor("\"F32\"", "[2.0]", "[0,8]", 8), kNotWhole},
      {"extent is negative", tensor("\"F32\"", "[-2]", "[0,8]", 8), kNotWhole},
      {"extent is 2^63", tensor("\"F32\"", "[9223372036854775808]", "[0,8]", 8), kNotWhole},
      {"extent is 2^64", tensor("\"F32\"", "[18446744073709551616]", "[0,8]", 8), kNotWhole},
      {"one offset", tensor("\"F32\"", "[2]", "[0]", 8), kNotOffsets},
      {"three offsets", tensor("\"F32\"", "[2]", "[0,8,8]", 8), kNotOffsets},
      {"negative offset", tensor("\"F32\"", "[2]", "[-8,0]", 8), kNotOffsets},
      {"offset is a fraction", tensor("\"F32\"", "[2]", "[0,8.0]", 8), kNotOffsets},
      {"offset is 2^64", tensor("\"F32\"", "[2]", "[0,18446744073709551616]", 8), kNotOffsets},
      // Each key once.
      {"tensor twice", file_of("{\"a\":{" + good + "},\"a\":{" + good + "}}", 8), ": its header has tensor 'a' twice"},
      {"tensor twice, once escaped", file_of("{\"a\":{" + good + R"(},"\u0061":{)" + good + "}}", 8),
       ": its header has tensor 'a' twice"},
      {"dtype twice", file_of("{\"a\":{\"dtype\":\"F32\"," + good + "}}", 8), ": tensor 'a' has 'dtype' twice"},
      {"metadata twice", file_of(R"({"__metadata__":{},"__metadata__":{}})", 0),
       ": its header has '__metadata__' twice"},
      {"metadata key twice", file_of(R"({"__metadata__":{"k":"1","k":"2"}})", 0),
       ": '__metadata__' has the key 'k' twice"},
      // Metadata.
      {"metadata is a list", file_of(R"({"__metadata__":[]})", 0), ": '__metadata__' is not an object"},
      {"metadata is a number inside", file_of(R"({"__metadata__":{"k":1}})", 0),
       ": the value of 'k' in '__metadata__' is not a string"},
      {"metadata is an object inside", file_of(R"({"__metadata__":{"k":{}}})", 0),
       ": the value of 'k' in '__metadata__' is not a string"},
      // Dtype, shape and place agree.
      {"too few bytes", tensor("\"F32\"", "[3]", "[0,8]", 8),
       ": tensor 'a': F32 [3] takes 12 bytes, but its data_offsets hold 8"},
      {"too many bytes", tensor("\"BF16\"", "[3]", "[0,8]", 8),
       ": tensor 'a': BF16 [3] takes 6 bytes, but its data_offsets hold 8"},
      {"a scalar of 8 bytes", tensor("\"F32\"", "[]", "[0,8]", 8),
       ": tensor 'a': F32 [] takes 4 bytes, but its data_offsets hold 8"},
      {"half a byte", tensor("\"F4\"", "[3]", "[0,1]", 1), ": tensor 'a': F4 [3] does not fill whole bytes"},
      {"shape that overflows", tensor("\"F32\"", "[4294967296,4294967296,2]", "[0,8]", 8),
       ": tensor 'a': F32 [4294967296, 4294967296, 2] has more elements than any file can hold"},
      {"shape that overflows to a fit", tensor("\"U8\"", "[4294967296,4294967296]", "[0,0]", 0),
       ": tensor 'a': U8 [4294967296, 4294967296] has more elements than any file can hold"},
      {"shape that overflows before a zero", tensor("\"U8\"", "[4294967296,4294967296,0]", "[0,0]", 0),
       ": tensor 'a': U8 [4294967296, 4294967296, 0] has more elements than any file can hold"},
      {"offsets backwards", tensor("\"F32\"", "[2]", "[8,0]", 8),
       ": tensor 'a': its data_offsets [8, 0] run backwards"},
      {"offsets beyond the file", tensor("\"F32\"", "[2]", "[8,16]", 8),
       ": tensor 'a' ends at byte 16 of the data, which has only 8"},
      {"huge offsets", tensor("\"F32\"", "[2]", "[18446744073709551607,18446744073709551615]", 8),
       ": tensor 'a' ends at byte 18446744073709551615 of the data, which has only 8"},
      {"overlap", two("[0,8]", "[4,12]", 12),
       ": tensor 'b' begins at byte 4 of the data, inside another that ends at 8"},
      {"the same bytes twice", two("[0,8]", "[0,8]", 8),
       ": tensor 'b' begins at byte 0 of the data, inside another that ends at 8"},
      {"hole", two("[0,8]", "[12,20]", 20), ": bytes 8 to 12 of the data belong to no tensor"},
      {"hole at the start", tensor("\"F32\"", "[2]", "[4,12]", 12), ": bytes 0 to 4 of the data belong to no tensor"},
      // What a terminal would make of it.
      {"a name that paints", file_of("{\"\\u001b[31mred\":1}", 0), ": tensor '?[31mred' is not described by an object"},
      {"a name of a million letters", file_of("{\"" + std::string(1'000'000, 'n') + "\":1}", 0),
       ": tensor '" + std::string(120, 'n') + "...' is not described by an object"},
  };
}

std::int64_t peak_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss * 1024;
}

TEST(MalformedSafetensors, are_refused_at_once_in_one_sentence) {
  const Directory directory;
  const std::vector<Malformed> files = corpus();
  EXPECT_GE(files.size(), 30U);
  for (const Malformed& file : files) {
    const std::string path = directory.put(file.what, file.bytes);
    const std::int64_t memory = peak_bytes();
    const auto start = std::chrono::steady_clock::now();
    EXPECT_EQ(refusal_of(directory, [&] { io::SafetensorsFile{path}; }), "io: " + file.what + file.refusal);
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5)) << file.what;
    EXPECT_LT(peak_bytes() - memory, std::int64_t{64} << 20) << file.what;
  }
}

TEST(MalformedSafetensors, are_refused_wherever_a_good_file_is_cut) {
  const Directory directory;
  const std::string good = two("[0,8]", "[8,16]", 16);
  EXPECT_EQ(refusal_of(directory, [&] { io::SafetensorsFile(directory.put("file", good)); }), "accepted");
  for (std::size_t length = 0; length < good.size(); ++length) {
    const std::string path = directory.put("file", good.substr(0, length));
    EXPECT_TRUE(refusal_of(directory, [&] { io::SafetensorsFile{path}; }).starts_with("io: file")) << length;
  }
}

TEST(MalformedSafetensors, never_do_worse_than_an_error_whichever_byte_is_wrong) {
  const Directory directory;
  const std::string good =
      file_of(R"({"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},)"
              R"("b":{"dtype":"I8","shape":[],"data_offsets":[8,9]}})",
              9);
  std::size_t accepted = 0;
  for (std::size_t at = 0; at < good.size() - 9; ++at) {
    for (const char wrong : {'\0', ' ', '"', '0', '9', '-', '{', '}', '[', ']', ',', '\\', '\x7f', '\xff'}) {
      std::string file = good;
      file[at] = wrong;
      const std::string path = directory.put("file", file);
      const std::string refusal = refusal_of(directory, [&] {
        const io::SafetensorsFile read(path);
        std::size_t bytes = 0;
        for (const io::StoredTensor& tensor : read.tensors()) bytes += tensor.bytes().size();
        EXPECT_EQ(bytes, 9U) << at << " " << wrong;
      });
      accepted += refusal == "accepted" ? 1 : 0;
      EXPECT_TRUE(refusal == "accepted" || refusal.starts_with("io: file")) << refusal;
    }
  }
  EXPECT_GT(accepted, 0U) << "letters of names may change";
}

TEST(MalformedSafetensors, cost_time_and_memory_in_proportion_to_their_header) {
  const Directory directory;
  std::string header = "{";
  constexpr int kTensors = 100'000;
  for (int i = 0; i < kTensors; ++i) {
    header += "\"" + std::to_string(i) + R"(":{"dtype":"U8","shape":[],"data_offsets":[)" + std::to_string(i) + "," +
              std::to_string(i + 1) + "]},";
  }
  header.back() = '}';
  const std::string path = directory.put("many", file_of(header, kTensors));
  const std::int64_t memory = peak_bytes();
  const auto start = std::chrono::steady_clock::now();
  const io::SafetensorsFile file(path);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
  EXPECT_LT(peak_bytes() - memory, 32 * static_cast<std::int64_t>(header.size()));
  EXPECT_EQ(file.tensors().size(), std::size_t{kTensors});
  EXPECT_EQ(file.at("99999").str(), "U8 []");
}

struct Index {
  const char* what;
  std::string json;
  std::string refusal;
};

TEST(MalformedCheckpoint, is_refused_at_once_in_one_sentence) {
  const Directory directory;
  directory.put("1.safetensors", two("[0,8]", "[8,16]", 16));
  directory.put("2.safetensors", tensor("\"F32\"", "[2]", "[0,8]", 8));
  directory.put("3.safetensors", file_of(R"({"c":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8));
  directory.put("bad.safetensors", "123");
  const std::string index = "model.safetensors.index.json", in_index = "io: " + index;
  const auto map = [](const std::string& pairs) { return "{\"weight_map\":{" + pairs + "}}"; };
  const Index indices[] = {
      {"good", map(R"("a":"1.safetensors","b":"1.safetensors","c":"3.safetensors")"), "accepted"},
      {"empty", "", in_index + " is not valid JSON at byte 1"},
      {"cut short", R"({"weight_map":{"a":"1.safe)", in_index + " is not valid JSON at byte 27"},
      {"list", "[]", in_index + ": it has no object 'weight_map'"},
      {"no map", R"({"metadata":{}})", in_index + ": it has no object 'weight_map'"},
      {"map is a list", R"({"weight_map":[]})", in_index + ": it has no object 'weight_map'"},
      {"tensor twice", map(R"("a":"1.safetensors","a":"2.safetensors")"), in_index + " has the key 'a' twice"},
      {"file is a number", map(R"("a":1)"), in_index + ": the file of tensor 'a' is not a string"},
      {"file above", map(R"("a":"../1.safetensors")"),
       in_index + ": the file '../1.safetensors' of tensor 'a' is not a file of this directory"},
      {"file at the root", map(R"("a":"/etc/passwd")"),
       in_index + ": the file '/etc/passwd' of tensor 'a' is not a file of this directory"},
      {"file below", map(R"("a":"sub/1.safetensors")"),
       in_index + ": the file 'sub/1.safetensors' of tensor 'a' is not a file of this directory"},
      {"parent", map(R"("a":"..")"), in_index + ": the file '..' of tensor 'a' is not a file of this directory"},
      {"no name", map(R"("a":"")"), in_index + ": the file '' of tensor 'a' is not a file of this directory"},
      {"a zero byte", map(R"("a":"1.safetensors\u0000")"),
       in_index + ": the file '1.safetensors?' of tensor 'a' is not a file of this directory"},
      {"missing shard", map(R"("a":"9.safetensors")"), "io: cannot read 9.safetensors: No such file or directory"},
      {"malformed shard", map(R"("a":"bad.safetensors")"),
       "io: bad.safetensors is cut short: it has 3 bytes, and a safetensors file has at least 8"},
      {"tensor that its shard lacks", map(R"("a":"3.safetensors")"), in_index + ": tensor 'a' is not in 3.safetensors"},
      {"tensor in two shards", map(R"("a":"1.safetensors","b":"1.safetensors","x":"2.safetensors")"),
       in_index + ": tensor 'a' is in 1.safetensors and in 2.safetensors"},
      {"deep nesting", std::string(2'000'000, '['), in_index + " nests deeper than 32 levels"},
  };
  for (const Index& wrong : indices) {
    directory.put(index, wrong.json);
    const auto start = std::chrono::steady_clock::now();
    EXPECT_EQ(refusal_of(directory, [&] { io::Checkpoint{directory.path()}; }), wrong.refusal) << wrong.what;
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5)) << wrong.what;
  }
  std::filesystem::remove(directory / index);
  EXPECT_EQ(refusal_of(directory, [&] { io::Checkpoint{directory.path()}; }),
            "io: " + directory.path() + " has neither model.safetensors nor model.safetensors.index.json");
  EXPECT_EQ(refusal_of(directory, [&] { io::Checkpoint{directory / "none"}; }),
            "io: cannot read none: No such file or directory");
}

}  // namespace
}  // namespace expar
