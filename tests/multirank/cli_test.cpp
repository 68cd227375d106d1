// The command line as people and scripts meet it: exit statuses, the one line on stderr, --json, and what is left.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "tests/directory.h"

namespace expar {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using std::chrono::steady_clock;
using Words = std::vector<std::string>;

std::string read_all(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

struct Result {
  int status = -1;  // of exit; 128 + signal where one ended it
  std::string out, err;
};

class CommandLine : public InDirectory {
 protected:
  pid_t start(const Words& words, const std::map<std::string, std::string>& variables = {}) const {
    const pid_t pid = fork();
    if (pid != 0) return pid;
    for (const auto& [name, value] : variables) setenv(name.c_str(), value.c_str(), 1);
    dup2(open("/dev/null", O_RDONLY), 0);
    dup2(open(path("out").c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0600), 1);
    dup2(open(path("err").c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0600), 2);
    Words all = words;
    all.insert(all.begin(), EXPAR_CLI);
    std::vector<char*> argv;
    for (std::string& word : all) argv.push_back(word.data());
    argv.push_back(nullptr);
    execv(argv[0], argv.data());
    _exit(99);
  }

  Result finish(pid_t pid) const {
    int status = 0;
    waitpid(pid, &status, 0);
    return {WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status), read_all(path("out")),
            read_all(path("err"))};
  }

  Result run(const Words& words, const std::map<std::string, std::string>& variables = {}) const {
    return finish(start(words, variables));
  }

  /// Waits until `pid` has `count` children that have become the program they run; in the order of their starts.
  static std::vector<pid_t> children_of(pid_t pid, std::size_t count) {
    const std::string file = "/proc/" + std::to_string(pid) + "/task/" + std::to_string(pid) + "/children";
    std::vector<pid_t> children;
    const auto end = steady_clock::now() + seconds(60);
    while (children.size() < count && steady_clock::now() < end) {
      std::this_thread::sleep_for(milliseconds(5));
      children.clear();
      std::istringstream list(read_all(file));
      for (pid_t child = 0; list >> child;) children.push_back(child);
    }
    EXPECT_EQ(children.size(), count);
    return children;
  }

  static bool runs(pid_t pid) {
    const std::string stat = read_all("/proc/" + std::to_string(pid) + "/stat");
    return !stat.empty() && stat.substr(stat.rfind(')')).substr(0, 3) != ") Z";
  }

  static void expect_gone(pid_t pid) {
    const auto end = steady_clock::now() + seconds(10);
    while (runs(pid) && steady_clock::now() < end) std::this_thread::sleep_for(milliseconds(5));
    EXPECT_FALSE(runs(pid)) << "process " << pid << " is still there";
  }

  void expect_mistake(const Words& words, const std::string& sentence) const {
    const Result result = run(words);
    EXPECT_EQ(result.status, 2) << result.err;
    EXPECT_EQ(result.err, "expar: " + sentence + "\n");
    EXPECT_EQ(result.out, "");
  }

  nlohmann::json error_in(const std::string& file) const {
    return nlohmann::json::parse(read_all(path(file)))["error"];
  }
};

TEST_F(CommandLine, shows_help_and_version) {
  EXPECT_EQ(run({"--help"}).status, 0);
  EXPECT_NE(run({"--help"}).out.find("launch"), std::string::npos);
  EXPECT_EQ(run({"--version"}).out.substr(0, 6), "expar ");
  const Result help = run({"doctor", "--help"});
  EXPECT_EQ(help.status, 0);
  EXPECT_NE(help.out.find("--timeout"), std::string::npos);
}

TEST_F(CommandLine, answers_a_mistake_with_one_sentence) {
  expect_mistake({}, "name a verb; expar --help lists them");
  expect_mistake({"doctor", "--rnaks", "2"}, "unknown flag --rnaks; did you mean --ranks?");
  expect_mistake({"doctor", "--colour", "x"}, "unknown flag --colour");
  expect_mistake({"doctor", "word"}, "unexpected argument 'word'");
  expect_mistake({"doctor", "--ranks"}, "--ranks needs a value");
  expect_mistake({"doctor", "--ranks", "0"}, "--ranks = '0' is not a whole number from 1 to 1024");
  expect_mistake({"doctor", "--ranks=2x"}, "--ranks = '2x' is not a whole number from 1 to 1024");
  expect_mistake({"doctor", "--ranks", "2", "--ranks", "3"}, "--ranks was given more than once");
  expect_mistake({"doctor", "--timeout", "0"}, "--timeout = '0' is not a number above 0");
  expect_mistake({"doctor", "--timeout", "nan"}, "--timeout = 'nan' is not a number above 0");
  expect_mistake({"doctor", "--transport", "shmm"},
                 "--transport = 'shmm' is not one of threads, shm, mpi; did you mean shm?");
  expect_mistake({"launch", "-n", "2"}, "no program to start: expar launch -n N -- PROGRAM [ARGUMENTS]");
  expect_mistake({"bench"}, "name what to measure: barrier, dispatch, combine, experts, layer");
  expect_mistake({"bench", "dispatch", "experts", "--mesh", "ep=2"},
                 "--mesh goes with dispatch, combine and layer, not with experts");
  expect_mistake({"bench", "combine", "--mesh", "ep=2", "--partition", "hidden"},
                 "--mesh does not go with --partition hidden, which takes all ranks as one group");
  expect_mistake({"bench", "dispatch", "--mesh", "ep=2,pp=2"}, "the mesh has a dim pp; there are dp, ep and tp");
  expect_mistake({"bench", "dispatch", "--mesh", "ep=2", "-n", "3"},
                 "--ranks = '3' contradicts the mesh, which has 2 places");
  expect_mistake({"bench", "dispatch", "--topk", "9", "--experts", "8"}, "--topk = 9 is above --experts = 8");
}

TEST_F(CommandLine, says_why_a_transport_does_not_work) {
  const Result result = run({"bench", "barrier", "--transport", "mpi"});
  EXPECT_EQ(result.status, 6);
  EXPECT_EQ(result.err.find("expar: there is no transport \"mpi\" here: "), 0U) << result.err;
  EXPECT_NE(result.err.find("; there are threads"), std::string::npos) << result.err;
}

TEST_F(CommandLine, suggests_the_verb_that_was_meant) {
  const Result result = run({"docto"});
  EXPECT_EQ(result.status, 2);
  EXPECT_EQ(result.err.substr(0, 55), "expar: unknown verb 'docto'; did you mean doctor? (verb");
}

TEST_F(CommandLine, writes_mistakes_to_json_too) {
  EXPECT_EQ(run({"doctor", "--json", path("result"), "--nonsense"}).status, 2);
  const nlohmann::json error = error_in("result");
  EXPECT_EQ(error["code"], "bad_argument");
  EXPECT_EQ(error["rank"], -1);
  EXPECT_EQ(error["peer"], -1);
  EXPECT_EQ(error["operation"], "");
  EXPECT_EQ(error["message"], "unknown flag --nonsense");
}

TEST_F(CommandLine, refuses_a_result_file_that_cannot_be_written) {
  const Result result = run({"launch", "--json", "/nowhere/result", "--", "touch", path("touched")});
  EXPECT_EQ(result.status, 7);
  EXPECT_EQ(result.err, "expar: cannot write /nowhere/result: No such file or directory\n");
  EXPECT_FALSE(std::filesystem::exists(path("touched")));
}

TEST_F(CommandLine, leaves_no_temporary_file_beside_the_result) {
  EXPECT_EQ(run({"launch", "-n", "2", "--json", path("result"), "--", "true"}).status, 0);
  EXPECT_EQ(nlohmann::json::parse(read_all(path("result")))["ranks"], 2);
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory_)) {
    files += entry.path().filename().string().starts_with("result");
  }
  EXPECT_EQ(files, 1);
}

TEST_F(CommandLine, gives_programs_their_arguments_as_they_are) {
  const Result result = run({"launch", "-n", "1", "--", "printf", "%s|", "--ranks", "--", ""});
  EXPECT_EQ(result.out, "--ranks|--||");
}

TEST_F(CommandLine, names_a_killed_rank_of_a_foreign_program) {
  const Result result =
      run({"launch", "-n", "3", "--json", path("result"), "--", "sh", "-c", "test $EXPAR_RANK != 2 || kill -9 $$"});
  EXPECT_EQ(result.status, 5);
  EXPECT_EQ(result.err, "expar: rank 2 was killed by signal 9 (SIGKILL)\n");
  EXPECT_EQ(error_in("result")["code"], "peer_lost");
  EXPECT_EQ(error_in("result")["peer"], 2);
}

TEST_F(CommandLine, says_how_a_foreign_program_failed) {
  const Result result = run({"launch", "-n", "2", "--", "sh", "-c", "exit $((EXPAR_RANK * 3))"});
  EXPECT_EQ(result.status, 70);
  EXPECT_EQ(result.err, "expar: rank 1 exited with status 3\n");
}

TEST_F(CommandLine, names_a_program_that_cannot_be_started) {
  const Result result = run({"launch", "--", "/nowhere/program"});
  EXPECT_EQ(result.status, 7);
  EXPECT_EQ(result.err, "expar: launch: cannot start /nowhere/program: No such file or directory\n");
}

TEST_F(CommandLine, says_of_every_transport_whether_it_works) {
  const Result result = run({"doctor", "--json", path("result")});
  EXPECT_EQ(result.status, 0) << result.err;
  const nlohmann::json report = nlohmann::json::parse(read_all(path("result")));
  ASSERT_FALSE(report["transports"].empty());
  for (const auto& transport : report["transports"]) EXPECT_TRUE(transport["works"]) << transport;
  EXPECT_TRUE(report["limits"]["sealed_memory"]);
  EXPECT_GE(report["machine"]["usable_cores"], 1);
}

/// The check of that name in a report of doctor.
nlohmann::json check_in(const nlohmann::json& report, const std::string& name) {
  for (const auto& check : report["checks"]) {
    if (check["name"] == name) return check;
  }
  ADD_FAILURE() << "no check of " << name << " in " << report;
  return {};
}

TEST_F(CommandLine, gives_a_verdict_on_each_part_of_the_machine) {
  const Result result = run({"doctor", "--json", path("result")});
  EXPECT_EQ(result.status, 0) << result.err;
  const nlohmann::json report = nlohmann::json::parse(read_all(path("result")));
  for (const char* name : {"cores", "instruction sets", "shared memory", "address space", "locked memory", "open files",
                           "waiting", "launchers", "NUMA", "transport threads", "transport shm", "copies", "GEMMs"}) {
    const nlohmann::json check = check_in(report, name);
    EXPECT_FALSE(check["found"].get<std::string>().empty()) << check;
    EXPECT_EQ(check.contains("reason"), check["verdict"] != "ok") << check;
    EXPECT_EQ(check.contains("advice"), check["verdict"] != "ok") << check;
    EXPECT_NE(result.out.find("\n" + std::string(name) + " "), std::string::npos) << result.out;
  }
  EXPECT_EQ(check_in(report, "launchers")["verdict"], "ok");
  EXPECT_GE(report["numa_nodes"], 1);
  EXPECT_EQ(report["launchers"]["environment"], "none");
  EXPECT_GT(report["measured"]["copy_gbps"], 0);
  EXPECT_GT(report["measured"]["gemm_gflops"], 0);
  EXPECT_EQ(report["measured"]["gemm_wrong"], 0);
  EXPECT_NE(result.out.find("\nverdict: "), std::string::npos) << result.out;
}

TEST_F(CommandLine, calls_a_shortage_of_cores_no_problem) {
  const Result result = run({"doctor", "--ranks", "33", "--json", path("result")});
  EXPECT_EQ(result.status, 0) << result.err;
  const nlohmann::json report = nlohmann::json::parse(read_all(path("result")));
  if (report["machine"]["usable_cores"] >= 33) GTEST_SKIP() << "this machine has a core for every rank";
  EXPECT_EQ(check_in(report, "cores")["verdict"], "note");
  for (const auto& transport : report["transports"]) EXPECT_EQ(transport["ranks"], 33) << transport;
  EXPECT_EQ(report["verdict"], "ok") << report["checks"];
  EXPECT_NE(result.out.find("\nverdict: ok, "), std::string::npos) << result.out;
}

TEST_F(CommandLine, says_what_to_do_about_problems) {
  rlimit files{};
  getrlimit(RLIMIT_NOFILE, &files);
  const int ranks = static_cast<int>(std::thread::hardware_concurrency()) + 2;  // more than cores
  const rlimit few{static_cast<rlim_t>(2 * ranks + 15), files.rlim_max};
  setrlimit(RLIMIT_NOFILE, &few);
  const Result result = run({"doctor", "--ranks", std::to_string(ranks), "--json", path("result")},
                            {{"EXPAR_ISA", "sse"}, {"RANK", "1"}});
  setrlimit(RLIMIT_NOFILE, &files);
  EXPECT_EQ(result.status, 0) << result.err;
  EXPECT_EQ(result.err, "");
  const nlohmann::json report = nlohmann::json::parse(read_all(path("result")));
  const std::string type = "type 'ulimit -n " + std::to_string(2 * ranks + 16) + "'";
  EXPECT_EQ(report["verdict"], "problem");
  EXPECT_EQ(check_in(report, "open files")["advice"], type);
  EXPECT_EQ(check_in(report, "instruction sets")["verdict"], "problem");
  EXPECT_EQ(check_in(report, "launchers")["reason"], "RANK is set but WORLD_SIZE is not");
  EXPECT_EQ(check_in(report, "transport shm")["verdict"], "problem") << "its ranks would meet the same environment";
  EXPECT_EQ(check_in(report, "transport threads")["verdict"], "ok") << "tried without EXPAR_ISA";
  EXPECT_NE(check_in(report, "GEMMs")["verdict"], "problem") << "measured without EXPAR_ISA";
  EXPECT_NE(result.out.find("-> " + type), std::string::npos) << result.out;
}

TEST_F(CommandLine, names_the_limit_that_ends_a_transport) {
  rlimit size{};
  getrlimit(RLIMIT_FSIZE, &size);
  const rlimit little{100 << 10, size.rlim_max};
  setrlimit(RLIMIT_FSIZE, &little);
  const Result result = run({"doctor", "--json", path("result")}, {{"EXPAR_TIMEOUT", "soon"}});
  setrlimit(RLIMIT_FSIZE, &size);
  EXPECT_EQ(result.status, 0) << result.err;
  const nlohmann::json report = nlohmann::json::parse(read_all(path("result")));
  EXPECT_EQ(check_in(report, "shared memory")["advice"], "type 'ulimit -f unlimited'");
  EXPECT_EQ(check_in(report, "transport shm")["advice"], "solve the problems above first");
  EXPECT_EQ(check_in(report, "waiting")["reason"], "EXPAR_TIMEOUT is \"soon\", not a number of seconds above 0");
  EXPECT_TRUE(report.contains("measured")) << "without EXPAR_TIMEOUT";
  EXPECT_NE(result.out.find("\nverdict: 3 problems"), std::string::npos) << result.out;
}

/// Small enough to be quick under a sanitizer.
Words bench(const Words& more) {
  Words words{"bench",   "--seconds", "0.05",      "--tokens", "24",     "--hidden", "40",
              "--inner", "24",        "--experts", "6",        "--topk", "2"};
  words.insert(words.end(), more.begin(), more.end());
  return words;
}

TEST_F(CommandLine, measures_every_operation_on_every_transport) {
  for (const char* transport : {"threads", "shm"}) {
    const Result result = run(bench({"barrier", "dispatch", "combine", "experts", "layer", "--train", "-n", "3",
                                     "--transport", transport, "--json", path("result")}));
    ASSERT_EQ(result.status, 0) << result.err;
    const nlohmann::json report = nlohmann::json::parse(read_all(path("result")));
    Words what;
    for (const auto& row : report["rows"]) {
      what.push_back(row["what"]);
      EXPECT_EQ(row["wrong"], 0);
      EXPECT_EQ(row["ranks"], 3);
      EXPECT_EQ(row["transport"], transport);
      EXPECT_GT(row["p50_us"], 0);
      EXPECT_LE(row["p50_us"], row["p99_us"]);
    }
    EXPECT_EQ(what, (Words{"barrier", "dispatch", "combine", "experts", "layer_forward", "layer_step"}));
    EXPECT_GT(report["rows"][1]["of_copy"], 0);
    EXPECT_GT(report["rows"][2]["of_copy"], 0);
    EXPECT_GT(report["rows"][3]["of_peak"], 0);
  }
}

TEST_F(CommandLine, measures_on_meshes) {
  for (const char* mesh : {"dp=2,ep=2,tp=2", "tp=3", "tp=2,ep=2"}) {
    for (const char* dtype : {"f32", "bf16"}) {
      const Result result = run(bench({"dispatch", "combine", "layer", "--train", "--bias", "--dtype", dtype, "--mesh",
                                       mesh, "--transport", "threads", "--json", path("result")}));
      ASSERT_EQ(result.status, 0) << mesh << ": " << result.err;
      const nlohmann::json rows = nlohmann::json::parse(read_all(path("result")))["rows"];
      ASSERT_EQ(rows.size(), 4u);
      for (const auto& row : rows) EXPECT_EQ(row["mesh"], mesh);
    }
  }
}

TEST_F(CommandLine, measures_experts_of_every_activation) {
  for (const char* activation : {"swiglu", "clamped_swiglu", "quick_geglu", "geglu", "gelu", "silu", "relu2"}) {
    const Result result = run(bench({"experts", "-n", "2", "--transport", "threads", "--activation", activation}));
    EXPECT_EQ(result.status, 0) << activation << ": " << result.err;
  }
  EXPECT_EQ(run(bench({"experts", "--activation", "swish"})).status, 2);
}

TEST_F(CommandLine, measures_micro_batches_of_a_layer_in_flight) {
  const Result result = run(bench({"layer", "-n", "2", "--batches", "3", "--late", "2000", "--json", path("result")}));
  EXPECT_EQ(result.status, 0) << result.err;
  const auto rows = nlohmann::json::parse(read_all(path("result")))["rows"];
  ASSERT_EQ(rows.size(), 2U);
  for (std::size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(rows[i]["what"], "layer_forward");
    EXPECT_EQ(rows[i]["in_flight"], i == 0 ? 1 : 3);
    EXPECT_EQ(rows[i]["late_us"], 2000);
    EXPECT_EQ(rows[i]["wrong"], 0);
    EXPECT_GT(rows[i]["p50_us"], 3 * 2000);
  }
  // One by one the first rank waits for each batch.
  EXPECT_GT(rows[0]["dispatch_us"], 3 * 1500);
  expect_mistake({"bench", "layer", "--late", "5"}, "--late goes with --batches of 2 or more");
  expect_mistake({"bench", "dispatch", "--batches", "2"},
                 "--batches goes with inference of layer alone, without a mesh");
}

TEST_F(CommandLine, measures_every_way_to_route) {
  for (const char* routes : {"uniform", "zipf:1.5", "hot:1:0.9", "hot:6:1"}) {
    for (const char* layout : {"indexed", "expert_major", "padded", "rank_major"}) {
      const Result result = run(
          bench({"dispatch", "combine", "-n", "4", "--transport", "threads", "--routes", routes, "--layout", layout}));
      EXPECT_EQ(result.status, 0) << routes << ": " << result.err;
    }
  }
}

TEST_F(CommandLine, refuses_ranks_that_contradict_the_launcher) {
  const std::map<std::string, std::string> job = {{"EXPAR_JOB", "cli_test"}, {"EXPAR_RANK", "0"}, {"EXPAR_SIZE", "2"}};
  Result result = run(bench({"barrier", "-n", "3"}), job);
  EXPECT_EQ(result.status, 2);
  EXPECT_EQ(result.err, "expar: --ranks = '3' contradicts the launcher: expar has started 2 ranks\n");
  result = run(bench({"barrier", "--transport", "threads"}), job);
  EXPECT_EQ(result.status, 2);
  EXPECT_EQ(result.err,
            "expar: --transport = 'threads' contradicts the launcher: expar has started 2 ranks as processes\n");
}

TEST_F(CommandLine, joins_the_ranks_that_a_launcher_has_started) {
  Words words = bench({"barrier", "--json", path("result")});
  words.insert(words.begin(), {"launch", "-n", "2", "--", EXPAR_CLI});
  const Result result = run(words);
  EXPECT_EQ(result.status, 0) << result.err;
  EXPECT_EQ(nlohmann::json::parse(read_all(path("result")))["rows"][0]["ranks"], 2);
}

TEST_F(CommandLine, names_the_rank_that_never_came) {
  const std::map<std::string, std::string> job = {
      {"EXPAR_JOB", "cli_test_" + std::to_string(getpid())}, {"EXPAR_RANK", "0"}, {"EXPAR_SIZE", "2"}};
  const Result result = run(bench({"barrier", "--timeout", "0.5"}), job);
  EXPECT_EQ(result.status, 4);
  EXPECT_NE(result.err.find("rank 1"), std::string::npos) << result.err;
}

TEST_F(CommandLine, names_a_rank_that_is_killed_at_work) {
  const pid_t launcher = start({"bench", "dispatch", "-n", "3", "--seconds", "30", "--json", path("result")});
  const std::vector<pid_t> ranks = children_of(launcher, 3);
  ASSERT_EQ(ranks.size(), 3u);
  std::this_thread::sleep_for(milliseconds(700));
  kill(ranks[1], SIGKILL);
  const Result result = finish(launcher);
  EXPECT_EQ(result.status, 5) << result.err;
  EXPECT_NE(result.err.find("rank 1 was killed by signal 9 (SIGKILL)"), std::string::npos) << result.err;
  EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
  EXPECT_EQ(error_in("result")["code"], "peer_lost");
  EXPECT_EQ(error_in("result")["peer"], 1);
  for (const pid_t rank : ranks) expect_gone(rank);
}

TEST_F(CommandLine, takes_its_ranks_along_when_it_is_killed) {
  const pid_t launcher = start({"bench", "dispatch", "-n", "3", "--seconds", "30"});
  const std::vector<pid_t> ranks = children_of(launcher, 3);
  kill(launcher, SIGKILL);
  finish(launcher);
  for (const pid_t rank : ranks) expect_gone(rank);
}

}  // namespace
}  // namespace expar
