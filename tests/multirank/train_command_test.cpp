// expar train as people and programs run it: equal losses for any number of ranks, and a sentence for every mistake.
#include "tests/multirank/command.h"

#include <algorithm>

namespace expar {
namespace {

constexpr const char* kSmall =
    " --hidden 16 --inner 16 --experts 5 --context 4 --batch 40 --steps 50 --lr 0.01 --seed 3";

TEST_F(TrainCommand, prints_the_same_losses_on_any_ranks_and_transport) {
  for (const std::string dtype : {"f32", "bf16"}) {
    const std::string flags = kSmall + (" --dtype " + dtype);
    const nlohmann::json one = train(flags + " --transport threads");
    ASSERT_EQ(one["losses"].size(), 50u);
    ASSERT_GT(one["losses"].front(), one["losses"].back());
    for (const std::string ranks : {"1", "2", "3", "4", "8"}) {
      const nlohmann::json result = train(flags + " --ranks " + ranks);
      EXPECT_EQ(result["ranks"], std::stoi(ranks));
      EXPECT_EQ(result["transport"], ranks == "1" ? result["transport"] : "shm");
      EXPECT_EQ(result["losses"].dump(), one["losses"].dump()) << ranks << " ranks, " << dtype;
      EXPECT_EQ(result["heldout_bits_per_byte"].dump(), one["heldout_bits_per_byte"].dump());
    }
    const nlohmann::json threads = train(flags + " --transport threads --ranks 3");
    EXPECT_EQ(threads["losses"].dump(), one["losses"].dump());
  }
}

TEST_F(TrainCommand, trains_with_every_router_on_any_ranks) {
  for (const std::string router :
       {"qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4", "sinkhorn", "expert_choice"}) {
    const std::string flags = std::string(kSmall) + " --dtype f32 --router " + router;
    const nlohmann::json one = train(flags);
    ASSERT_GT(one["losses"].front(), one["losses"].back()) << router;
    const nlohmann::json three = train(flags + " --ranks 3");
    EXPECT_EQ(three["losses"].dump(), one["losses"].dump()) << router;
    EXPECT_EQ(three["heldout_bits_per_byte"].dump(), one["heldout_bits_per_byte"].dump()) << router;
  }
}

TEST_F(TrainCommand, trains_on_any_mesh) {
  const std::string flags = std::string(kSmall) + " --dtype f32";
  const nlohmann::json whole = train(flags);
  const nlohmann::json slices = train(flags + " --mesh tp=2");
  EXPECT_EQ(slices["ranks"], 2);
  for (const std::string mesh : {"ep=2,tp=2", "tp=2,ep=3"}) {
    const nlohmann::json result = train(flags + " --mesh " + mesh);
    EXPECT_EQ(result["losses"].dump(), slices["losses"].dump()) << mesh;
    EXPECT_EQ(result["heldout_bits_per_byte"].dump(), slices["heldout_bits_per_byte"].dump()) << mesh;
  }
  EXPECT_EQ(train(flags + " --mesh ep=2")["losses"].dump(), whole["losses"].dump());
  const double bits = whole["heldout_bits_per_byte"];
  EXPECT_NEAR(slices["heldout_bits_per_byte"], bits, 0.01);
  for (const std::string mesh : {"dp=2,ep=2", "ep=2,dp=2,tp=2 --router deepseek_v3 --bias-update-rate 0.01"}) {
    const nlohmann::json result = train(flags + " --mesh " + mesh);
    EXPECT_EQ(result["losses"][0].dump(), whole["losses"][0].dump()) << mesh;
    EXPECT_NEAR(result["heldout_bits_per_byte"], bits, 0.2) << mesh;
  }
  // Replicas stay alike: all of them see each other's loads and gradients.
  const std::string biased = flags + " --router deepseek_v3 --bias-update-rate 0.01 --mesh ";
  EXPECT_EQ(train(biased + "dp=2")["losses"].dump(), train(biased + "dp=2,tp=1")["losses"].dump());
  const Finished finished = expar("train --text " + path("text") + " --mesh ep=2,tp=2 --ranks 3");
  EXPECT_EQ(finished.status, 2);
  EXPECT_NE(finished.err.find("--ranks = '3' contradicts the mesh, which has 4 places"), std::string::npos);
}

TEST_F(TrainCommand, evens_the_loads_out_without_a_loss) {
  const std::string flags = " --hidden 16 --inner 16 --experts 8 --layers 1 --context 4 --batch 128 --steps 400";
  const nlohmann::json biased = train(flags + " --router deepseek_v3 --bias-update-rate 0.01");
  EXPECT_LT(biased["load_max_over_mean"], 1.2);
  // What evens them out is the bias and nothing else.
  const nlohmann::json left_alone = train(flags + " --router deepseek_v3 --bias-update-rate 1e-9");
  EXPECT_GT(left_alone["load_max_over_mean"], 1.3);
}

TEST_F(TrainCommand, says_what_programs_want_to_know) {
  const nlohmann::json plain = train(std::string(kSmall) + " --ranks 2");
  EXPECT_FALSE(plain.contains("dense_heldout_bits_per_byte"));
  const nlohmann::json result = train(std::string(kSmall) + " --ranks 2 --dense");
  EXPECT_EQ(result["losses"], plain["losses"]) << "the twin must not disturb the model";
  for (const std::string key :
       {"ranks", "transport", "steps", "losses", "heldout_bits_per_byte", "dense_heldout_bits_per_byte", "tokens_per_s",
        "phase_ms", "load_max_over_mean", "dropped"}) {
    EXPECT_TRUE(result.contains(key)) << key;
  }
  EXPECT_EQ(result["loads"]["first"].size(), 2u) << "one row per layer";
  EXPECT_EQ(result["loads"]["last"][1].size(), 5u) << "one number per expert";
  EXPECT_EQ(result.size(), 11u);
  for (const std::string key : {"route", "dispatch", "experts", "combine", "backward", "optimizer"}) {
    EXPECT_GT(result["phase_ms"].value(key, 0.0), 0.0) << key;
  }
  EXPECT_EQ(result["phase_ms"].size(), 6u);
  EXPECT_EQ(result["steps"], 50);
  EXPECT_EQ(result["dropped"], 0);
  EXPECT_GE(result["load_max_over_mean"], 1.0);
  EXPECT_GT(result["tokens_per_s"], 0.0);
}

TEST_F(TrainCommand, drops_the_same_slots_on_any_ranks) {
  const nlohmann::json plain = train(std::string(kSmall));
  for (const std::string policy : {"", " --capacity-policy drop_by_score"}) {
    const std::string flags = kSmall + (" --capacity-factor 0.75" + policy);
    const nlohmann::json one = train(flags);
    // 50 steps of 2 layers, each expert taking at most 12 of 80 slots.
    EXPECT_GE(one["dropped"], 50 * 2 * (80 - 5 * 12));
    EXPECT_LT(one["dropped"], 50 * 2 * 80);
    EXPECT_NE(one["losses"], plain["losses"]);
    for (const std::string ranks : {"3", "8"}) {
      const nlohmann::json result = train(flags + " --ranks " + ranks);
      EXPECT_EQ(result["losses"].dump(), one["losses"].dump()) << ranks << " ranks";
      EXPECT_EQ(result["heldout_bits_per_byte"].dump(), one["heldout_bits_per_byte"].dump());
      EXPECT_EQ(result["dropped"], one["dropped"]);
    }
  }
  const nlohmann::json roomy = train(kSmall + std::string(" --capacity-factor 5 --ranks 2"));
  EXPECT_EQ(roomy["losses"], plain["losses"]) << "room for everything";
  EXPECT_EQ(roomy["dropped"], 0);
}

TEST_F(TrainCommand, goes_on_with_the_capacity_of_a_checkpoint) {
  const std::string flags =
      kSmall + std::string(" --decay-steps 50 --capacity-factor 0.75 --capacity-policy drop_by_score");
  const nlohmann::json whole = train(flags);
  expar("train --text " + path("text") + " --hidden 16 --inner 16 --experts 5 --context 4 --batch 40 --steps 20 " +
        "--decay-steps 50 --lr 0.01 --seed 3 --capacity-factor 0.75 --capacity-policy drop_by_score --save " +
        path("there"));
  const nlohmann::json rest = train(" --steps 50 --ranks 3 --resume " + path("there"));
  EXPECT_EQ(rest["losses"].size(), 30u);
  EXPECT_EQ(rest["losses"].back(), whole["losses"].back());
  EXPECT_GT(rest["dropped"], 0);
  EXPECT_EQ(rest["heldout_bits_per_byte"], whole["heldout_bits_per_byte"]);
}

TEST_F(TrainCommand, shows_people_a_table) {
  const Finished finished = expar("train --text " + path("text") + kSmall + " --steps 2 --dense");
  EXPECT_EQ(finished.status, 2) << "a flag given twice";
  const Finished table = expar("train --text " + path("text") + " --hidden 8 --inner 8 --batch 16 --steps 2 --dense");
  EXPECT_EQ(table.status, 0) << table.err;
  for (const std::string word : {"MoE", "dense", "held-out bits per byte", "tokens/s", "load max/mean", "dropped slots",
                                 "ms/step", "route", "optimizer", "layer 1", "max/mean", "█"}) {
    EXPECT_NE(table.out.find(word), std::string::npos) << word << " is not in\n" << table.out;
  }
}

TEST_F(TrainCommand, refuses_each_mistake_with_one_sentence) {
  const std::string text = " --text " + path("text");
  std::ofstream(path("short")) << "In the beginning";
  std::filesystem::create_directory(path("dense_is_a_file"));
  std::ofstream(path("dense_is_a_file/dense")) << "text";
  const struct {
    std::string arguments;
    int status;
    std::string says;
  } mistakes[] = {
      {"", 2, "--text"},
      {" --text " + path("missing"), 7, "No such file or directory"},
      {" --text " + directory_, 7, "Is a directory"},
      {" --text " + path("short"), 2, "too short: it has 16 bytes"},
      {text + " --experts 4 --topk 5", 2, "topk"},
      {text + " --topk 0", 2, "--topk = '0'"},
      {text + " --experts -1", 2, "--experts = '-1'"},
      {text + " --hidden 0", 2, "--hidden = '0'"},
      {text + " --steps ten", 2, "--steps = 'ten'"},
      {text + " --batch 0", 2, "--batch = '0'"},
      {text + " --batch 4", 2, "shards 8 exceeds the batch of 4 tokens"},
      {text + " --shards 0", 2, "--shards = '0'"},
      {text + " --context 9000", 2, "--context = '9000'"},
      {text + " --lr nan", 2, "--lr = 'nan'"},
      {text + " --lr 0", 2, "--lr = '0'"},
      {text + " --lr 1e-60", 2, "lr 0"},
      {text + " --seed -1", 2, "--seed = '-1'"},
      {text + " --dtype f64", 2, "--dtype = 'f64' is not one of f32, bf16"},
      {text + " --router sigmoid", 2, "--router = 'sigmoid' is not one of softmax"},
      {text + " --bias-update-rate 0.01", 2, "is for a router with a selection bias, which softmax has not"},
      {text + " --router deepseek_v3 --bias-update-rate 0", 2, "--bias-update-rate = '0'"},
      {text + " --router expert_choice --capacity-factor 1", 2, "experts that choose their tokens take as many each"},
      {text + " --router gpt_oss --save " + path("gpt"), 2, "a router as Qwen3-MoE's or DeepSeek-V3's"},
      {text + " --capacity-factor 0", 2, "--capacity-factor = '0'"},
      {text + " --capacity-policy drop_by_score", 2, "--capacity-policy needs --capacity-factor"},
      {text + " --capacity-factor 1 --capacity-policy drop", 2,
       "--capacity-policy = 'drop' is not one of drop_by_position"},
      {text + " --steps 1 --capacity-factor 0.5 --capacity-policy error", 2, "rows, its capacity is"},
      {text + " --mesh ep", 2, "'ep' is no part of a mesh, which is written like dp=2,ep=4"},
      {text + " --mesh ep=1,xp=2", 2, "the mesh has a dim xp; there are dp, ep and tp"},
      {text + " --sace here", 2, "unknown flag --sace"},
      {text + " --save-every 3", 2, "--save-every needs --save"},
      {text + " --save " + path("text") + "/here", 7, "cannot make this directory"},
      {text + " --resume " + path("missing"), 7, "No such file or directory"},
      {text + " --dense=maybe", 2, "--dense"},
      {text + " --log-dir ''", 2, "--log-dir = '' is not the name of a directory"},
      {text + " --log-dir " + path("short"), 7, "cannot make the directory " + path("short") + ": Not a directory"},
      {text + " --log-dir " + path("short") + "/below", 7, "Not a directory"},
      {text + " --dense --log-dir " + path("dense_is_a_file"), 7, "/dense: Not a directory"},
      {text + " --steps 0 --log-dir " + path("unused"), 2, "--steps = '0'"},
  };
  for (const auto& mistake : mistakes) {
    for (const std::string ranks : {"", " --ranks 2"}) {
      const Finished finished = expar("train" + mistake.arguments + ranks + " --json " + path("error"));
      EXPECT_EQ(finished.status, mistake.status) << mistake.arguments << "\n" << finished.err;
      EXPECT_NE(finished.err.find(mistake.says), std::string::npos) << mistake.arguments << "\n" << finished.err;
      EXPECT_EQ(std::count(finished.err.begin(), finished.err.end(), '\n'), 1) << finished.err;
      EXPECT_EQ(finished.out, "") << mistake.arguments;
    }
  }
  EXPECT_FALSE(std::filesystem::exists(path("unused"))) << "nothing is made for a command that is wrong";
}

TEST_F(TrainCommand, trains_the_same_with_and_without_a_log) {
  const nlohmann::json plain = train(std::string(kSmall) + " --ranks 2");
  const nlohmann::json logged = train(std::string(kSmall) + " --ranks 2 --log-dir " + path("log/of/this/run"));
  EXPECT_EQ(logged["losses"].dump(), plain["losses"].dump());
  EXPECT_EQ(logged["heldout_bits_per_byte"].dump(), plain["heldout_bits_per_byte"].dump());
  const std::filesystem::directory_iterator files(path("log/of/this/run"));
  EXPECT_EQ(std::distance(begin(files), end(files)), 1) << "one rank writes";
}

}  // namespace
}  // namespace expar
