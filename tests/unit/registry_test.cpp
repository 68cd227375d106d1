// Transports by name: which there are, what their ranks are, and what is said of those that do not work here.
#include <algorithm>
#include <string>

#include <expar/registry.h>
#include <gtest/gtest.h>

#include "tests/error_of.h"

namespace expar {
namespace {

using test::error_of;

TEST(Transports, are_known_whether_they_work_here_or_not) {
  const auto available = available_transports();
  const auto works = [&](const std::string& name) {
    return std::find(available.begin(), available.end(), name) != available.end();
  };
  EXPECT_TRUE(works("threads"));
  std::size_t working = 0;
  for (const std::string& name : known_transports()) {
    if (works(name)) {
      EXPECT_NO_THROW(has_processes(name)) << name;
      ++working;
      continue;
    }
    const Error error = error_of([&] { has_processes(name); });
    EXPECT_EQ(error.code(), ErrorCode::unsupported);
    EXPECT_EQ(error.message().find("there is no transport \"" + name + "\" here: "), 0U) << error.what();
    EXPECT_NE(error.message().find("; there are threads"), std::string::npos) << error.what();
  }
  EXPECT_EQ(working, available.size());
}

TEST(Transports, of_unknown_names_are_refused_with_those_that_there_are) {
  for (const auto& run : {+[] { has_processes("pigeons"); }, +[] { run_threads(1, {}, {.transport = "pigeons"}); },
                          +[] { join({}, {.transport = "pigeons"}); }}) {
    const Error error = error_of(run);
    EXPECT_EQ(error.code(), ErrorCode::unsupported);
    EXPECT_EQ(error.message().find("there is no transport \"pigeons\" here: "), 0U) << error.what();
  }
}

TEST(Transports, have_ranks_of_one_kind) {
  EXPECT_FALSE(has_processes("threads"));
  EXPECT_EQ(error_of([] { join({}, {.transport = "threads"}); }).message(),
            "the ranks of transport \"threads\" are threads, which run_threads() starts");
  for (const std::string& name : available_transports()) {
    if (!has_processes(name)) continue;
    EXPECT_EQ(error_of([&] { run_threads(1, {}, {.transport = name}); }).message(),
              "the ranks of transport \"" + name + "\" are processes, which join() connects");
    EXPECT_EQ(join({}, {.transport = name}).transport_name(), name);
  }
}

TEST(Transports, carry_the_ranks_that_ask_for_them) {
  run_threads(2, [](const Communicator& communicator) { EXPECT_EQ(communicator.transport_name(), "threads"); },
              {.transport = "threads"});
}

}  // namespace
}  // namespace expar
