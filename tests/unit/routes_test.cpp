// Recorded routing: what is read back, and what is refused.
#include <zlib.h>

#include <filesystem>
#include <string>

#include <expar/error.h>
#include <gtest/gtest.h>

#include "io/routes.h"

namespace expar {
namespace {

class Routes : public testing::Test {
 protected:
  void TearDown() override { std::filesystem::remove(path_); }

  void write(const std::string& text) const {
    const gzFile file = gzopen(path_.c_str(), "wb");
    gzwrite(file, text.data(), static_cast<unsigned>(text.size()));
    gzclose(file);
  }

  std::string refusal(std::int64_t layer = 0) const {
    try {
      io::read_routes(path_, layer);
    } catch (const Error& error) {
      return std::string(name(error.code())) + ": " + error.message();
    }
    return "accepted";
  }

  const std::string path_ = testing::TempDir() + "routes_test_" + std::to_string(getpid()) + ".gz";
  const std::string header_ = R"({"layers": 2, "tokens": 3, "top_k": 2, "experts": 5})"
                              "\n";
};

TEST_F(Routes, come_back_as_they_were_written) {
  write(header_ + std::string("\0\1\2\3\4\0", 6) + std::string("\4\3\2\1\0\4", 6));
  const io::Routes routes = io::read_routes(path_, 1);
  EXPECT_EQ(routes.tokens, 3);
  EXPECT_EQ(routes.topk, 2);
  EXPECT_EQ(routes.experts, 5);
  EXPECT_EQ(routes.ids, (std::vector<std::int32_t>{4, 3, 2, 1, 0, 4}));
}

TEST_F(Routes, are_refused_where_an_expert_does_not_exist) {
  write(header_ + std::string("\0\1\2\5\4\0", 6));
  EXPECT_EQ(refusal(), "bad_argument: " + path_ + ": token 1 has expert 5, not below 5");
}

TEST_F(Routes, are_refused_where_the_file_is_cut_short) {
  write(header_ + std::string("\0\1\2", 3));
  EXPECT_EQ(refusal(), "io: " + path_ + " is cut short or damaged");
  EXPECT_EQ(refusal(1), "io: " + path_ + " is cut short or damaged");
}

TEST_F(Routes, are_refused_where_the_header_is_none) {
  write("no json\n");
  EXPECT_EQ(refusal(), "bad_argument: " + path_ + " does not begin with a line of JSON");
  write("{\"layers\": 2, \"tokens\": -3, \"top_k\": 2, \"experts\": 5}\n");
  EXPECT_EQ(refusal(), "bad_argument: " + path_ + ": its header has no whole number 'tokens' from 1");
  write("{\"layers\": 2, \"tokens\": 3, \"top_k\": 6, \"experts\": 5}\n");
  EXPECT_EQ(refusal(), "bad_argument: " + path_ + ": 6 of 5 experts do not fit this format");
}

TEST_F(Routes, have_only_the_layers_of_their_file) {
  write(header_);
  EXPECT_EQ(refusal(2), "bad_argument: " + path_ + " has no layer 2, only 0 to 1");
  EXPECT_EQ(refusal(-1), "bad_argument: " + path_ + " has no layer -1, only 0 to 1");
}

TEST_F(Routes, are_refused_where_there_is_no_file) {
  EXPECT_EQ(refusal(), "io: cannot read " + path_ + ": No such file or directory");
}

}  // namespace
}  // namespace expar
