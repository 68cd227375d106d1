// job_from_environment(): what each launcher's variables mean, and which of them are refused.
#include <unistd.h>

#include <cstdlib>
#include <map>
#include <string>

#include <expar/registry.h>
#include <gtest/gtest.h>

namespace expar {
namespace {

using Variables = std::map<std::string, std::string>;

const char* const kNames[] = {"EXPAR_JOB",
                              "EXPAR_RANK",
                              "EXPAR_SIZE",
                              "EXPAR_LOCAL_RANK",
                              "EXPAR_LOCAL_SIZE",
                              "TORCHELASTIC_RUN_ID",
                              "MASTER_PORT",
                              "TORCHELASTIC_RESTART_COUNT",
                              "RANK",
                              "WORLD_SIZE",
                              "LOCAL_RANK",
                              "LOCAL_WORLD_SIZE",
                              "OMPI_COMM_WORLD_RANK",
                              "OMPI_COMM_WORLD_SIZE",
                              "OMPI_COMM_WORLD_LOCAL_RANK",
                              "OMPI_COMM_WORLD_LOCAL_SIZE",
                              "PMIX_NAMESPACE",
                              "OMPI_MCA_ess_base_jobid",
                              "PMI_RANK",
                              "PMI_SIZE",
                              "MPI_LOCALRANKID",
                              "MPI_LOCALNRANKS",
                              "SLURM_PROCID",
                              "SLURM_NTASKS",
                              "SLURM_STEP_NUM_TASKS",
                              "SLURM_JOB_ID",
                              "SLURM_STEP_ID",
                              "SLURM_LOCALID",
                              "SLURM_NODEID",
                              "SLURM_STEP_TASKS_PER_NODE"};

Job job_with(const Variables& variables) {
  for (const char* name : kNames) unsetenv(name);
  for (const auto& [name, value] : variables) setenv(name.c_str(), value.c_str(), 1);
  return job_from_environment();
}

/// What is said about the variables, without what to type instead.
std::string refusal(const Variables& variables) {
  try {
    job_with(variables);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::bad_argument);
    EXPECT_NE(error.message().find(" type '"), std::string::npos) << error.message();
    return error.message().substr(0, error.message().find("; to start N ranks"));
  }
  return "accepted";
}

TEST(Job, is_one_rank_alone_without_a_launcher) {
  const Job job = job_with({});
  EXPECT_EQ(job.launcher, "none");
  EXPECT_EQ(job.rank, 0);
  EXPECT_EQ(job.size, 1);
  EXPECT_FALSE(job.id.empty());
}

TEST(Job, reads_the_variables_of_expar_launch) {
  const Job job = job_with({{"EXPAR_JOB", "abc"}, {"EXPAR_RANK", "2"}, {"EXPAR_SIZE", "4"}});
  EXPECT_EQ(job.launcher, "expar");
  EXPECT_EQ(job.rank, 2);
  EXPECT_EQ(job.size, 4);
  EXPECT_EQ(job.local_rank, 2);
  EXPECT_EQ(job.local_size, 4);
}

Variables torchrun() {
  return {{"TORCHELASTIC_RUN_ID", "none"},
          {"MASTER_PORT", "29500"},
          {"TORCHELASTIC_RESTART_COUNT", "0"},
          {"RANK", "5"},
          {"WORLD_SIZE", "8"},
          {"LOCAL_RANK", "1"},
          {"LOCAL_WORLD_SIZE", "4"}};
}

TEST(Job, reads_the_variables_of_torchrun) {
  const Job job = job_with(torchrun());
  EXPECT_EQ(job.launcher, "torchrun");
  EXPECT_EQ(job.rank, 5);
  EXPECT_EQ(job.size, 8);
  EXPECT_EQ(job.local_rank, 1);
  EXPECT_EQ(job.local_size, 4);
}

TEST(Job, tells_runs_of_torchrun_apart_by_port_and_restart) {
  Variables other = torchrun();
  const std::string first = job_with(other).id;
  other["TORCHELASTIC_RESTART_COUNT"] = "1";
  const std::string restarted = job_with(other).id;
  other["MASTER_PORT"] = "29501";
  EXPECT_NE(restarted, first);
  EXPECT_NE(job_with(other).id, restarted);
  other["RANK"] = "6";
  EXPECT_EQ(job_with(other).id, job_with(other).id);
}

TEST(Job, is_named_by_the_port_where_nobody_but_torchruns_variables_do) {
  const Job job = job_with({{"RANK", "1"}, {"WORLD_SIZE", "2"}, {"MASTER_PORT", "29500"}});
  EXPECT_EQ(job.rank, 1);
  EXPECT_EQ(job.size, 2);
  EXPECT_EQ(job.local_size, 2);
  EXPECT_NE(job_with({{"RANK", "1"}, {"WORLD_SIZE", "2"}, {"MASTER_PORT", "29501"}}).id, job.id);
}

TEST(Job, reads_the_variables_of_open_mpi) {
  const Job job = job_with({{"OMPI_COMM_WORLD_RANK", "1"},
                            {"OMPI_COMM_WORLD_SIZE", "2"},
                            {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                            {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"},
                            {"PMIX_NAMESPACE", "123"}});
  EXPECT_EQ(job.launcher, "openmpi");
  EXPECT_EQ(job.id, "openmpi:123");
  EXPECT_EQ(job.rank, 1);
  EXPECT_EQ(job.size, 2);
}

TEST(Job, names_a_hydra_job_by_the_nearest_process_outside_it) {
  // The environment of the process that started this test has no PMI_RANK: /proc shows what a
  // program began with.
  const Job job = job_with({{"PMI_RANK", "0"}, {"PMI_SIZE", "2"}});
  EXPECT_EQ(job.launcher, "mpich");
  EXPECT_TRUE(job.id.starts_with("mpich:" + std::to_string(getppid()) + ":")) << job.id;
  EXPECT_EQ(job_with({{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}}).id, job.id);
}

Variables slurm() {
  return {{"SLURM_PROCID", "5"}, {"SLURM_NTASKS", "7"}, {"SLURM_JOB_ID", "42"}, {"SLURM_STEP_ID", "0"}};
}

TEST(Job, reads_the_variables_of_a_slurm_step) {
  Variables step = slurm();
  step["SLURM_LOCALID"] = "1";
  step["SLURM_NODEID"] = "2";
  step["SLURM_STEP_TASKS_PER_NODE"] = "2(x3),1";
  const Job job = job_with(step);
  EXPECT_EQ(job.launcher, "slurm");
  EXPECT_EQ(job.id, "slurm:42:0");
  EXPECT_EQ(job.rank, 5);
  EXPECT_EQ(job.size, 7);
  EXPECT_EQ(job.local_rank, 1);
  EXPECT_EQ(job.local_size, 2);
}

TEST(Job, is_alone_in_the_shell_of_a_slurm_allocation) {
  Variables shell = slurm();
  shell.erase("SLURM_STEP_ID");
  EXPECT_EQ(job_with(shell).launcher, "none");
  shell["SLURM_STEP_ID"] = "4294967290";
  EXPECT_EQ(job_with(shell).launcher, "none");
}

TEST(Job, takes_the_name_of_the_step_for_mpich_under_srun) {
  Variables both = slurm();
  both["PMI_RANK"] = "5";
  both["PMI_SIZE"] = "7";
  EXPECT_EQ(job_with(both).id, "slurm:42:0");
}

TEST(Job, prefers_the_innermost_launcher) {
  Variables both = torchrun();
  both.merge(slurm());
  EXPECT_EQ(job_with(both).launcher, "torchrun");
  both.merge(Variables{{"OMPI_COMM_WORLD_RANK", "1"}, {"OMPI_COMM_WORLD_SIZE", "2"}, {"PMIX_NAMESPACE", "7"}});
  EXPECT_EQ(job_with(both).launcher, "torchrun") << "one torchrun on each of two nodes";
  const Job job =
      job_with({{"PMI_RANK", "0"}, {"PMI_SIZE", "1"}, {"EXPAR_JOB", "a"}, {"EXPAR_RANK", "2"}, {"EXPAR_SIZE", "4"}});
  EXPECT_EQ(job.launcher, "expar") << "started by the only rank of mpiexec";
}

TEST(Job, accepts_two_launchers_that_say_the_same) {
  EXPECT_EQ(job_with({{"RANK", "1"},
                      {"WORLD_SIZE", "2"},
                      {"MASTER_PORT", "29500"},
                      {"OMPI_COMM_WORLD_RANK", "1"},
                      {"OMPI_COMM_WORLD_SIZE", "2"},
                      {"PMIX_NAMESPACE", "7"}})
                .rank,
            1);
}

TEST(Job, refuses_two_launchers_that_contradict_each_other) {
  EXPECT_EQ(refusal({{"RANK", "1"},
                     {"WORLD_SIZE", "4"},
                     {"MASTER_PORT", "29500"},
                     {"OMPI_COMM_WORLD_RANK", "0"},
                     {"OMPI_COMM_WORLD_SIZE", "2"},
                     {"PMIX_NAMESPACE", "7"}}),
            "two launchers contradict each other: torchrun says that this is rank 1 of 4, openmpi says that this is "
            "rank 0 of 2; use one of them: type 'torchrun --nproc-per-node N --no-python PROGRAM' or 'mpirun -n N env "
            "-u RANK -u WORLD_SIZE PROGRAM'");
  EXPECT_NE(
      refusal({{"EXPAR_JOB", "a"}, {"EXPAR_RANK", "0"}, {"EXPAR_SIZE", "2"}, {"PMI_RANK", "1"}, {"PMI_SIZE", "2"}})
          .find("expar says that this is rank 0 of 2, mpich says that this is rank 1 of 2"),
      std::string::npos);
}

TEST(Job, says_what_to_type_instead) {
  try {
    job_with({{"RANK", "1"}});
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.message(),
              "RANK is set but WORLD_SIZE is not; to start N ranks type 'torchrun --nproc-per-node N --no-python "
              "PROGRAM', to run one alone 'env -u RANK PROGRAM'");
  }
}

TEST(Job, refuses_values_that_are_no_numbers) {
  EXPECT_EQ(refusal({{"EXPAR_JOB", "a"}, {"EXPAR_RANK", "two"}, {"EXPAR_SIZE", "4"}}),
            "EXPAR_RANK = 'two' is not a whole number");
  EXPECT_EQ(refusal({{"EXPAR_JOB", "a"}, {"EXPAR_RANK", "0"}, {"EXPAR_SIZE", "-4"}}),
            "EXPAR_SIZE = '-4' is not a whole number");
  EXPECT_EQ(refusal({{"EXPAR_JOB", "a"}, {"EXPAR_RANK", "0"}, {"EXPAR_SIZE", ""}}),
            "EXPAR_SIZE = '' is not a whole number");
}

TEST(Job, refuses_variables_that_contradict_each_other) {
  EXPECT_EQ(refusal({{"EXPAR_JOB", "a"}, {"EXPAR_RANK", "4"}, {"EXPAR_SIZE", "4"}}),
            "EXPAR_RANK = '4' is not below EXPAR_SIZE = '4'");
  EXPECT_EQ(refusal({{"EXPAR_JOB", "a"}, {"EXPAR_RANK", "0"}, {"EXPAR_SIZE", "0"}}),
            "EXPAR_RANK = '0' is not below EXPAR_SIZE = '0'");
  Variables too_local = torchrun();
  too_local["LOCAL_WORLD_SIZE"] = "9";
  EXPECT_EQ(refusal(too_local), "LOCAL_WORLD_SIZE = '9' is above WORLD_SIZE = '8'");
  too_local["LOCAL_RANK"] = "9";
  EXPECT_EQ(refusal(too_local), "LOCAL_RANK = '9' is not below LOCAL_WORLD_SIZE = '9'");
}

TEST(Job, refuses_half_a_set_of_variables) {
  EXPECT_EQ(refusal({{"EXPAR_JOB", "a"}, {"EXPAR_RANK", "0"}}), "EXPAR_RANK is set but EXPAR_SIZE is not");
  EXPECT_EQ(refusal({{"EXPAR_RANK", "0"}, {"EXPAR_SIZE", "1"}}),
            "EXPAR_RANK or EXPAR_SIZE is set but EXPAR_JOB, the name of the job, is not");
  EXPECT_EQ(refusal({{"PMI_SIZE", "2"}}), "PMI_SIZE is set but PMI_RANK is not");
  EXPECT_EQ(refusal({{"WORLD_SIZE", "2"}}), "WORLD_SIZE is set but RANK is not");
  EXPECT_EQ(refusal({{"RANK", "1"}, {"WORLD_SIZE", "2"}}),
            "RANK and WORLD_SIZE are set but neither TORCHELASTIC_RUN_ID nor MASTER_PORT, which name the job");
  EXPECT_EQ(refusal({{"OMPI_COMM_WORLD_RANK", "0"}, {"OMPI_COMM_WORLD_SIZE", "2"}}),
            "OMPI_COMM_WORLD_RANK or OMPI_COMM_WORLD_SIZE is set but PMIX_NAMESPACE, the name of the job, is not");
  Variables torch = torchrun();
  torch.erase("RANK");
  EXPECT_EQ(refusal(torch), "TORCHELASTIC_RUN_ID is set but RANK is not");
  torch = torchrun();
  torch.erase("LOCAL_WORLD_SIZE");
  EXPECT_EQ(refusal(torch), "LOCAL_RANK is set but LOCAL_WORLD_SIZE is not");
}

}  // namespace
}  // namespace expar
