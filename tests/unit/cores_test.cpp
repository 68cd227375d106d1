// How many cores a process has: those it may run on, and no more than its control groups pay for.
#include <expar/context.h>
#include <expar/registry.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "src/util/cores.h"
#include "tests/directory.h"

namespace expar {
namespace {

class Machine {
 public:
  explicit Machine(const std::string& group) { put("proc/self/cgroup", "1:cpu:/old\n0::" + group + "\n"); }
  Machine& quota(const std::string& group, const std::string& text) {
    put("sys/fs/cgroup" + group + "/cpu.max", text + "\n");
    return *this;
  }
  int usable(int allowed) const { return Cores{.allowed = allowed, .quota = core_quota(files_.path())}.usable(); }

 private:
  void put(const std::string& name, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(files_ / name).parent_path());
    files_.put(name, text);
  }
  const Directory files_;
};

TEST(Cores, are_those_of_the_quota) {
  EXPECT_EQ(Machine("/job").quota("/job", "300000 100000").usable(8), 3);
  EXPECT_EQ(Machine("/job").quota("/job", "150000 100000").usable(8), 2) << "a part of a core counts as one";
  EXPECT_EQ(Machine("/job").quota("/job", "1000 100000").usable(8), 1);
  EXPECT_EQ(Machine("/job").quota("/job", "900000 100000").usable(8), 8) << "no more than it may run on";
}

TEST(Cores, are_those_of_the_narrowest_group) {
  EXPECT_EQ(Machine("/a/b").quota("/a/b", "max 100000").quota("/a", "200000 100000").usable(8), 2);
  EXPECT_EQ(Machine("/a/b").quota("/a/b", "300000 100000").quota("/a", "500000 100000").usable(8), 3);
  EXPECT_EQ(Machine("/of/the/host").quota("", "400000 100000").usable(8), 4) << "a container sees its own as the root";
  EXPECT_EQ(Machine("/").quota("", "400000 100000").usable(8), 4);
}

TEST(Cores, are_all_where_there_is_no_quota) {
  EXPECT_EQ(Machine("/job").usable(8), 8);
  EXPECT_EQ(Machine("/job").quota("/job", "max 100000").quota("", "max 100000").usable(8), 8);
  EXPECT_TRUE(std::isinf(core_quota("/nowhere")));
}

TEST(Cores, are_shared_by_the_threads_of_all_ranks) {
  const int usable = available_cores().usable();
  EXPECT_LE(usable, available_cores().allowed);
  for (const int ranks : {1, 2}) {
    run_threads(ranks, [&](const Communicator& communicator) {
      EXPECT_EQ(Context(communicator).pool().threads(), std::max(1, usable / ranks));
    });
  }
}

}  // namespace
}  // namespace expar
