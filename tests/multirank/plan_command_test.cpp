// `expar plan` beside `expar bench`: what is planned is what is moved. And what it says, writes and refuses.
#include <zlib.h>

#include <fstream>
#include <map>

#include "tests/multirank/command.h"

namespace expar {
namespace {

class PlanCommand : public Command {
 protected:
  /// 23 tokens, 3 of 7 experts, the first ones more often.
  void write_routes() const {
    std::string text = R"({"layers": 1, "tokens": 23, "top_k": 3, "experts": 7})"
                       "\n";
    for (int t = 0; t < 23; ++t) {
      const int first = t * t % 5;
      for (const int id : {first, (first + 1 + t % 3) % 7, (first + 4 + t % 2) % 7}) text += static_cast<char>(id);
    }
    const gzFile file = gzopen(path("some.routes.gz").c_str(), "wb");
    gzwrite(file, text.data(), static_cast<unsigned>(text.size()));
    gzclose(file);
  }

  void write_config(const std::string& text) const {
    std::filesystem::create_directory(path("model"));
    std::ofstream(path("model/config.json")) << text;
  }

  void expect_refusal(const std::string& arguments, const std::string& sentence) const {
    const Finished finished = expar("plan " + arguments);
    EXPECT_EQ(finished.status, 2) << arguments;
    EXPECT_EQ(finished.err, "expar: " + sentence + "\n");
    EXPECT_EQ(finished.out, "");
  }
};

TEST_F(PlanCommand, plans_to_the_byte_what_bench_moves) {
  write_routes();
  for (const std::string& routes : {path("some.routes.gz"), std::string("zipf:1.3 --experts 9 --topk 4"),
                                    std::string("uniform --experts 3 --topk 2")}) {
    for (const int ranks : {1, 2, 3, 4}) {
      const std::string sizes =
          " --ranks " + std::to_string(ranks) + " --tokens 19 --hidden 24 --inner 8 --dtype bf16 --routes " + routes;
      const nlohmann::json planned = result_of("plan" + sizes);
      const nlohmann::json moved = result_of("bench dispatch combine --seconds 0.02 --transport threads" + sizes);
      const std::int64_t dispatch = moved["rows"][0]["bytes"];
      const std::int64_t combine = moved["rows"][1]["bytes"];
      EXPECT_EQ(planned["bytes"]["dispatch"], dispatch) << sizes;
      EXPECT_EQ(planned["bytes"]["combine"], combine) << sizes;
      EXPECT_EQ(planned["bytes"]["ep"], dispatch + combine) << sizes;
      EXPECT_EQ(planned["bytes_per_rank"]["ep"].get<double>(), static_cast<double>(dispatch + combine) / ranks)
          << sizes;
      EXPECT_EQ(ranks > 1, dispatch > 0);
      const nlohmann::json slices =
          result_of("bench combine --partition hidden --seconds 0.02 --transport threads" + sizes);
      EXPECT_EQ(planned["bytes"]["hidden"], slices["rows"][0]["bytes"]) << sizes;
    }
  }
}

TEST_F(PlanCommand, plans_to_the_byte_what_bench_moves_on_a_mesh) {
  write_routes();
  const std::map<std::string, std::string> ways = {
      {"ep=3", "ep"},       {"dp=2,ep=2", "ep"},  {"tp=2", "tp"},       {"tp=3", "tp"},           {"dp=2,tp=2", "tp"},
      {"ep=2,tp=2", "etp"}, {"tp=2,ep=2", "etp"}, {"ep=2,tp=3", "etp"}, {"dp=2,ep=3,tp=2", "etp"}};
  for (const auto& [mesh, way] : ways) {
    for (const std::string& batch : {"--dtype bf16 --routes " + path("some.routes.gz"),
                                     std::string("--dtype f32 --routes zipf:1.3 --experts 9 --topk 4")}) {
      const std::string sizes = " --mesh " + mesh + " --tokens 7 --hidden 24 --inner 8 " + batch;
      const nlohmann::json planned = result_of("plan" + sizes);
      const nlohmann::json moved = result_of("bench dispatch combine --seconds 0.01 --transport threads" + sizes);
      EXPECT_EQ(planned["bytes"][way], moved["rows"][0]["bytes"].get<int>() + moved["rows"][1]["bytes"].get<int>())
          << sizes;
      EXPECT_GT(planned["bytes"][way], 0) << sizes;
      EXPECT_EQ(moved["rows"][1]["mesh"], mesh);
      EXPECT_EQ(moved["rows"][1]["ranks"], planned["ranks"]) << sizes;
    }
  }
}

TEST_F(PlanCommand, answers_the_question_of_the_notebook) {
  const nlohmann::json plan = result_of(
      "plan --experts 32 --topk 8 --hidden 64 --tokens 4 --mesh dp=4,ep=8 "
      "--ranks-per-node 8 --ascend");
  EXPECT_EQ(plan["crossover_topk"], 8);
  EXPECT_EQ(plan["ranks"], 32);
  EXPECT_EQ(plan["nodes"], 4);
  const nlohmann::json& bytes = plan["bytes_per_rank"];
  EXPECT_EQ(bytes["ep_per_slot"], 2 * 4 * 8 * 64 * 2 * 7 / 8);
  EXPECT_EQ(bytes["tp"], 2 * 7 * 4 * 64 * 2);
  EXPECT_EQ(bytes["allgather_reducescatter"], bytes["tp"]);
  EXPECT_EQ(bytes["hidden"], bytes["ep_per_slot"].get<int>() / 2);
  EXPECT_LT(bytes["ep"], bytes["ep_per_slot"]);
  EXPECT_EQ(bytes["between_nodes"], 0);
  // L = 4, max_bs = 4, 8 ranks: Align512(Align32(128) + 44) = 512, Align512(128) = 512.
  EXPECT_EQ(plan["ascend_buffer_bytes"], 2 * (4 * 4 * 8 * 512 + (8 + 1) * 4 * 512));
  EXPECT_EQ(plan["ascend_refusals"].size(), 1u) << "H = 64";
  EXPECT_FALSE(result_of("plan --ranks 2").contains("ascend_buffer_bytes"));
}

TEST_F(PlanCommand, says_what_ascends_operators_ask_of_memory) {
  // 16 ranks, 2 of them for one shared expert; each of the others has 1 of 14 experts.
  const std::string sizes = "plan --ranks 16 --experts 14 --topk 8 --hidden 7168 --tokens 8 --ascend --shared-ranks 2";
  const nlohmann::json plan = result_of(sizes);
  EXPECT_EQ(plan["ascend_rows"], 8 * 16);
  EXPECT_EQ(plan["ascend_shared_rows"], 8 * 8);
  EXPECT_EQ(plan["ascend_message_bytes"], (std::vector<int>{14336, 7168, 7680, 7680, 7680}));
  EXPECT_EQ(plan["ascend_buffer_bytes"], 2 * (8 * 16 * 14848 + (8 + 1) * 8 * 14336));
  EXPECT_EQ(plan["ascend_hccl_buffsize"], 6);  // 5.6 MB
  EXPECT_TRUE(plan["ascend_refusals"].empty());
  const std::string out = expar(sizes + " --hccl-buffsize 6").out;
  for (const char* line :
       {"Ascend: A, rows of expand_x                128\n  on a shared expert's rank                 64\n",
        "bytes of a row, quant_mode 2              7680\n", "HCCL_BUFFSIZE=6\n"})
    EXPECT_NE(out.find(line), std::string::npos) << line << out;
  EXPECT_EQ(out.find("refuse"), std::string::npos);
  const nlohmann::json bare = result_of("plan --ranks 4 --ascend --tokens 2");
  EXPECT_TRUE(bare["ascend_shared_rows"].is_null());
}

TEST_F(PlanCommand, tells_the_links_of_every_way) {
  const nlohmann::json plan = result_of("plan --mesh ep=4,tp=2 --ranks-per-node 3 --experts 6 --topk 2 --hidden 32");
  EXPECT_EQ(plan["nodes"], 3);
  for (const char* key : {"ep", "ep_per_slot", "tp", "allgather_reducescatter", "hidden", "hidden_allgather", "etp"}) {
    const nlohmann::json& links = plan["links"][key];
    const double all = plan["bytes_per_rank"][key];
    EXPECT_GT(links["within_node"], 0) << key;
    EXPECT_GT(links["between_nodes"], 0) << key;
    EXPECT_NEAR(links["within_node"].get<double>() + links["between_nodes"].get<double>(), all, all * 1e-12) << key;
  }
  EXPECT_EQ(plan["bytes_per_rank"]["between_nodes"], plan["links"]["ep"]["between_nodes"]);
}

TEST_F(PlanCommand, takes_its_sizes_from_a_model) {
  write_config(R"({"model_type": "qwen3_moe", "hidden_size": 96, "moe_intermediate_size": 40, "num_experts": 12,
                   "num_experts_per_tok": 5, "num_hidden_layers": 6, "mlp_only_layers": [0]})");
  nlohmann::json from_model = result_of("plan --ranks 3 --model " + path("model"));
  EXPECT_EQ(from_model["model"]["family"], "qwen3_moe");
  EXPECT_EQ(from_model["model"]["moe_layers"], 5);
  from_model.erase("model");
  EXPECT_EQ(from_model, result_of("plan --ranks 3 --hidden 96 --inner 40 --experts 12 --topk 5"));
  expect_refusal("--topk 2 --model " + path("model"), "--topk contradicts --model, which has its own");
  write_routes();
  expect_refusal("--model " + path("model") + " --routes " + path("some.routes.gz"),
                 path("model") + " has 5 of 12 experts for each token, but " + path("some.routes.gz") + " 3 of 7");
}

TEST_F(PlanCommand, says_where_a_model_does_not_choose_evenly) {
  write_config(R"({"model_type": "deepseek_v3", "hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 16,
                   "num_experts_per_tok": 4, "num_hidden_layers": 3, "n_group": 4, "topk_group": 2})");
  const std::string note = "(the model's router stays within 2 of 4 groups of experts";
  EXPECT_NE(expar("plan --ranks 4 --model " + path("model")).out.find(note), std::string::npos);
  EXPECT_EQ(expar("plan --ranks 4 --routes uniform --model " + path("model")).out.find(note), std::string::npos);
}

TEST_F(PlanCommand, draws_the_crossover) {
  const Finished finished = expar("plan --ranks 8 --experts 32 --topk 4 --svg " + path("plan.svg"));
  EXPECT_EQ(finished.status, 0) << finished.err;
  EXPECT_NE(finished.out.find("EP with a row for each slot sends less than TP below top-k 8\n"), std::string::npos);
  const std::string svg = contents(path("plan.svg"));
  EXPECT_TRUE(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
  EXPECT_NE(svg.find(">crossover at top-k 8<"), std::string::npos);
  EXPECT_NE(svg.find("4 of 32 experts"), std::string::npos);
}

TEST_F(PlanCommand, refuses_what_cannot_be) {
  expect_refusal("--topk 9 --experts 8", "--topk = 9 is above --experts = 8");
  expect_refusal("--ranks 8 --mesh ep=2,tp=2", "--ranks = 8, but --mesh = 'ep=2,tp=2' has 4");
  expect_refusal("--mesh ep=2,pp=2", "a mesh to plan has the dims dp, ep and tp, not 'pp'");
  expect_refusal("--mesh ep", "'ep' is no part of a mesh, which is written like dp=2,ep=4");
  expect_refusal("--svg " + path("a.svg"), "--svg draws what travels between ranks, and each works alone here");
  expect_refusal("--ranks 8 --experts 32 --topk 4 --hidden 4096 --tokens 4 --ascend --hccl-buffsize 2",
                 "HCCL_BUFFSIZE is 2, should be from 3 to 2147483647");
  expect_refusal("--ranks 2 --ascend --shared-ranks 2", "--shared-ranks = 2 leaves none of 2 ranks for --experts");
  for (const std::string experts : {"0", "2"}) {
    expect_refusal("--ranks 2 --ascend --shared-ranks 1 --shared-experts " + experts,
                   "--shared-ranks = 1, should be a multiple of --shared-experts = " + experts);
  }
  expect_refusal("--ranks 2 --shared-ranks 1", "--shared-ranks requires --ascend");
  expect_refusal("--ranks 2 --routes zipf", "--routes = 'zipf': neither uniform, zipf:A, hot:N:F nor a file");
}

}  // namespace
}  // namespace expar
