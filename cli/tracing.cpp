// How the spans of all ranks come into one file.
#include "cli/tracing.h"

#include <unistd.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <vector>

#include <nlohmann/json.hpp>

#include "cli/output.h"
#include "io/trace.h"

namespace expar::cli {
namespace {

constexpr std::uint64_t kTag = UINT64_MAX;  // no operation has this number

std::string kept_path(const std::string& path, int rank) { return path + ".rank" + std::to_string(rank); }

void transfer(const Communicator& communicator, Message::Kind kind, int peer, void* data, std::size_t bytes) {
  Transport& transport = communicator.transport();
  const Message message{kind, peer, kTag, static_cast<std::byte*>(data), bytes};
  const Transport::Ticket ticket = transport.start({&message, 1});
  communicator.wait(
      [&] { return transport.test(ticket); },
      {.peer = peer, .operation = "trace", .what = "its part of the trace", .limit = communicator.timeout()});
}

/// What goes before a row.
struct Header {
  std::uint64_t bytes = 0;
  std::int64_t left_out = 0;
};

}  // namespace

Tracing::Tracing(const Communicator& communicator, const std::string& verb, const std::string& path)
    : communicator_(communicator), verb_(verb), path_(path) {
  if (path.empty()) return;
  trace_ = std::make_shared<Trace>();
  communicator.record(trace_);
}

Tracing::~Tracing() { communicator_.record(nullptr); }

void Tracing::finish() {
  if (trace_ == nullptr) return;
  communicator_.record(nullptr);
  std::string mine = io::trace_row(*trace_, communicator_.rank());
  Header header{mine.size(), trace_->left_out()};
  if (communicator_.rank() != 0) {
    transfer(communicator_, Message::Kind::send, 0, &header, sizeof header);
    transfer(communicator_, Message::Kind::send, 0, mine.data(), mine.size());
    return;
  }
  std::int64_t left_out = header.left_out;
  std::vector<std::string> rows{std::move(mine)};
  for (int peer = 1; peer < communicator_.size(); ++peer) {
    transfer(communicator_, Message::Kind::receive, peer, &header, sizeof header);
    std::string& row = rows.emplace_back(header.bytes, '\0');
    transfer(communicator_, Message::Kind::receive, peer, row.data(), row.size());
    left_out += header.left_out;
  }
  write(path_, rows);
  if (left_out > 0) {
    std::fprintf(stderr, "expar: %s leaves out %lld later spans: a rank keeps %zu\n", path_.c_str(),
                 static_cast<long long>(left_out), Trace::kCapacity);
  }
}

void Tracing::keep() const noexcept {
  if (trace_ == nullptr) return;
  try {
    write(kept_path(path_, communicator_.rank()), {io::trace_row(*trace_, communicator_.rank())});
  } catch (const std::exception&) {
  }
}

void Tracing::write(const std::string& path, const std::vector<std::string>& rows) const {
  write_file(path, io::trace_file("expar " + verb_, rows));
}

void join_kept_traces(const std::string& verb, const std::string& path, int ranks) noexcept {
  try {
    std::vector<std::string> rows;
    for (int rank = 0; rank < ranks; ++rank) {
      const std::string kept = kept_path(path, rank);
      std::ifstream file(kept, std::ios::binary);
      const auto trace = nlohmann::json::parse(file, nullptr, false);
      if (!trace.is_object()) continue;
      std::string& row = rows.emplace_back();
      for (const auto& event : trace.at("traceEvents")) row += (row.empty() ? "" : ",\n") + event.dump();
      unlink(kept.c_str());
    }
    if (!rows.empty()) write_file(path, io::trace_file("expar " + verb, rows));
  } catch (const std::exception&) {
  }
}

}  // namespace expar::cli
