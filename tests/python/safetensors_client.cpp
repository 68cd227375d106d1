// What safetensors_test.py has expar do.
//   copy IN OUT     reads a file or a checkpoint and writes all of it as one file
//   judge FILE...   a line for each: accepted, or the error
#include <cstdio>
#include <string>
#include <vector>

#include <expar/error.h>

#include "io/safetensors.h"

namespace expar {
namespace {

void copy(const std::string& from, const std::string& to) {
  const io::Checkpoint checkpoint(from);
  std::vector<io::NamedTensor> tensors;
  io::Metadata metadata;
  for (const io::SafetensorsFile& file : checkpoint.files()) {
    for (const io::StoredTensor& tensor : file.tensors()) tensors.push_back({tensor.name(), tensor.view()});
    metadata.insert(file.metadata().begin(), file.metadata().end());
  }
  io::write_safetensors(to, tensors, metadata);
}

void judge(const std::string& path) {
  try {
    io::SafetensorsFile{path};
    std::printf("accepted\n");
  } catch (const Error& error) {
    std::printf("%s: %s\n", std::string(name(error.code())).c_str(), error.message().c_str());
  }
}

}  // namespace
}  // namespace expar

int main(int count, char** arguments) {
  const std::vector<std::string> words(arguments + 1, arguments + count);
  try {
    if (words.size() == 3 && words[0] == "copy") {
      expar::copy(words[1], words[2]);
      return 0;
    }
  } catch (const expar::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return expar::exit_code(error.code());
  }
  if (words.size() < 2 || words[0] != "judge") return 2;
  for (std::size_t i = 1; i < words.size(); ++i) expar::judge(words[i]);
  return 0;
}
