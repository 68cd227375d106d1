// safetensors: what is written is read, as bytes; slices; shards; atomic replacement.
#include "io/safetensors.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <csignal>
#include <cstring>
#include <vector>

#include "safetensors_testing.h"

namespace expar {
namespace {

/// An array of the dtype with every byte pattern that its size has room for, NaNs included.
Array patterns(DType dtype, Shape shape) {
  Array array(dtype, shape);
  for (std::size_t i = 0; i < array.view().byte_size(); ++i) {
    array.view().bytes()[i] = static_cast<std::byte>(i * 37 + i / 256);
  }
  return array;
}

std::string bytes_of(ConstTensor t) { return {reinterpret_cast<const char*>(t.bytes()), t.byte_size()}; }

constexpr DType kAll[] = {DType::f32,      DType::bf16,     DType::f16,   DType::int8, DType::fp8_e4m3,
                          DType::fp8_e5m2, DType::fp8_e8m0, DType::int32, DType::int64};

TEST(Safetensors, come_back_as_the_same_bytes_in_every_dtype_and_shape) {
  const Directory directory;
  std::vector<Array> arrays;
  std::vector<io::NamedTensor> tensors;
  for (const DType dtype : kAll) {
    for (const Shape& shape :
         {Shape{}, Shape{1}, Shape{7}, Shape{0, 5}, Shape{3, 5}, Shape{2, 3, 5}, Shape{2, 1, 3, 5}}) {
      arrays.push_back(patterns(dtype, shape));
      tensors.push_back({std::string(name(dtype)) + shape.str(), arrays.back()});
    }
  }
  const io::Metadata metadata = {{"format", "pt"}, {"quote \" and \\ and \n", "ü 專家"}};
  io::write_safetensors(directory / "a.safetensors", tensors, metadata);

  const io::SafetensorsFile file(directory / "a.safetensors");
  EXPECT_EQ(file.metadata(), metadata);
  ASSERT_EQ(file.tensors().size(), tensors.size());
  for (const io::NamedTensor& tensor : tensors) {
    const io::StoredTensor& stored = file.at(tensor.name);
    EXPECT_EQ(stored.view().dtype(), tensor.value.dtype());
    EXPECT_EQ(stored.view().shape(), tensor.value.shape());
    EXPECT_EQ(bytes_of(stored.view()), bytes_of(tensor.value)) << tensor.name;
    EXPECT_EQ(bytes_of(stored.read()), bytes_of(tensor.value)) << tensor.name;
  }
}

TEST(Safetensors, are_the_same_bytes_in_whatever_order_they_are_given) {
  const Directory directory;
  const Array a = patterns(DType::f32, {3}), b = patterns(DType::int8, {3}), c = patterns(DType::f32, {2, 2});
  const io::NamedTensor one_order[] = {{"a", a}, {"b", b}, {"c", c}}, another[] = {{"c", c}, {"b", b}, {"a", a}};
  io::write_safetensors(directory / "1", one_order);
  io::write_safetensors(directory / "2", another);
  EXPECT_EQ(directory.get("1"), directory.get("2"));
}

TEST(Safetensors, hold_one_header_padded_to_eight_bytes_and_then_the_data) {
  const Directory directory;
  const Array a = patterns(DType::int8, {3}), b = patterns(DType::f32, {1, 2});
  const io::NamedTensor tensors[] = {{"a", a}, {"b", b}};
  io::write_safetensors(directory / "file", tensors, {{"k", "v"}});
  const std::string header = R"({"__metadata__":{"k":"v"},"b":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},)"
                             R"("a":{"dtype":"I8","shape":[3],"data_offsets":[8,11]}})"
                             "  ";
  ASSERT_EQ(header.size() % 8, 0U);
  EXPECT_EQ(directory.get("file"), file_of(header, 0) + bytes_of(b) + bytes_of(a));
}

TEST(Safetensors, give_rows_in_the_dtype_that_is_asked_for) {
  const Directory directory;
  Array values(DType::bf16, {5, 2});
  for (int i = 0; i < 10; ++i) values.as<bf16>()[i] = bf16(static_cast<float>(i) + 0.5F);
  const io::NamedTensor tensors[] = {{"v", values}};
  io::write_safetensors(directory / "file", tensors);
  const io::SafetensorsFile file(directory / "file");
  const io::StoredTensor& v = file.at("v");

  Array rows(DType::f32, {2, 2});
  v.read_rows(3, rows);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(rows.as<float>()[i], static_cast<float>(6 + i) + 0.5F);
  Array same(DType::bf16, {1, 2});
  v.read_rows(4, same);
  EXPECT_EQ(bytes_of(same), bytes_of(values.view().rows(4, 1)));
  Array half(DType::f16, {5, 2});
  v.read_rows(0, half);
  for (int i = 0; i < 10; ++i) EXPECT_EQ(static_cast<float>(half.as<f16>()[i]), static_cast<float>(i) + 0.5F);
  EXPECT_EQ(bytes_of(v.view().rows(1, 2)), bytes_of(values.view().rows(1, 2)));

  const auto refused = [&](std::int64_t first, Tensor out) {
    return refusal_of(directory, [&] { v.read_rows(first, out); });
  };
  EXPECT_EQ(refused(4, rows), "bad_argument: file: tensor 'v' is BF16 [5, 2] and has no 2 rows from row 4");
  EXPECT_EQ(refused(-1, rows), "bad_argument: file: tensor 'v' is BF16 [5, 2] and has no 2 rows from row -1");
  EXPECT_EQ(refused(0, Array(DType::f32, {2, 3})),
            "bad_argument: file: tensor 'v' is BF16 [5, 2], whose rows do not fit [2, 3]");
  EXPECT_EQ(refused(0, Array(DType::int32, {2, 2})),
            "bad_argument: file: tensor 'v' is BF16 and cannot be read as int32");
}

TEST(Safetensors, convert_rows_beyond_one_piece) {
  const Directory directory;
  constexpr std::int64_t kRows = 300'001;  // more than are converted at once
  Array values(DType::f16, {kRows, 1});
  for (std::int64_t i = 0; i < kRows; ++i) values.as<f16>()[i] = f16(static_cast<float>(i % 2039));
  const io::NamedTensor tensors[] = {{"v", values}};
  io::write_safetensors(directory / "file", tensors);
  const io::SafetensorsFile file(directory / "file");
  Array rows(DType::f32, {kRows - 1, 1});
  file.at("v").read_rows(1, rows);
  for (std::int64_t i = 0; i < kRows - 1; ++i) {
    ASSERT_EQ(rows.as<float>()[i], static_cast<float>((i + 1) % 2039)) << i;
  }
}

TEST(Safetensors, of_dtypes_that_expar_has_not_can_be_seen_but_not_used) {
  const Directory directory;
  const std::string path =
      directory.put("file", file_of(R"({"d":{"dtype":"F64","shape":[2],"data_offsets":[0,16]},)"
                                    R"("f":{"dtype":"F4","shape":[4],"data_offsets":[16,18]},)"
                                    R"("r":{"dtype":"I8","shape":[1,1,1,1,2],"data_offsets":[18,20]},)"
                                    R"("w":{"dtype":"F32","shape":[1],"data_offsets":[20,24]},)"
                                    R"("z":{"dtype":"I8","shape":[0,4611686018427387904],"data_offsets":[24,24]}})",
                                    24));
  const io::SafetensorsFile file(path);
  EXPECT_EQ(file.at("d").str(), "F64 [2]");
  EXPECT_EQ(file.at("f").bytes().size(), 2U);
  const auto refused = [&](const char* tensor) { return refusal_of(directory, [&] { (void)file.at(tensor).view(); }); };
  EXPECT_EQ(
      refused("d"),
      "unsupported: file: tensor 'd' is F64; expar uses F32, BF16, F16, F8_E4M3, F8_E5M2, F8_E8M0, I8, I32 and I64");
  EXPECT_EQ(
      refused("f"),
      "unsupported: file: tensor 'f' is F4; expar uses F32, BF16, F16, F8_E4M3, F8_E5M2, F8_E8M0, I8, I32 and I64");
  EXPECT_EQ(refused("r"), "unsupported: file: tensor 'r' has 5 axes; expar uses up to 4");
  EXPECT_EQ(refused("z"),
            "unsupported: file: tensor 'z' is I8 [0, 4611686018427387904], whose extents are beyond what expar can "
            "address");
  EXPECT_EQ(refused("nothing"), "io: file has no tensor 'nothing'");
}

TEST(Safetensors, that_are_not_aligned_are_copied) {
  const Directory directory;
  const std::string path = directory.put("file", file_of(R"({"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]},)"
                                                         R"("w":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}})",
                                                         5));
  const io::SafetensorsFile file(path);
  EXPECT_EQ(bytes_of(file.at("w").read()), "xxxx");
  const std::string refused = refusal_of(directory, [&] { (void)file.at("w").view(); });
  EXPECT_TRUE(refused.starts_with("unsupported: file: tensor 'w' begins at byte ")) << refused;
}

TEST(Safetensors, can_be_written_in_pieces) {
  const Directory directory;
  const Array a = patterns(DType::f32, {5, 3}), b = patterns(DType::bf16, {2});
  const io::TensorSpec specs[] = {{"a", DType::f32, {5, 3}}, {"b", DType::bf16, {2}}, {"empty", DType::f32, {0, 3}}};
  io::SafetensorsWriter writer(directory / "file", specs);
  writer.write("a", a.view().rows(0, 2));
  writer.write("b", b);
  writer.write("a", a.view().rows(2, 1));
  EXPECT_EQ(refusal_of(directory, [&] { writer.commit(); }), "bad_argument: file: tensor 'a' still lacks 24 bytes");
  writer.write("a", a.view().rows(3, 2));
  EXPECT_EQ(refusal_of(directory, [&] { writer.write("a", a.view().rows(0, 1)); }),
            "bad_argument: file: tensor 'a' is to be f32 [5, 3]; f32 [1, 3] is more than it lacks");
  EXPECT_EQ(refusal_of(directory, [&] { writer.write("b", a); }),
            "bad_argument: file: tensor 'b' is to be bf16 [2]; f32 [5, 3] does not fit");
  EXPECT_EQ(refusal_of(directory, [&] { writer.write("c", a); }), "bad_argument: file was not to hold a tensor 'c'");
  EXPECT_FALSE(std::filesystem::exists(directory / "file"));
  writer.commit();
  const io::SafetensorsFile file(directory / "file");
  EXPECT_EQ(bytes_of(file.at("a").view()), bytes_of(a));
  EXPECT_EQ(bytes_of(file.at("b").view()), bytes_of(b));
}

TEST(Safetensors, refuse_to_write_what_could_not_be_read) {
  const Directory directory;
  const Array a = patterns(DType::f32, {1});
  const auto refused = [&](const std::vector<io::NamedTensor>& tensors, const io::Metadata& metadata = {}) {
    return refusal_of(directory, [&] { io::write_safetensors(directory / "file", tensors, metadata); });
  };
  EXPECT_EQ(refused({{"a", a}, {"a", a}}), "bad_argument: file was to hold tensor 'a' twice");
  EXPECT_EQ(refused({{"", a}}), "bad_argument: a tensor cannot be called ''");
  EXPECT_EQ(refused({{"__metadata__", a}}), "bad_argument: a tensor cannot be called '__metadata__'");
  EXPECT_EQ(refused({{"\xff", a}}), "bad_argument: the name of a tensor is not UTF-8, which safetensors needs");
  EXPECT_EQ(refused({{"a", a}}, {{"k", "\xc0\x80"}}),
            "bad_argument: the value of 'k' in the metadata is not UTF-8, which safetensors needs");
  EXPECT_EQ(directory.count(), 0U);
}

TEST(AtomicFile, leaves_the_former_file_as_it_was_until_it_is_complete) {
  const Directory directory;
  directory.put("file", "former");
  {
    io::AtomicFile file(directory / "file");
    file.write(0, std::as_bytes(std::span("half", 4)));
    EXPECT_EQ(directory.get("file"), "former");
  }
  EXPECT_EQ(directory.get("file"), "former");
  EXPECT_EQ(directory.count(), 1U);
  io::write_text(directory / "file", "new");
  EXPECT_EQ(directory.get("file"), "new");
  EXPECT_EQ(directory.count(), 1U);
}

/// What a child says that ran `action` and was not killed.
std::string said_by_child(const Directory& directory, const std::function<void()>& action) {
  const pid_t child = fork();
  if (child == 0) {
    directory.put("said", refusal_of(directory, action));
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) ? "killed" : directory.get("said");
}

TEST(AtomicFile, leaves_the_former_file_as_it_was_when_the_disk_is_full) {
  const Directory directory;
  directory.put("file", "former");
  const Array big = patterns(DType::f32, {1 << 18});
  const std::string said = said_by_child(directory, [&] {
    // What a full disk does to write(), a limit does without a disk.
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {100'000, 100'000};
    setrlimit(RLIMIT_FSIZE, &limit);
    const io::NamedTensor tensors[] = {{"big", big}};
    io::write_safetensors(directory / "file", tensors);
  });
  EXPECT_EQ(said, "io: cannot write file: File too large");
  EXPECT_EQ(directory.get("file"), "former");
  EXPECT_FALSE(std::filesystem::exists(directory / "file.partial"));
}

TEST(AtomicFile, leaves_the_former_file_as_it_was_when_its_writer_is_killed) {
  const Directory directory;
  directory.put("file", "former");
  EXPECT_EQ(said_by_child(directory,
                          [&] {
                            io::AtomicFile file(directory / "file");
                            file.write(0, std::as_bytes(std::span("a long beginning", 16)));
                            raise(SIGKILL);
                          }),
            "killed");
  EXPECT_EQ(directory.get("file"), "former");
  io::write_text(directory / "file", "new");
  EXPECT_EQ(directory.get("file"), "new");
  EXPECT_EQ(directory.count(), 1U) << "what the killed writer left is taken over";
}

TEST(AtomicFile, has_one_writer_at_a_time) {
  const Directory directory;
  io::AtomicFile file(directory / "file");
  EXPECT_EQ(refusal_of(directory, [&] { io::write_text(directory / "file", "other"); }),
            "io: cannot write file: another process is writing it");
  file.write(0, std::as_bytes(std::span("mine", 4)));
  file.commit();
  EXPECT_EQ(directory.get("file"), "mine");
}

TEST(AtomicFile, replaces_files_only_and_keeps_links) {
  const Directory directory;
  EXPECT_EQ(refusal_of(directory, [&] { io::write_text(directory / "no/file", ""); }),
            "io: cannot write no/file: No such file or directory");
  std::filesystem::create_directory(directory / "folder");
  EXPECT_EQ(refusal_of(directory, [&] { io::write_text(directory / "folder", ""); }),
            "io: folder is not a regular file");
  EXPECT_EQ(refusal_of(directory, [&] { io::write_text("/dev/null", ""); }), "io: /dev/null is not a regular file");
  directory.put("target", "former");
  std::filesystem::create_symlink("target", directory / "link");
  io::write_text(directory / "link", "new");
  EXPECT_TRUE(std::filesystem::is_symlink(directory / "link"));
  EXPECT_EQ(directory.get("target"), "new");
}

TEST(MappedFile, is_refused_where_it_is_none) {
  const Directory directory;
  EXPECT_EQ(refusal_of(directory, [&] { io::MappedFile(directory / "none"); }),
            "io: cannot read none: No such file or directory");
  ASSERT_EQ(mkfifo((directory / "pipe").c_str(), 0600), 0);
  EXPECT_EQ(refusal_of(directory, [&] { io::MappedFile(directory / "pipe"); }), "io: pipe is not a regular file");
  EXPECT_EQ(refusal_of(directory, [&] { io::MappedFile(directory.path()); }),
            "io: " + directory.path() + " is not a regular file");
  directory.put("text", "12345");
  EXPECT_EQ(refusal_of(directory, [&] { io::read_text(directory / "text", 4); }),
            "io: text has 5 bytes, more than the 4 that such a file may have");
}

TEST(MappedFile, says_so_when_it_was_cut_short_meanwhile) {
  const Directory directory;
  const io::MappedFile file(directory.put("file", std::string(10'000, 'x')));
  std::filesystem::resize_file(directory / "file", 5'000);
  std::vector<std::byte> bytes(6'000);
  EXPECT_EQ(refusal_of(directory, [&] { file.read(0, bytes); }), "io: file was cut short while it was being read");
}

TEST(Checkpoint, is_one_file_or_the_shards_of_an_index) {
  const Directory directory;
  const Array a = patterns(DType::f32, {2}), b = patterns(DType::bf16, {3});
  const io::NamedTensor first[] = {{"a", a}}, second[] = {{"b", b}}, both[] = {{"a", a}, {"b", b}};
  io::write_safetensors(directory / "model-00001-of-00002.safetensors", first);
  io::write_safetensors(directory / "model-00002-of-00002.safetensors", second);
  directory.put("model.safetensors.index.json",
                R"({"metadata": {"total_size": 14}, "weight_map": {"a": "model-00001-of-00002.safetensors",)"
                R"( "b": "model-00002-of-00002.safetensors"}})");
  const io::Checkpoint sharded(directory.path());
  EXPECT_EQ(sharded.files().size(), 2U);
  EXPECT_EQ(bytes_of(sharded.at("a").view()), bytes_of(a));
  EXPECT_EQ(bytes_of(sharded.at("b").view()), bytes_of(b));
  EXPECT_EQ(sharded.find("c"), nullptr);
  EXPECT_EQ(refusal_of(directory, [&] { (void)sharded.at("c"); }), "io: " + directory.path() + " has no tensor 'c'");

  io::write_safetensors(directory / "model.safetensors", both);
  const io::Checkpoint single(directory.path()), file(directory / "model.safetensors");
  for (const io::Checkpoint* checkpoint : {&single, &file}) {
    EXPECT_EQ(checkpoint->files().size(), 1U);
    EXPECT_EQ(bytes_of(checkpoint->at("b").view()), bytes_of(b));
    EXPECT_EQ(refusal_of(directory, [&] { (void)checkpoint->at("c"); }), "io: model.safetensors has no tensor 'c'");
  }
}

}  // namespace
}  // namespace expar
