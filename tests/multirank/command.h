// The command line run as people and programs run it, in a directory of its own.
#pragma once

#include <sys/wait.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "tests/directory.h"

namespace expar {

inline std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

struct Finished {
  int status = -1;
  std::string out, err;
};

class Command : public InDirectory {
 protected:
  Finished expar(const std::string& arguments) const {
    const std::string command = EXPAR " " + arguments + " >" + path("out") + " 2>" + path("err") + " </dev/null";
    const int status = std::system(command.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, contents(path("out")), contents(path("err"))};
  }

  /// What the command writes to --json, having succeeded in silence.
  nlohmann::json result_of(const std::string& arguments) const {
    const Finished finished = expar(arguments + " --json " + path("json"));
    EXPECT_EQ(finished.status, 0) << arguments << "\n" << finished.err;
    EXPECT_EQ(finished.err, "") << "a progress line is for terminals";
    return nlohmann::json::parse(contents(path("json")), nullptr, false);
  }
};

/// With a text to train on.
class TrainCommand : public Command {
 protected:
  void SetUp() override { std::ofstream(path("text"), std::ios::binary) << contents(KJV).substr(0, 78000); }
  nlohmann::json train(const std::string& arguments) const {
    return result_of("train --text " + path("text") + " " + arguments);
  }
};

}  // namespace expar
