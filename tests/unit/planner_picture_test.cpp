// The picture of a plan: words and lines that do not lie on each other.
#include <algorithm>
#include <array>
#include <map>
#include <regex>
#include <sstream>
#include <string>
#include <vector>

#include <expar/expar.h>
#include <gtest/gtest.h>

#include "planner/picture.h"
#include "planner/planner.h"
#include "tests/unit/planner_testing.h"

namespace expar::planner {
namespace {

struct Box {
  double left, right, top, bottom;
  std::string words;
};

/// Where the words of a picture stand, letters taken as wide as they are on average in a wide font.
std::vector<Box> words_of(const std::string& svg) {
  std::map<std::string, double> sizes = {{"title", 30}, {"sub", 18},  {"axis", 17}, {"tick", 16},
                                         {"value", 16}, {"name", 18}, {"mark", 19}};
  std::vector<Box> boxes;
  const std::regex pattern(
      R"re(<text x="([^"]+)" y="([^"]+)" class="(\w+)[^"]*" text-anchor="(\w+)">([^<]*)</text>)re");
  for (std::sregex_iterator match(svg.begin(), svg.end(), pattern), end; match != end; ++match) {
    const double size = sizes.at((*match)[3]);
    const std::string words = (*match)[5];
    const double width = 0.55 * size * static_cast<double>(words.size());
    const std::string anchor = (*match)[4];
    const double x = std::stod((*match)[1]) - (anchor == "end" ? width : anchor == "middle" ? width / 2 : 0);
    const double y = std::stod((*match)[2]);
    boxes.push_back({x, x + width, y - 0.75 * size, y + 0.22 * size, words});
  }
  return boxes;
}

/// Points along the lines of a picture.
std::vector<std::array<double, 2>> ink_of(const std::string& svg) {
  std::vector<std::array<double, 2>> points;
  const std::regex path(R"re(<path class="line[^"]*" d="M([^"HV]+)"/>)re");
  for (std::sregex_iterator match(svg.begin(), svg.end(), path), end; match != end; ++match) {
    std::string corners = (*match)[1];
    std::replace(corners.begin(), corners.end(), 'L', ' ');
    std::istringstream numbers(corners);
    double x = 0, y = 0, to_x = 0, to_y = 0;
    numbers >> x >> y;
    while (numbers >> to_x >> to_y) {
      for (int i = 0; i <= 100; ++i) points.push_back({x + (to_x - x) * i / 100, y + (to_y - y) * i / 100});
      x = to_x;
      y = to_y;
    }
  }
  return points;
}

void expect_readable(const Question& question) {
  const Answer answer = plan(question);
  const std::string svg = picture(question, answer, "ranks & tokens");
  EXPECT_EQ(svg.find("nan"), std::string::npos);
  EXPECT_EQ(svg.find("inf"), std::string::npos);
  EXPECT_NE(svg.find(">ranks &amp; tokens<"), std::string::npos);
  const std::string crossing =
      answer.crossover ? ">crossover at top-k " + std::to_string(*answer.crossover) + "<" : ">no crossover";
  EXPECT_NE(svg.find(crossing), std::string::npos);
  const std::vector<Box> boxes = words_of(svg);
  ASSERT_GT(boxes.size(), 10u);
  const auto ink = ink_of(svg);
  ASSERT_GT(ink.size(), 300u);
  for (std::size_t i = 0; i < boxes.size(); ++i) {
    const Box& a = boxes[i];
    const bool crossed = std::any_of(ink.begin(), ink.end(), [&](const auto& point) {
      return point[0] > a.left && point[0] < a.right && point[1] > a.top && point[1] < a.bottom;
    });
    EXPECT_FALSE(crossed) << "a line crosses '" << a.words << "'";
    EXPECT_TRUE(a.left >= 0 && a.right <= 1280 && a.top >= 0 && a.bottom <= 720) << a.words << " leaves the picture";
    for (std::size_t j = 0; j < i; ++j) {
      const Box& b = boxes[j];
      const bool apart = a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
      EXPECT_TRUE(apart) << "'" << a.words << "' lies on '" << b.words << "'";
    }
  }
}

TEST(Planner, draws_words_that_do_not_lie_on_each_other) {
  for (const int ranks : {2, 3, 8, 64}) {
    for (const std::int64_t experts : {2, 8, 64, 256}) {
      for (const std::int64_t topk : {1, 2, 8, 60, 256}) {
        if (topk > experts) continue;
        for (const std::int64_t tokens : {std::int64_t{1}, std::int64_t{99999}}) {
          SCOPED_TRACE(testing::Message() << ranks << " ranks, " << topk << " of " << experts);
          expect_readable(question_of({{"ep", ranks}}, 0, experts, topk, tokens));
        }
      }
    }
  }
  Question routed = question_of({{"ep", 4}}, 0, 11, 5);
  draw_ids(routed);
  expect_readable(routed);
}

TEST(Planner, shows_bytes_in_three_digits) {
  EXPECT_EQ(shown_bytes(0), "0 B");
  EXPECT_EQ(shown_bytes(999), "999 B");
  EXPECT_EQ(shown_bytes(999.6), "1.00 KB");
  EXPECT_EQ(shown_bytes(9996), "10.0 KB");
  EXPECT_EQ(shown_bytes(123456), "123 KB");
  EXPECT_EQ(shown_bytes(7.34e6), "7.34 MB");
  EXPECT_EQ(shown_bytes(5.4e15), "5400 TB");
}

}  // namespace
}  // namespace expar::planner
