// Event files, read back by a decoder that shares nothing with the writer.
#include "io/events.h"

#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include <expar/error.h>
#include <gtest/gtest.h>

#include "tests/directory.h"

namespace expar {
namespace {

template <class T>
T number(const std::string& bytes, std::size_t at = 0) {
  T value{};
  if (at + sizeof value > bytes.size()) throw std::runtime_error("too few bytes");
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

std::vector<double> doubles(const std::string& bytes) {
  std::vector<double> values;
  for (std::size_t at = 0; at < bytes.size(); at += sizeof(double)) values.push_back(number<double>(bytes, at));
  return values;
}

/// The fields of one message in their order: what a varint, fixed or delimited field holds, as bytes.
using Fields = std::multimap<unsigned, std::string>;

std::uint64_t take_varint(const std::string& bytes, std::size_t& at) {
  std::uint64_t value = 0;
  for (int shift = 0; shift < 64; shift += 7) {
    const auto byte = static_cast<unsigned char>(bytes.at(at++));
    value |= static_cast<std::uint64_t>(byte & 0x7f) << shift;
    if (byte < 0x80) return value;
  }
  throw std::runtime_error("a varint without an end");
}

Fields decode(const std::string& bytes) {
  Fields fields;
  for (std::size_t at = 0; at < bytes.size();) {
    const std::uint64_t key = take_varint(bytes, at);
    std::size_t length = 0;
    if ((key & 7) == 0) {
      const std::uint64_t value = take_varint(bytes, at);
      std::string raw(sizeof value, '\0');
      std::memcpy(raw.data(), &value, sizeof value);
      fields.emplace(key >> 3, raw);
      continue;
    }
    if ((key & 7) == 1) length = 8;
    if ((key & 7) == 2) length = take_varint(bytes, at);
    if ((key & 7) == 5) length = 4;
    if (length > bytes.size() - at) throw std::runtime_error("a field beyond the end");
    fields.emplace(key >> 3, bytes.substr(at, length));
    at += length;
  }
  return fields;
}

std::string only(const Fields& fields, unsigned field) {
  EXPECT_EQ(fields.count(field), 1u) << "field " << field;
  return fields.count(field) == 0 ? std::string() : fields.find(field)->second;
}

std::uint32_t unmasked(std::uint32_t masked) {
  const std::uint32_t rotated = masked - 0xa282ead8U;
  return rotated >> 17 | rotated << 15;
}

/// The records of a file, whose checksums hold.
std::vector<std::string> records(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes(std::istreambuf_iterator<char>(file), {});
  std::vector<std::string> all;
  for (std::size_t at = 0; at < bytes.size();) {
    const auto length = number<std::uint64_t>(bytes, at);
    EXPECT_EQ(unmasked(number<std::uint32_t>(bytes, at + 8)), io::crc32c(bytes.substr(at, 8)));
    all.push_back(bytes.substr(at + 12, length));
    EXPECT_EQ(unmasked(number<std::uint32_t>(bytes, at + 12 + length)), io::crc32c(all.back()));
    at += 16 + length;
  }
  return all;
}

class Events : public InDirectory {
 protected:
  std::string refusal(const std::string& directory) const {
    try {
      io::prepare_log_directory(directory);
    } catch (const Error& error) {
      return std::string(name(error.code())) + ": " + error.message();
    }
    return "accepted";
  }
};

TEST(Crc32c, gives_the_known_values_of_rfc_3720) {
  EXPECT_EQ(io::crc32c(""), 0u);
  EXPECT_EQ(io::crc32c("123456789"), 0xe3069283u);
  EXPECT_EQ(io::crc32c(std::string(32, '\0')), 0x8a9136aau);
  EXPECT_EQ(io::crc32c(std::string(32, '\xff')), 0x62a8ab43u);
  std::string ascending;
  for (char c = 0; c < 32; ++c) ascending += c;
  EXPECT_EQ(io::crc32c(ascending), 0x46dd794eu);
}

TEST_F(Events, begin_with_their_version) {
  const io::EventWriter writer(directory_ + "/made/for/it");
  const auto all = records(writer.path());
  ASSERT_EQ(all.size(), 1u);
  const Fields event = decode(all[0]);
  EXPECT_EQ(only(event, 3), "brain.Event:2");
  const double now = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  EXPECT_NEAR(number<double>(only(event, 1)), now, 60);
  EXPECT_EQ(std::filesystem::path(writer.path()).filename().string().rfind("events.out.tfevents.", 0), 0u);
}

TEST_F(Events, are_on_file_as_soon_as_they_are_written) {
  io::EventWriter writer(directory_);
  io::Summary summary;
  summary.scalar("loss", 5.545177F);
  summary.scalar(std::string(300, 'n'), -0.25F);
  writer.write(std::int64_t{1} << 40, summary);
  const auto all = records(writer.path());
  ASSERT_EQ(all.size(), 2u);
  const Fields event = decode(all[1]);
  EXPECT_EQ(number<std::int64_t>(only(event, 2)), std::int64_t{1} << 40);
  const Fields values = decode(only(event, 5));
  ASSERT_EQ(values.count(1), 2u);
  const Fields first = decode(values.begin()->second);
  EXPECT_EQ(only(first, 1), "loss");
  EXPECT_EQ(number<float>(only(first, 2)), 5.545177F);
  const Fields second = decode(std::next(values.begin())->second);
  EXPECT_EQ(only(second, 1), std::string(300, 'n'));
  EXPECT_EQ(number<float>(only(second, 2)), -0.25F);
}

TEST_F(Events, count_how_often_each_number_came) {
  io::EventWriter writer(directory_);
  io::Summary summary;
  summary.histogram("load", io::histogram_of_counts(std::vector<std::int64_t>{7, 0, 2, 1}));
  writer.write(3, summary);
  const Fields value = decode(only(decode(only(decode(records(writer.path()).at(1)), 5)), 1));
  EXPECT_EQ(only(value, 1), "load");
  EXPECT_EQ(value.count(2), 0u);
  const Fields histogram = decode(only(value, 5));
  EXPECT_EQ(number<double>(only(histogram, 1)), 0);
  EXPECT_EQ(number<double>(only(histogram, 2)), 4);
  EXPECT_EQ(number<double>(only(histogram, 3)), 10);
  EXPECT_EQ(number<double>(only(histogram, 4)), 7);
  EXPECT_EQ(number<double>(only(histogram, 5)), 17);
  EXPECT_EQ(doubles(only(histogram, 6)), (std::vector<double>{1, 2, 3, 4}));
  EXPECT_EQ(doubles(only(histogram, 7)), (std::vector<double>{7, 0, 2, 1}));
}

TEST_F(Events, of_two_writers_are_in_two_files) {
  const io::EventWriter one(directory_), other(directory_);
  EXPECT_NE(one.path(), other.path());
  EXPECT_EQ(records(one.path()).size(), 1u);
  EXPECT_EQ(records(other.path()).size(), 1u);
}

TEST_F(Events, go_nowhere_where_no_directory_can_be) {
  const std::string file = directory_ + "/file";
  std::ofstream(file) << "text";
  EXPECT_EQ(refusal(file), "io: cannot make the directory " + file + ": Not a directory");
  EXPECT_EQ(refusal(file + "/below"), "io: cannot make the directory " + file + "/below: Not a directory");
  EXPECT_EQ(refusal("/proc/expar"), "io: cannot make the directory /proc/expar: No such file or directory");
  EXPECT_EQ(refusal("/proc/self").rfind("io: cannot write in /proc/self: ", 0), 0u) << refusal("/proc/self");
  EXPECT_EQ(refusal(directory_ + "/new"), "accepted");
  EXPECT_TRUE(std::filesystem::is_empty(directory_ + "/new")) << "a trial leaves nothing";
}

TEST_F(Events, that_do_not_fit_are_an_error_with_the_path) {
  io::EventWriter writer(directory_);
  io::Summary summary;
  summary.scalar("loss", 1);
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit little{.rlim_cur = 64, .rlim_max = before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &little), 0);
  std::string message;
  try {
    writer.write(1, summary);
    writer.write(2, summary);
  } catch (const Error& error) {
    message = std::string(name(error.code())) + ": " + error.message();
  }
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(message, "io: cannot write " + writer.path() + ": File too large");
}

}  // namespace
}  // namespace expar
