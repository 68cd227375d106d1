// A training that stops and goes on, on any number of ranks, is the training that never stopped; and whatever ends it
// while it saves, a whole checkpoint is left.
#include "models/checkpoint.h"

#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <random>
#include <thread>

#include "tests/multirank/command.h"

namespace expar {
namespace {

constexpr const char* kSmall = " --hidden 16 --inner 16 --experts 5 --context 4 --batch 40 --lr 0.01 --seed 3";

class CheckpointCommand : public TrainCommand {
 protected:
  /// The directory's files by name.
  std::map<std::string, std::string> files(const std::string& directory) const {
    std::map<std::string, std::string> all;
    for (const auto& entry : std::filesystem::directory_iterator(path(directory))) {
      all[entry.path().filename()] = contents(entry.path());
    }
    return all;
  }
  std::string save(const std::string& directory) const { return " --save " + path(directory); }
  std::string resume(const std::string& directory) const { return " --resume " + path(directory); }
};

TEST_F(CheckpointCommand, goes_on_bit_by_bit_with_another_number_of_ranks) {
  for (const std::string dtype :
       {" --dtype f32", " --dtype bf16", " --router deepseek_v3 --bias-update-rate 0.01", " --router sinkhorn"}) {
    const nlohmann::json whole = train(kSmall + dtype + " --steps 60 --ranks 3" + save("whole"));
    const nlohmann::json first = train(kSmall + dtype + " --steps 30 --ranks 4" + save("parts"));
    const nlohmann::json second = train(" --steps 60 --ranks 2" + save("parts") + resume("parts"));
    nlohmann::json losses = first["losses"];
    losses.insert(losses.end(), second["losses"].begin(), second["losses"].end());
    EXPECT_EQ(losses.dump(), whole["losses"].dump());
    EXPECT_EQ(second["heldout_bits_per_byte"].dump(), whole["heldout_bits_per_byte"].dump());

    const auto wanted = files("whole");
    EXPECT_EQ(wanted.size(), 3u);
    ASSERT_TRUE(wanted.contains("optimizer-60.safetensors"));
    EXPECT_TRUE(files("parts") == wanted) << "the files differ";
    std::filesystem::remove_all(path("whole"));
    std::filesystem::remove_all(path("parts"));
  }
}

TEST_F(CheckpointCommand, goes_from_mesh_to_mesh) {
  for (const std::string dtype : {" --dtype f32", " --dtype bf16"}) {
    const std::string first = kSmall + dtype + " --steps 10";
    train(first + " --mesh ep=2,tp=2" + save("mesh"));
    train(first + " --mesh tp=2" + save("slices"));
    EXPECT_TRUE(files("mesh") == files("slices")) << "how many ranks hold whole experts changes the bytes";
    const nlohmann::json three = train(" --steps 20 --ranks 3" + resume("mesh") + save("three"));
    const nlohmann::json one = train(" --steps 20" + resume("mesh") + save("one"));
    EXPECT_EQ(three["losses"].dump(), one["losses"].dump());
    EXPECT_TRUE(files("three") == files("one"));
    for (const std::string mesh : {"tp=3", "ep=2,tp=2", "dp=2,tp=2", "ep=2,dp=2"}) {
      const nlohmann::json other = train(" --steps 11 --mesh " + mesh + resume("mesh"));
      EXPECT_NEAR(other["losses"][0], one["losses"][0], 0.002) << mesh << dtype << " reads other numbers";
    }
    for (const char* directory : {"mesh", "slices", "three", "one"}) std::filesystem::remove_all(path(directory));
  }
}

TEST_F(CheckpointCommand, is_not_disturbed_by_saving_on_the_way) {
  const nlohmann::json plain = train(std::string(kSmall) + " --steps 20 --ranks 2");
  const nlohmann::json saving = train(std::string(kSmall) + " --steps 20 --ranks 2 --save-every 3" + save("often"));
  EXPECT_EQ(plain["losses"].dump(), saving["losses"].dump());
  EXPECT_EQ(read_checkpoint(path("often")).step, 20);
}

TEST_F(CheckpointCommand, survives_a_kill_at_any_moment) {
  const nlohmann::json whole = train(std::string(kSmall) + " --steps 1000 --ranks 2");
  std::mt19937 random(5);
  std::int64_t last = 0;
  for (int kill_number = 0; kill_number < 20; ++kill_number) {
    const pid_t pid = fork();
    if (pid == 0) {
      const std::string command = "exec " EXPAR " train --text " + path("text") + kSmall + " --ranks 2 --steps 5000" +
                                  " --save-every 1" + save("killed") + (last > 0 ? resume("killed") : std::string()) +
                                  " >" + path("log") + " 2>&1";
      execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
      _exit(127);
    }
    const auto saved = [&] { return std::filesystem::exists(path("killed/model.safetensors")); };
    for (int i = 0; i < 2000 && !saved(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    ASSERT_TRUE(saved()) << contents(path("log"));
    std::this_thread::sleep_for(std::chrono::microseconds(20'000 + random() % 40'000));
    kill(pid, SIGKILL);
    waitpid(pid, nullptr, 0);

    const std::int64_t step = read_checkpoint(path("killed")).step;
    EXPECT_GE(step, last) << "an older checkpoint came back";
    last = step;
    ASSERT_LT(step, 1000) << "this machine is so fast that the killed training ended by itself";
    const nlohmann::json next = train(" --steps " + std::to_string(step + 1) + resume("killed"));
    EXPECT_EQ(next["losses"].dump(), nlohmann::json::array({whole["losses"][static_cast<std::size_t>(step)]}).dump())
        << "after step " << step;
  }
}

TEST_F(CheckpointCommand, keeps_the_last_one_when_the_disk_is_full) {
  train(std::string(kSmall) + " --steps 3 --ranks 2" + save("kept"));
  const auto before = files("kept");
  // A limit on the size of files stands for the disk's end: both make a write come short.
  const std::string full = "ulimit -f 20; trap '' XFSZ; ";
  const std::string command = full + EXPAR " train --text " + path("text") +
                              " --transport threads --ranks 2 --steps 5" + save("kept") + resume("kept") + " >" +
                              path("out") + " 2>" + path("err");
  const int status = std::system(command.c_str());
  EXPECT_EQ(WEXITSTATUS(status), 7) << contents(path("err"));
  EXPECT_NE(contents(path("err")).find("File too large"), std::string::npos) << contents(path("err"));
  const auto after = files("kept");
  for (const auto& [name, bytes] : before) EXPECT_TRUE(after.contains(name) && after.at(name) == bytes) << name;
  EXPECT_EQ(read_checkpoint(path("kept")).step, 3);
}

TEST_F(CheckpointCommand, refuses_what_does_not_go_together) {
  train(std::string(kSmall) + " --steps 3" + save("small"));
  std::filesystem::create_directory(path("empty"));
  std::filesystem::create_directory(path("other"));
  std::ofstream(path("other/model.safetensors"), std::ios::binary) << std::string("\x02\0\0\0\0\0\0\0{}", 10);
  const struct {
    std::string arguments;
    int status;
    std::string says;
  } mistakes[] = {
      {resume("small") + " --steps 3", 2, "--steps = '3' is not above the checkpoint's step 3"},
      {resume("small") + " --steps 5 --hidden 32", 2, "--hidden = '32' contradicts the checkpoint, which has 16"},
      {resume("small") + " --steps 5 --dtype f32", 2, "--dtype = 'f32' contradicts the checkpoint, which has bf16"},
      {resume("small") + " --steps 5 --router olmoe", 2,
       "--router = 'olmoe' contradicts the checkpoint, which has softmax"},
      {resume("small") + " --steps 5 --dense", 2, "--dense contradicts --resume"},
      {resume("empty"), 7, "empty/model.safetensors"},
      {resume("other"), 7, "not a checkpoint of expar train"},
      {save("small") + " --hidden 32", 2, "holds the checkpoint of a model with other extents"},
      {save("other"), 7, "not a checkpoint of expar train"},
  };
  for (const auto& mistake : mistakes) {
    const Finished finished = expar("train --ranks 2 --text " + path("text") + mistake.arguments);
    EXPECT_EQ(finished.status, mistake.status) << mistake.arguments << "\n" << finished.err;
    EXPECT_NE(finished.err.find(mistake.says), std::string::npos) << mistake.arguments << "\n" << finished.err;
  }
}

}  // namespace
}  // namespace expar
