// Turns a Waiting into words.
#include "transports/shared/wording.h"

#include <cstdio>
#include <vector>

namespace expar::local {
namespace {

std::string rank_name(int rank) { return "rank " + std::to_string(rank); }

// What follows "waited for": "it to start dispatch", "its rows (dispatch)"; `whose` is "it" or a rank's name.
std::string awaited(const Waiting& waiting, std::string_view whose) {
  const std::string operation(waiting.operation);
  if (waiting.what.empty()) return operation.empty() ? std::string(whose) : operation;
  std::string words(waiting.what);
  if (words.starts_with("to ")) {
    words.insert(0, std::string(whose) + " ");
    return operation.empty() ? words : words + " " + operation;
  }
  return operation.empty() ? words : words + " (" + operation + ")";
}

Error::Where where(int rank, int peer, const Waiting& waiting) { return {rank, peer, std::string(waiting.operation)}; }

}  // namespace

std::string seconds(Clock::duration time) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%g s",
                std::chrono::duration_cast<std::chrono::duration<double>>(time).count());
  return text.data();
}

std::string rank_names(std::span<const int> ranks) {
  constexpr std::size_t kMost = 4;
  const std::size_t named = ranks.size() > kMost + 1 ? kMost : ranks.size();
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < named; ++i) {
    if (i > 0) text += i + 1 == ranks.size() ? " and " : ", ";
    text += std::to_string(ranks[i]);
  }
  return named == ranks.size() ? text : text + " and " + std::to_string(ranks.size() - named) + " more";
}

Error late(int rank, int size, const Waiting& waiting) {
  std::string message;
  std::vector<int> others;
  for (int other = 0; waiting.awaited != nullptr && other < size; ++other) {
    if (other != rank && (*waiting.awaited)(other)) others.push_back(other);
  }
  if (others.size() > 1) {
    message = rank_names(others) + " are late: " + rank_name(rank) + " has waited " + seconds(waiting.limit) + " for " +
              awaited(waiting, "them");
  } else if (waiting.peer >= 0) {
    message = rank_name(waiting.peer) + " is late: " + rank_name(rank) + " has waited " + seconds(waiting.limit) +
              " for " + awaited(waiting, "it");
  } else {
    message = rank_name(rank) + " has waited " + seconds(waiting.limit) + " for " + awaited(waiting, "others");
  }
  return Error(ErrorCode::timeout, std::move(message), where(rank, waiting.peer, waiting));
}

Error died(int rank, int peer, std::string_view trace, const Waiting& waiting) {
  std::string message = rank_name(peer) + " died";
  if (!trace.empty()) message += " (" + std::string(trace) + ")";
  message += " while " + rank_name(rank) + " waited for ";
  if (waiting.peer == peer) {
    message += awaited(waiting, "it");
  } else if (waiting.peer < 0) {
    message += awaited(waiting, "others");
  } else {
    message += waiting.what.starts_with("to ") ? awaited(waiting, rank_name(waiting.peer))
                                               : rank_name(waiting.peer) + ": " + awaited(waiting, "it");
  }
  return Error(ErrorCode::peer_lost, std::move(message), where(rank, peer, waiting));
}

Error gone(int rank, int peer, bool in_exception, const Waiting& waiting) {
  std::string message = rank_name(peer) + " has left";
  if (in_exception) message += " because of an exception of its own";
  message += "; " + rank_name(rank) + " still waited for " + awaited(waiting, "it");
  return Error(ErrorCode::peer_lost, std::move(message), where(rank, peer, waiting));
}

}  // namespace expar::local
