// A rank that does as it is told, for the tests of the launcher: each argument is
// "RANK|*:ACTION[:VALUE]".
//   report:CODE[:PEER]  hands over an error with this code and exits with its status
//   exit:STATUS · kill:SIGNAL · sleep:SECONDS · deaf (ignores SIGTERM) · stdin (exits 9 unless it
//   is empty) child:FILE          leaves a sleeping child behind and writes its pid to FILE
//   pid:DIRECTORY       writes its pid to DIRECTORY/RANK
#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include <expar/registry.h>

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ':');) parts.push_back(part);
  return parts;
}

void write_pid(const std::string& path, pid_t pid) {
  std::ofstream(path + ".new") << pid;
  rename((path + ".new").c_str(), path.c_str());
}

void report(int code, int peer) {
  const expar::Error error(static_cast<expar::ErrorCode>(code), "as told",
                           {.rank = expar::job_from_environment().rank, .peer = peer, .operation = "dispatch"});
  expar::report_error(error);
  std::exit(expar::exit_code(error.code()));
}

void leave_child(const std::string& path) {
  const pid_t pid = fork();
  if (pid == 0) {
    setsid();
    std::this_thread::sleep_for(std::chrono::seconds(100));
    std::_Exit(0);
  }
  write_pid(path, pid);
}

void act(int rank, const std::vector<std::string>& order) {
  const std::string& action = order[1];
  const std::string value = order.size() > 2 ? order[2] : "0";
  if (action == "report") report(std::stoi(value), order.size() > 3 ? std::stoi(order[3]) : -1);
  if (action == "exit") std::exit(std::stoi(value));
  if (action == "kill") {
    const int number = std::stoi(value);
    signal(number, SIG_DFL);  // sanitizers turn some signals into an exit
    raise(number);
  }
  if (action == "sleep") std::this_thread::sleep_for(std::chrono::duration<double>(std::stod(value)));
  if (action == "deaf") signal(SIGTERM, SIG_IGN);
  char byte = 0;
  if (action == "stdin" && read(STDIN_FILENO, &byte, 1) != 0) std::exit(9);
  if (action == "child") leave_child(value);
  if (action == "pid") write_pid(value + "/" + std::to_string(rank), getpid());
}

}  // namespace

int main(int argc, char** argv) {
  const int rank = expar::job_from_environment().rank;
  for (int i = 1; i < argc; ++i) {
    const std::vector<std::string> order = split(argv[i]);
    if (order[0] == "*" || order[0] == std::to_string(rank)) act(rank, order);
  }
}
