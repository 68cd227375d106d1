// Meshes: coordinates, the groups along dims, and what is refused.
#include <gtest/gtest.h>

#include <expar/collectives.h>
#include <expar/mesh.h>
#include <expar/parallel.h>

#include "tests/contract/routes.h"
#include "tests/contract/ways.h"

namespace expar::test {
namespace {

void require_same(const std::string& got, const std::string& wanted) {
  require(got == wanted, "got '" + got + "', not '" + wanted + "'");
}

/// The ranks of the job that `group` has.
std::vector<int> ranks_of(const Communicator& group) {
  std::vector<int> ranks;
  for (int r = 0; r < group.size(); ++r) ranks.push_back(group.job_rank(r));
  return ranks;
}

TEST(Mesh, groups_ranks_along_each_dim_and_along_several) {
  run({.ranks = 12}, [](const Context& context) {
    const Mesh mesh(context.communicator(), {{"dp", 2}, {"ep", 3}, {"tp", 2}});
    const int r = context.rank();
    const int dp = r / 6, ep = r / 2 % 3, tp = r % 2;
    require_equal(mesh.coordinate("dp"), dp, "dp");
    require_equal(mesh.coordinate("ep"), ep, "ep");
    require_equal(mesh.coordinate("tp"), tp, "tp");
    require_equal(mesh.coordinate("pp"), 0, "a dim that is not there");
    require_equal(mesh.size("pp"), 1, "its size");
    require(ranks_of(mesh.group("dp")) == std::vector<int>{r % 6, r % 6 + 6}, "along dp");
    require(ranks_of(mesh.group("ep")) == std::vector<int>{dp * 6 + tp, dp * 6 + tp + 2, dp * 6 + tp + 4}, "along ep");
    require(ranks_of(mesh.group("tp")) == std::vector<int>{r - tp, r - tp + 1}, "along tp");
    require_equal(mesh.group("ep").rank(), ep, "rank along ep");
    const Communicator both = mesh.join({"dp", "tp"});
    require(ranks_of(both) == std::vector<int>{ep * 2, ep * 2 + 1, ep * 2 + 6, ep * 2 + 7}, "along dp and tp");
    barrier(context.on(both));
  });
}

TEST(Mesh, refuses_what_is_no_grid_of_these_ranks) {
  run({.ranks = 4}, [](const Context& context) {
    const auto message = [&](const std::vector<MeshDim>& dims) {
      return error_of([&] { const Mesh mesh(context.communicator(), dims); }).message();
    };
    require_same(message({{"dp", 2}, {"ep", 3}}), "the mesh dp=2,ep=3 has 6 places for 4 ranks");
    require_same(message({{"ep", 0}}), "dim ep of the mesh has size 0, below 1");
    require_same(message({{"ep", 2}, {"ep", 2}}), "the mesh names dim ep twice");
    require_same(message({{"", 4}}), "dim 0 of the mesh has no name");
    require_same(message({}), "a mesh has no dims; name some, like ep=4");
    require_same(message({{"ep", 1 << 20}, {"tp", 1 << 20}, {"dp", 1 << 20}}),
                 "the mesh ep=1048576,tp=1048576,dp=1048576 has 2147483648 places for 4 ranks");
    const std::string disagree = message({{context.rank() == 3 ? "tp" : "ep", 4}});
    require_same(disagree, "ranks disagree: rank 0 runs mesh ep=4, rank 3 runs mesh tp=4");
    const Mesh mesh(context.communicator(), {{"ep", 4}});
    require_same(error_of([&] { (void)mesh.group("tp"); }).message(), "the mesh ep=4 has no dim tp");
    require_same(error_of([&] { (void)mesh.join({"ep", "tp"}); }).message(), "the mesh ep=4 has no dim tp");
  });
}

TEST(Parallel, finds_tokens_experts_slices_and_replicas_in_any_order_of_the_dims) {
  for (const std::vector<std::string>& order :
       std::vector<std::vector<std::string>>{{"dp", "ep", "tp"}, {"tp", "ep", "dp"}, {"ep", "tp", "dp"}}) {
    run({.ranks = 12}, [&](const Context& context) {
      const auto size = [](const std::string& dim) { return dim == "ep" ? 3 : 2; };
      std::vector<MeshDim> dims;
      for (const std::string& dim : order) dims.push_back({dim, size(dim)});
      const Parallel ranks(context, dims);
      const Mesh mesh(context.communicator(), dims);
      require(ranks_of(ranks.experts.communicator()) == ranks_of(mesh.group("ep")), "experts");
      require(ranks_of(ranks.tensor) == ranks_of(mesh.group("tp")), "slices");
      require(ranks_of(ranks.replicas) == ranks_of(mesh.group("dp")), "replicas");
      require_equal(ranks.slice(), mesh.coordinate("tp"), "this rank's slice");
      require(ranks_of(ranks.data.communicator()) == ranks_of(mesh.join({"dp", "ep"})), "ranks with other tokens");
      // In the first replica the holders of experts are the ranks along ep.
      if (mesh.coordinate("dp") > 0) return;
      for (int r = 0; r < 3; ++r) {
        require_equal(ranks.data.communicator().job_rank(ranks.holder(r)), mesh.group("ep").job_rank(r), "holder");
      }
    });
  }
}

TEST(Parallel, is_all_experts_without_a_mesh_and_none_with_slices_alone) {
  run({.ranks = 4}, [](const Context& context) {
    const Parallel plain(context), slices(context, {{"tp", 4}});
    require_equal(plain.experts.size(), 4, "ranks that share the experts");
    require_equal(plain.slice_count(), 1, "slices");
    require_equal(slices.experts.size(), 1, "ranks that share the experts");
    require_equal(slices.slice_count(), 4, "slices");
    require_same(error_of([&] {
                   const Parallel wrong(context, {{"pp", 4}});
                 }).message(),
                 "the mesh has a dim pp; there are dp, ep and tp");
  });
}

TEST(Parallel, tells_all_ranks_who_names_another_dim) {
  run({.ranks = 3}, [](const Context& context) {
    const std::vector<MeshDim> dims{{context.rank() == 1 ? "pp" : "ep", 3}};
    const Error error = error_of([&] { const Parallel wrong(context, dims); });
    require_equal(error.rank(), 1, "rank of the error");
    require_same(error.message(), "the mesh has a dim pp; there are dp, ep and tp");
  });
}

TEST(Mesh, is_read_from_a_line) {
  const std::vector<MeshDim> dims = parse_mesh("dp=2,ep=16");
  ASSERT_EQ(dims.size(), 2u);
  EXPECT_EQ(dims[0].name, "dp");
  EXPECT_EQ(dims[1].name, "ep");
  EXPECT_EQ(dims[1].size, 16);
  for (const std::string bad :
       {"", "ep", "=2", "ep=", "ep=two", "ep=2x", "ep=0", "ep=-1", "ep=2,", "ep=2,,tp=1", "ep=99999999999"}) {
    EXPECT_NE(
        error_of([&] { parse_mesh(bad); }).message().find("is no part of a mesh, which is written like dp=2,ep=4"),
        std::string::npos)
        << bad;
  }
}

}  // namespace
}  // namespace expar::test
